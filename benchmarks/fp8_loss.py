"""Whether FP8 harms training, on real text: `pretrain compare` of bf16 with block FP8, and of bf16 with block FP8 whose
scales are broken, which has to fail. All products are in FP8 that can be, routed experts and small ones too.

    python benchmarks/fp8_loss.py --data runs/data --out runs/fp8-loss                     # one GPU
    python benchmarks/fp8_loss.py --data runs/data --out runs/fp8-loss --side-by-side      # three GPUs, a run on each
    python benchmarks/fp8_loss.py --data runs/data --out runs/fp8-loss --control           # and what chance does
    python benchmarks/fp8_loss.py --data runs/data --out runs/fp8-scratch --common-steps 0 # FP8 from the first step on
    python benchmarks/fp8_loss.py --data runs/data --out runs/fp8-tiny --config configs/tiny.toml --batch 8 \\
        --learning-rate 4e-3 --steps 200 --planted-steps 100 --limit 2                     # a rehearsal on a CPU

All runs see the same samples, no sample twice with 37M tokens, and are one run in bf16 for the first `--common-steps`:
from there on they are compared, over `--steps` more. While routing settles, chance alone parts two runs by about the
limit: from the first step on, by 0.21 % ± 0.06 % after 1000. The highest learning rate is that of configs/small.toml
times the root of the ratio of batches. The timeline is that of a whole training, made short: the learning rate rises
over a fifth of the steps, stays until half of them, and falls along a cosine to a tenth at the end, so that the last
fifth, over which the gap is taken, is where a run would stop. The broken run is as long as `--planted-steps` and keeps
that timeline; healthy FP8 after as many steps is shown beside it.

With `--control` a bf16 run in deterministic mode is compared, too: it differs in the order of sums alone, so its gap is
what chance makes of the smallest difference.

The planted fault: every 1 × 128 tile of activations and gradients in linear layers is taken back with the factor of the
tile before it, which is what an index that is off by one would do.

    OUT/common/a                           the steps that all have in common
    OUT/compare.{html,svg,json}            bf16 (A) and FP8 (B)
    OUT/planted/compare.{html,svg,json}    bf16 (A) and FP8 with the fault (B)
    OUT/healthy/compare.{html,svg,json}    bf16 (A) and FP8 (B) after as many steps
    OUT/control/compare.{html,svg,json}    bf16 (A) and bf16 in deterministic mode (B)
    OUT/summary.json                       gaps, noises, verdicts

Exit status: 0 if FP8 is within the limit and the fault beyond it, noise included in both, else 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import fp8 as reference  # noqa: E402
from model.quantize import Quantized, quantize_tiles  # noqa: E402
from parallel.launch import find_place, join_processes, leave_processes  # noqa: E402
from parallel.zero import load_deepspeed  # noqa: E402
from pretrain.__main__ import build_parser  # noqa: E402
from pretrain.commands import comparison_of  # noqa: E402
from pretrain.config import load_config  # noqa: E402
from pretrain.errors import DONE, STOPPED_EARLY  # noqa: E402
from pretrain.loop import train  # noqa: E402
from pretrain.loss_gap import Verdict  # noqa: E402

PLANTED, SIDE, COMPARE = "planted", "side", "compare"
FP8 = ('precision.fp8="block"', "precision.fp8_everywhere=true")


def main() -> int:
    """Trains all runs and compares them; or trains one, with "planted" as the first argument with the fault."""
    words = sys.argv[1:]
    if words[:1] == [PLANTED]:
        plant()
        words = words[1:]
    if words[:1] == [SIDE]:
        return train_side(words[1], words[2:])
    arguments = parse()
    out, began = arguments.out.resolve(), time.perf_counter()
    steps, fewer = (arguments.common_steps + more for more in (arguments.steps, arguments.planted_steps))
    pairs = {"FP8": Pair(out, steps, FP8), PLANTED: Pair(out / PLANTED, fewer, FP8)}
    if arguments.control:
        pairs["control"] = Pair(out / "control", steps, ("run.deterministic=true",))
    train_all(arguments, out, pairs)
    statuses = {name: compare(out / "a", pair.out / "b", pair.steps, arguments.limit) for name, pair in pairs.items()}
    statuses["healthy"] = compare(out / "a", out / "b", fewer, arguments.limit, out / "healthy")
    found = {name: result(pair.out) for name, pair in pairs.items()} | {"healthy": result(out / "healthy")}
    # A gap that is too noisy to tell has the same status as one beyond the limit, and would not show the fault.
    passed = statuses["FP8"] == DONE and found[PLANTED].get("verdict") == Verdict.BEYOND.name.lower()
    summary = {"limit": arguments.limit / 100, "passed": passed, "statuses": statuses, **found}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for name, numbers in found.items():
        print(f"{name}: status {statuses[name]}, {describe(numbers)}")
    print(f"{'passed' if passed else 'FAILED'}: limit {arguments.limit} %, {time.perf_counter() - began:.0f} s")
    return 0 if passed else 1


class Pair(NamedTuple):
    """A comparison whose results go to `out`, after so many `steps`; B has other `settings` than A."""

    out: Path
    steps: int
    settings: tuple[str, ...]


def described(arguments: argparse.Namespace, pair: Pair) -> list[str]:
    """The arguments of `compare` that say what A and B of a pair are."""
    config = str(Path(arguments.config).resolve())
    sides = [config, config, *options("--set", overrides(arguments)), *options("--set-b", pair.settings)]
    return [*sides, "--steps", str(pair.steps), "--out", str(pair.out)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared dataset; its vocabulary is the model's")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--config", default=str(ROOT / "configs" / "small.toml"))
    parser.add_argument("--common-steps", type=int, default=500, help="in bf16, before FP8 begins")
    parser.add_argument("--steps", type=int, default=1000, help="with FP8")
    parser.add_argument("--planted-steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=6, help="sequences a step, in one micro-batch")
    parser.add_argument("--learning-rate", type=float, default=2.6e-4, help="the highest")
    parser.add_argument("--limit", type=float, default=0.25, help="percent")
    parser.add_argument("--control", action="store_true", help="compare with bf16 that adds up in another order, too")
    parser.add_argument("--side-by-side", action="store_true", help="train all at once, each on a GPU of its own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="more for all runs")
    arguments = parser.parse_args()
    if arguments.common_steps > 4 * arguments.steps:
        parser.error(f"--common-steps = {arguments.common_steps} must be at most 4 times --steps = {arguments.steps}")
    return arguments


def overrides(arguments: argparse.Namespace) -> list[str]:
    """What all runs differ in from the configuration: their length, and what follows from it."""
    config = load_config(Path(arguments.config))
    tokens = (arguments.common_steps + arguments.steps) * arguments.batch * config.train.seq_len
    highest = arguments.learning_rate
    pieces = (
        f'{{ shape = "linear", start = 0.0, value = {highest}, until = {tokens // 5} }}, '
        f"{{ value = {highest}, until = {tokens // 2} }}, "
        f'{{ shape = "cosine", value = {highest / 10}, until = {tokens} }}, {{ value = {highest / 10} }}'
    )
    return [
        f'data.datasets=[{{ path = "{Path(arguments.data).resolve()}" }}]',
        f"model.vocab_size={vocabulary(Path(arguments.data))}",
        f"train.batch_size={arguments.batch}",
        f"train.micro_batch_size={arguments.batch}",
        f"train.validate_every={arguments.planted_steps}",
        f"timeline.learning_rate=[{pieces}]",
        "checkpoint.every=0",
        "logging.fp8_every=0",
        "logging.tensorboard=false",
        "logging.every=50",
        *arguments.set,
    ]


def vocabulary(data: Path) -> int:
    """That of a dataset's tokenizer."""
    from data.shards import read_index

    return read_index(data).tokenizer.vocab_size


