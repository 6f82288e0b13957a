"""Whole optimizer steps on one GPU: Eva beside torchtitan, Megatron-Core and transformers, on the same tokens.

    python benchmarks/step_speed.py --data runs/data --out runs/speed-table       # 7 to 9 minutes on one H200
    python benchmarks/step_speed.py --data runs/data --only Eva transformers
    python benchmarks/step_speed.py --data runs/data --only Eva --eva "FP8 block" 'precision.fp8="block"' \\
        --profile step.svg step.md
    python benchmarks/step_speed.py --data runs/data --out runs/speed-table --only-table

All sides have the model of configs/dsv3_2b.toml, numbers of parameters are compared, and the hyperparameters of
peers/timing.py. A step is one forward and backward pass over all sequences of the batch and one update, with clipping.
Each row runs in a process of its own at growing batches until memory is full; the table shows the best. A row that
takes longer than its limit is ended, and what it has measured by then counts.
Results are written to --out as they come: a file of JSON lines for each row, and after each row the table as table.md.
FLOPs of all are 6 for each active parameter but the embedding and causal attention over half the sequence, without
recomputation.

Peers come from their own wheels under .bench/, added to this environment, which must have Transformer Engine and
transformers. Without a network, put wheels of the requirements below into a folder and name it with --wheels.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from step_profile import draw_profile, profile_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.counts import count_parameters, training_flops_per_token  # noqa: E402
from pretrain.config import Config, load_config  # noqa: E402

BENCH = ROOT / ".bench"
PEERS = ROOT / "benchmarks" / "peers"
PEAK_TFLOPS = 989.4
# No side starts in less.
LEAST_S = 10


@dataclass(frozen=True)
class Row:
    """One line of the table: a side's script with its settings, or Eva with overrides of the configuration. `batches`
    ascend; `limit` is how many seconds it may take, start and compilation included."""

    side: str
    name: str
    script: str
    requirements: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    batches: tuple[int, ...] = (8, 16, 24, 32)
    limit: float = 80.0


TORCHTITAN = (
    "torchtitan==0.3.0",
    "spmd_types==0.2.3",
    "torch_checkpointing==0.1.1",
    "torchdata==0.11.0",
    "tyro==1.0.17",
    "docstring-parser==0.18.0",
    "typeguard==4.6.1",
)
MEGATRON = ("megatron-core==0.19.2",)
BF16 = {"fp8": False, "distributed_optimizer": True}
COMPILED, EAGER = {"compiled": True}, {"compiled": False}
PEER_ROWS = (
    Row("torchtitan", "compiled", "torchtitan_side.py", TORCHTITAN, COMPILED, batches=(8, 16, 24), limit=140),
    Row("transformers", "eager", "transformers_side.py", settings=EAGER, batches=(4, 8, 16), limit=60),
    Row("Megatron-Core", "bf16", "megatron_side.py", MEGATRON, BF16, batches=(8, 16, 24), limit=130),
    Row("transformers", "compiled layers", "transformers_side.py", settings=COMPILED, batches=(8, 16), limit=120),
)
IN_FP8 = BF16 | {"fp8": True}
ON_REQUEST = (Row("Megatron-Core", "FP8 blockwise", "megatron_side.py", MEGATRON, IN_FP8, batches=(8, 16), limit=130),)


@dataclass(frozen=True)
class Outcome:
    """What a row's script wrote: one dictionary on the side, then one for each batch."""

    row: Row
    about: dict[str, Any]
    batches: list[dict[str, Any]]

    def seconds(self, batch: dict[str, Any]) -> float:
        """A step's time."""
        return float(median(batch["times"]))

    @property
    def best(self) -> dict[str, Any]:
        """The batch with the most sequences a second."""
        return max(self.batches, key=lambda batch: batch["batch"] / self.seconds(batch))


