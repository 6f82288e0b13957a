"""The command line: `python -m pretrain COMMAND`."""

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from pretrain.errors import DONE, INTERRUPTED, USER_MISTAKE

Number = TypeVar("Number", int, float)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 a mistake of the user's, 3 a gap that is not within its
    limit or a rehearsal that failed, 75 stopped early with a checkpoint written, 76 another rank was lost or none made
    progress, 77 a host is unhealthy, 78 stopped by a guard, 130 interrupted without a checkpoint."""
    arguments = build_parser().parse_args(argv)
    from data.errors import DataError
    from parallel.launch import LaunchError
    from pretrain import commands
    from pretrain.errors import UserError

    try:
        return int(getattr(commands, arguments.function)(arguments))
    except (UserError, DataError, LaunchError) as error:
        tell_mistake(error)
        return getattr(error, "exit_status", USER_MISTAKE)
    except BrokenPipeError:
        sys.stderr.close()
        return DONE
    except KeyboardInterrupt:
        print("pretrain: interrupted", file=sys.stderr)
        return INTERRUPTED


def tell_mistake(error: Exception) -> None:
    """One message for the user: from the first process where all know of it, else from the one that does."""
    from torch import distributed

    from pretrain.errors import SharedError

    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    known_to_all = isinstance(error, SharedError) or not distributed.is_initialized()
    if rank == "0":
        print(f"pretrain: {error}", file=sys.stderr)
    elif not known_to_all:
        print(f"pretrain: rank {rank}: {error}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Pretrains DeepSeek-V3-style models.",
        epilog="example: python -m pretrain train configs/tiny.toml --set train.steps=20",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train_and_plan(commands)
    _add_rehearse(commands)
    _add_compare(commands)
    _add_exchange(commands)
    _add_inference(commands)
    return parser


def _add_train_and_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = _add(
        commands,
        "train",
        "train; resumes by itself if the run folder holds a checkpoint",
        "torchrun --nproc-per-node 8 -m pretrain train configs/small.toml --set run.name=first",
    )
    _add_config(train)
    plan = _add(
        commands,
        "plan",
        "parameters, memory and timeline of a run, without running it",
        "python -m pretrain plan configs/dsv3_2b.toml --world-size 8 --device-memory 80",
    )
    _add_config(plan)
    plan.add_argument("--world-size", type=_whole(1), default=1, metavar="N", help="number of ranks (default: 1)")
    plan.add_argument(
        "--device-memory",
        type=_number(float, lambda value: 0 < value < math.inf, "a number above 0"),
        metavar="GIB",
        help="memory of a device; exit 2 if it cannot fit",
    )
    plan.add_argument(
        "--hardware",
        type=Path,
        metavar="FILE",
        help="what to predict speed for: a file, or a name in configs/hardware (default: h100)",
    )
    plan.add_argument("--search", action="store_true", help="print the fastest layouts that fit instead")
    plan.add_argument(
        "--dry-run", action="store_true", help="also run a step of three ranks, on tensors without memory"
    )
    plan.add_argument("--rank", type=_whole(0), metavar="R", help="dry-run this rank instead of three")
    _add_report_and_watch(commands)


def _add_report_and_watch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = _add(
        commands,
        "report",
        "write RUN/report.html, a page of plots; of several runs, a page that compares them",
        "python -m pretrain report runs/tiny",
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the run's folder")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the page of several (default: in the first one's dir)"
    )
    watch = _add(
        commands, "watch", "follow a run in the terminal, from another shell", "python -m pretrain watch runs/tiny"
    )
    watch.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    watch.add_argument("--once", action="store_true", help="print one picture and end")


def _add_rehearse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    rehearse = _add(
        commands,
        "rehearse",
        "a run in small on this machine's CPU, through every boundary of its timeline",
        "python -m pretrain rehearse configs/dsv3_671b.toml",
    )
    rehearse.description = (
        "Trains the same layers, stages, timeline and data path with small widths and few tokens, on CPU. At every "
        "boundary of the timeline it saves, ends its processes and goes on in new ones; each step is compared with "
        "the run's own timeline."
    )
    rehearse.epilog = (
        f"exit status: 0 if all is as the timeline says; 3 if not; 2 if it cannot be rehearsed. {rehearse.epilog}"
    )
    _add_config(rehearse)
    rehearse.add_argument("--out", type=Path, metavar="DIR", help="where all of it goes (default: runs/rehearse-NAME)")
    rehearse.add_argument(
        "--processes", type=_whole(1), default=16, metavar="N", help="at most, about 0.5 GB each (default: 16)"
    )
    rehearse.add_argument(
        "--steps", type=_whole(2), default=2, metavar="N", help="at least, between two boundaries (default: 2)"
    )


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = _add(
        commands,
        "compare",
        "train two configurations on the same samples and judge the gap between their losses",
        "python -m pretrain compare configs/small.toml configs/small.toml --set-b precision.dtype=fp32 --steps 1000",
    )
    compare.description = (
        "Trains A and B on the same samples, one after another, and compares the losses of their last fifth, "
        "(B - A) / A. The same command goes on after a stop, and does not train again what is complete."
    )
    compare.epilog = (
        f"exit status: 0 if gap and noise together are below the limit; 3 if not, or if a loss is not finite; else as "
        f"of train. {compare.epilog}"
    )
    for name in ("a", "b"):
        compare.add_argument(
            name, type=Path, metavar=f"{name.upper()}.toml", help="a configuration, or the folder of a run to reuse"
        )
    compare.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of both, such as data.fim_rate=0",
    )
    compare.add_argument("--set-b", action="append", default=[], metavar="KEY=VALUE", help="override a key of B only")
    compare.add_argument("--steps", type=_whole(1), metavar="N", help="train and compare so many steps")
    compare.add_argument(
        "--limit",
        type=_number(float, lambda value: 0 < value < math.inf, "a number above 0"),
        default=0.25,
        metavar="PERCENT",
        help="the largest gap, noise included, that is good enough (default: 0.25)",
    )
    compare.add_argument(
        "--seeds",
        type=_whole(0),
        default=0,
        metavar="K",
        help="also train A with K other initial weights: the gap that chance alone makes (default: 0)",
    )
    compare.add_argument("--out", type=Path, metavar="DIR", help="where all of it goes (default: runs/compare-A-B)")
    compare.add_argument("--only-report", action="store_true", help="train nothing; compare what is there")


def _add_exchange(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    export = _add(
        commands,
        "export",
        "a checkpoint as a Hugging Face folder",
        "python -m pretrain export runs/tiny/checkpoints/step-00000100 exported",
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp8"), help="of the weights (default: as stored)")
    export.add_argument("--ema", action="store_true", help="the moving average of the weights (see checkpoint.ema)")
    import_ = _add(
        commands,
        "import",
        "a Hugging Face folder in the published DeepSeek-V3 layout as a checkpoint",
        "python -m pretrain import downloaded/DeepSeek-V3 imported",
    )
    import_.add_argument("folder", type=Path, metavar="HF_FOLDER")
    import_.add_argument("out", type=Path, metavar="OUT", help="the checkpoint folder to write")
    import_.set_defaults(function="import_")


def _add_inference(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = _add(
        commands,
        "eval",
        "loss and perplexity on held-out documents",
        "python -m pretrain eval runs/tiny/checkpoints/step-00000100 --data runs/data --baselines",
    )
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    evaluate.add_argument("--data", type=Path, required=True, action="append", metavar="DIR", help="a dataset folder")
    evaluate.add_argument("--baselines", action="store_true", help="also count n-grams of the training tokens")
    evaluate.add_argument("--samples", type=_whole(1), metavar="N", help="score at most N sequences (default: all)")
    evaluate.add_argument(
        "--seq-len", type=_whole(1), metavar="N", help="tokens of a sequence (default: the checkpoint's context length)"
    )
    evaluate.add_argument(
        "--micro-batch-size", type=_whole(1), default=4, metavar="N", help="sequences at a time (default: 4)"
    )
    evaluate.set_defaults(function="evaluate")
    generate = _add(
        commands,
        "generate",
        "text from a checkpoint, decoded from the compressed cache",
        "python -m pretrain generate runs/tiny/checkpoints/step-00000100 --prompt 'def main('",
    )
    generate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    generate.add_argument("--prompt", required=True, metavar="TEXT")
    generate.add_argument("--max-new-tokens", type=_whole(1), default=128, metavar="N", help="(default: 128)")
    generate.add_argument(
        "--temperature",
        type=_number(float, lambda value: 0 <= value < math.inf, "a finite number, not below 0"),
        default=0.0,
        metavar="T",
        help="0 takes the best (default)",
    )
    generate.add_argument(
        "--top-p",
        type=_number(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1"),
        default=1.0,
        metavar="P",
        help="draw from this mass (default: 1)",
    )
    generate.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the draws (default: 0)")
    generate.add_argument("--decompress", action="store_true", help="attend to decompressed keys, not in latent space")
    generate.set_defaults(function="generate_text")


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, about: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", epilog=f"example: {example}"
    )
    parser.set_defaults(function=name)
    return parser


def _whole(lowest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `lowest` on."""
    return _number(int, lambda value: lowest <= value < 1 << 63, f"a whole number, at least {lowest}")


def _number(convert: Callable[[str], Number], is_right: Callable[[Number], bool], rule: str) -> Callable[[str], Number]:
    """The type of an argument that must follow a rule."""

    def parse(text: str) -> Number:
        try:
            value = convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} must be {rule}") from None
        if not is_right(value):
            raise argparse.ArgumentTypeError(f"{text} must be {rule}")
        return value

    return parse


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, such as train.steps=100"
    )


def exit_now(status: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown, in which torch's communication threads, which may still hold
    tensors, now and then abort a process that has done all its work."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_now(main())