def options(name: str, values: Sequence[str]) -> list[str]:
    """The same option with each of some values."""
    return [part for value in values for part in (name, value)]


def compare(a: Path, b: Path, steps: int, limit: float, out: Path | None = None) -> int:
    """What `pretrain compare` says of two runs; its status."""
    asked = ["--only-report", "--steps", str(steps), "--limit", str(limit), "--out", str(out or b.parent)]
    command = [sys.executable, "-m", "pretrain", COMPARE, str(a), str(b), *asked]
    print("$", *command, file=sys.stderr, flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def train_all(arguments: argparse.Namespace, out: Path, pairs: dict[str, Pair]) -> None:
    """Trains A, and B of each pair, as far as they are not there yet."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")[: 1 + len(pairs)]
    if arguments.common_steps:
        common = Pair(out / "common", arguments.common_steps, ())
        if (out / "a").exists() and not common.out.exists():
            raise SystemExit(f"{out / 'a'} is a run without common steps; give another --out, or --common-steps 0")
        wait_for(start([SIDE, "a", *described(arguments, common)], gpus[0] if arguments.side_by_side else None))
        for folder in [out / "a", *(pair.out / "b" for pair in pairs.values())]:
            if not folder.exists():
                part = folder.with_name(f"{folder.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(common.out / "a", part)
                part.rename(folder)
    sides = [[SIDE, "a", *described(arguments, pairs["FP8"])]]
    for name, pair in pairs.items():
        sides.append([*([PLANTED] if name == PLANTED else []), SIDE, "b", *described(arguments, pair)])
    if arguments.side_by_side:
        for process in [start(side, gpu) for side, gpu in zip(sides, gpus, strict=True)]:
            wait_for(process)
    else:
        for side in sides:
            wait_for(start(side))


def start(words: Sequence[str], gpu: str | None = None) -> "subprocess.Popen[bytes]":
    """A process of this program that trains one run, on a `gpu` if one is named."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    return subprocess.Popen([sys.executable, __file__, *words], cwd=ROOT, env=environment)


def wait_for(process: "subprocess.Popen[bytes]") -> None:
    """Until a run is complete."""
    if process.wait() != DONE:
        raise SystemExit(f"a run failed with status {process.returncode}")


def train_side(role: str, arguments: Sequence[str]) -> int:
    """Trains run `a` or `b` of a comparison with these arguments."""
    comparison, place = comparison_of(build_parser().parse_args([COMPARE, *arguments])), find_place()
    load_deepspeed()
    join_processes(place)
    finished = train((comparison.a if role == "a" else comparison.b).config, place)
    leave_processes()
    return DONE if finished else STOPPED_EARLY


def result(out: Path) -> dict[str, Any]:
    """What a comparison has written; nothing if it did not come so far."""
    file = out / "compare.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def describe(numbers: dict[str, Any]) -> str:
    """The gap with its noise, and what is said of it."""
    if not numbers or numbers.get("gap") is None:
        return "no gap"
    return f"gap {numbers['gap']:+.3%} ± {numbers['noise']:.3%}, {numbers['verdict']}"


def plant() -> None:
    """Breaks the scales of tiles, on a CPU and, where Transformer Engine computes, on a GPU."""

    def off_by_one(x: Any, *, power_of_two: bool) -> Quantized:
        codes, scale_inv = quantize_tiles(x, power_of_two=power_of_two)
        return Quantized(codes, scale_inv.roll(1, 1))

    reference.quantize_tiles = off_by_one  # type: ignore[attr-defined]
    from model.te import TensorCores

    healthy = TensorCores.round

    def broken(self: TensorCores, quantizer: Any, kind: Any, x: Any, **how: Any) -> Any:
        operand = healthy(self, quantizer, kind, x, **how)
        if kind != "weight":
            for scale_inv in (operand.tensor._rowwise_scale_inv, operand.tensor._columnwise_scale_inv):
                if scale_inv is not None:
                    scale_inv.copy_(scale_inv.roll(1, 0))
        return operand

    TensorCores.round = broken  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