def main() -> None:
    """Measures what is asked for, writes the table after each row, and prints it."""
    arguments = parse()
    config = load_config(Path(arguments.config), overrides(arguments.data))
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    end = time.perf_counter() + arguments.total
    for row in rows(arguments):
        limit = min(arguments.limit or row.limit, end - time.perf_counter())
        if not arguments.only_table:
            measure(row, arguments, limit, profiled=bool(arguments.profile) and not outcomes)
        outcome = read_outcome(row, arguments.out)
        if outcome is not None:
            outcomes.append(outcome)
            (arguments.out / "table.md").write_text("\n".join(table(outcomes, config)) + "\n", encoding="utf-8")
    if not outcomes:
        raise SystemExit("nothing was measured")
    print("\n".join(table(outcomes, config)))
    if arguments.profile:
        write_profile(outcomes[0], [Path(path) for path in arguments.profile])


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="a prepared dataset with a vocabulary of the configuration's size"
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "dsv3_2b.toml"))
    parser.add_argument("--only", nargs="+", default=[], help="rows that have one of these texts")
    parser.add_argument("--eva", nargs="+", action="append", metavar=("NAME", "KEY=VALUE"), help="a row of Eva")
    parser.add_argument("--batches", nargs="+", type=int, help="sequences a step, ascending (default: of the row)")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, help="seconds that each row may take (default: of the row)")
    parser.add_argument("--total", type=float, default=3600, help="seconds for all rows; the last get what is left")
    parser.add_argument(
        "--out", type=Path, default=BENCH / "step_speed", help="a folder for results (default: .bench/)"
    )
    parser.add_argument("--only-table", action="store_true", help="measure nothing; show what is in --out")
    parser.add_argument("--wheels", help="a folder of wheels to install peers from, instead of the package index")
    parser.add_argument(
        "--profile", nargs="+", metavar="FILE", help=".svg or .md: the first row's step by kind of kernel"
    )
    return parser.parse_args()


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Eva's rows, as asked for or in bf16 and in FP8, then the peers', those that were asked for."""
    moments = 'optimizer.moments="fp32"'
    asked = arguments.eva or [["bf16", moments], ["FP8 block", moments, 'precision.fp8="block"']]
    ours = [Row("Eva", name, "eva_side.py", overrides=tuple(settings)) for name, *settings in asked]
    named = [row for row in ON_REQUEST if arguments.only and wanted(row, arguments.only)]
    return [row for row in (*ours, *PEER_ROWS) if wanted(row, arguments.only)] + named


def wanted(row: Row, only: Sequence[str]) -> bool:
    """Whether a row was asked for."""
    return not only or any(text in f"{row.side}, {row.name}" for text in only)


def overrides(data: str) -> list[str]:
    """Of the configuration, for all sides."""
    return [
        f'data.datasets=[{{ path = "{data}" }}]',
        "train.micro_batch_size=1",
        "train.batch_size=1",
    ]


def measure(row: Row, arguments: argparse.Namespace, limit: float, *, profiled: bool) -> None:
    """Runs a row's script, which writes a line for each batch. What goes wrong with it is told, and costs no other."""
    began, out = time.perf_counter(), results_file(row, arguments.out)
    out.unlink(missing_ok=True)
    print(f"{row.side}, {row.name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    if limit < LEAST_S:
        return
    request = {
        "config": arguments.config,
        "overrides": [*overrides(arguments.data), *row.overrides],
        "batches": arguments.batches or list(row.batches),
        "warm_up": arguments.warm_up,
        "steps": arguments.steps,
        "settings": row.settings,
        "out": str(out.resolve()),
        "profiled": profiled,
    }
    command = [sys.executable, "-W", "ignore", str(PEERS / row.script), json.dumps(request)]
    try:
        paths = [str(ROOT), *install(row, arguments.wheels), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        status = run_for(limit, command, environment)
    except (OSError, subprocess.CalledProcessError) as error:
        status = str(error)
    seconds = time.perf_counter() - began
    print(f"{row.side}, {row.name}: {status}, {seconds:.0f} s", file=sys.stderr, flush=True)


def run_for(limit: float, command: Sequence[str], environment: dict[str, str]) -> str:
    """Runs a command for so many seconds, then ends it with all that it started, as compilers; says how it went."""
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        return f"status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def results_file(row: Row, out: Path) -> Path:
    """Where a row's lines are."""
    return out / f"{row.side}-{row.name}.jsonl".replace(" ", "-")


def read_outcome(row: Row, out: Path) -> Outcome | None:
    """What a row has written, None if it measured nothing."""
    file = results_file(row, out)
    lines = list(complete_lines(file)) if file.exists() else []
    measured = [line for line in lines[1:] if "times" in line]
    return Outcome(row, lines[0], measured) if measured else None


def complete_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, without one that its writer could not finish."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def install(row: Row, wheels: str | None) -> list[str]:
    """Puts a side's wheels, without what they require, into a folder of its own, unless they are there."""
    if not row.requirements:
        return []
    folder = BENCH / "packages" / row.side
    if not (folder / "complete").exists():
        source = ["--no-index", "--find-links", wheels] if wheels else []
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *source]
        subprocess.run([*command, *row.requirements], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return [str(folder)]


def table(outcomes: Sequence[Outcome], config: Config) -> Iterator[str]:
    """Its lines: each row at its best batch, then how it was set and what it showed."""
    seq_len = config.train.seq_len
    flops = training_flops_per_token(config.model, seq_len)
    versions: dict[str, str] = {}
    for outcome in outcomes:
        versions |= outcome.about["versions"]
    yield f"{date.today()}, {outcomes[0].about['device']}, Python {platform.python_version()}"
    yield ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f"{Path(config.run.name).name}, sequences of {seq_len}, {flops / 1e9:.3f} GFLOPs a token\n"
    yield "| side | setting | sequences a step | ms a step (fastest to slowest) | tokens/s | MFU | peak GiB | Eva is |"
    yield "|---|---|---|---|---|---|---|---|"
    first = speed(outcomes[0], outcomes[0].best, seq_len)
    for outcome in outcomes:
        best = outcome.best
        tokens = speed(outcome, best, seq_len)
        times = [seconds * 1e3 for seconds in best["times"]]
        step = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        ratio = "" if outcome is outcomes[0] else f"{first / tokens:.2f}x as fast"
        numbers = f"{tokens:,.0f} | {mfu(tokens, flops)} | {best['peak_gib']:.1f} | {ratio}"
        yield f"| {outcome.row.side} | {outcome.row.name} | {best['batch']} | {step} | {numbers} |"
    yield ""
    expected = count_parameters(config.model).trained
    for outcome in outcomes:
        parameters = outcome.about["parameters"]
        same = "" if parameters == expected else f", not {expected:,} as they should be"
        at_batches = ", ".join(
            f"{batch['batch']}: {mfu(speed(outcome, batch, seq_len), flops)}" for batch in outcome.batches
        )
        losses = " ".join(f"{loss:.2f}" for loss in outcome.batches[0]["losses"])
        yield f"- {outcome.row.side}, {outcome.row.name}: {outcome.about['notes']}."
        yield f"  {parameters:,} parameters{same}; MFU by batch {at_batches}; first losses {losses}"


def speed(outcome: Outcome, batch: dict[str, Any], seq_len: int) -> float:
    """Tokens a second."""
    return float(batch["batch"] * seq_len / outcome.seconds(batch))


def mfu(tokens_per_s: float, flops_per_token: float) -> str:
    """Share of the dense bf16 peak of an H100 or H200, in percent."""
    return f"{tokens_per_s * flops_per_token / (PEAK_TFLOPS * 1e12):.1%}"


def write_profile(outcome: Outcome, files: Sequence[Path]) -> None:
    """Where a step's time goes, at the best batch, as a table or a picture."""
    best = outcome.best
    title = f"{outcome.row.side}, {outcome.row.name}: one step of {best['batch']} sequences, {date.today()}"
    for file in files:
        if file.suffix == ".svg":
            draw_profile(best["kernels"], outcome.seconds(best), title, file)
        else:
            file.write_text(f"{title}\n\n{profile_table(best['kernels'], outcome.seconds(best))}", encoding="utf-8")


if __name__ == "__main__":
    main()
