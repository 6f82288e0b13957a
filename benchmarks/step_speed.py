"""Whole optimizer steps on one GPU: Eva beside torchtitan, Megatron-Core and transformers, on the same tokens.

    python benchmarks/step_speed.py --data runs/data                         # about 10 minutes on one H100
    python benchmarks/step_speed.py --data runs/data --only Eva transformers
    python benchmarks/step_speed.py --data runs/data --only Eva --eva "FP8 block" 'precision.fp8="block"' \\
        --profile step.svg step.md

All sides have the model of configs/dsv3_2b.toml, numbers of parameters are compared, and the hyperparameters of
peers/timing.py. A step is one forward and backward pass over all sequences of the batch and one update, with clipping.
Each row runs in a process of its own at growing batches until memory is full; the table shows the best. FLOPs of all
are 6 for each active parameter but the embedding and causal attention over half the sequence, without recomputation.

Peers come from their own wheels under .bench/, added to this environment, which must have Transformer Engine and
transformers. Without a network, put wheels of the requirements below into a folder and name it with --wheels.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
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


@dataclass(frozen=True)
class Row:
    """One line of the table: a side's script with its settings, or Eva with overrides of the configuration."""

    side: str
    name: str
    script: str
    requirements: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 2, 4, 8, 12, 16)


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
PEER_ROWS = (
    Row("torchtitan", "compiled", "torchtitan_side.py", TORCHTITAN, {"compiled": True}, batches=(4, 8)),
    Row("Megatron-Core", "bf16", "megatron_side.py", MEGATRON, BF16, batches=(2, 4, 8)),
    Row("Megatron-Core", "FP8 blockwise", "megatron_side.py", MEGATRON, BF16 | {"fp8": True}, batches=(2, 4, 8)),
    Row("transformers", "compiled layers", "transformers_side.py", settings={"compiled": True}, batches=(2, 4)),
    Row("transformers", "eager", "transformers_side.py", settings={"compiled": False}, batches=(2, 4, 8)),
)


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
    """Measures what is asked for and prints the table."""
    arguments = parse()
    config = load_config(Path(arguments.config), overrides(arguments.data))
    chosen = [row for row in rows(arguments.eva) if wanted(row, arguments.only)]
    outcomes = []
    for row in chosen:
        outcome = measure(row, arguments)
        if outcome is not None:
            outcomes.append(outcome)
    if not outcomes:
        raise SystemExit("nothing was measured")
    print_table(outcomes, config)
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
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--limit", type=float, default=900, help="seconds that a row may take")
    parser.add_argument("--wheels", help="a folder of wheels to install peers from, instead of the package index")
    parser.add_argument(
        "--profile", nargs="+", metavar="FILE", help=".svg or .md: the first row's step by kind of kernel"
    )
    return parser.parse_args()


def rows(eva: Sequence[Sequence[str]] | None) -> list[Row]:
    """Eva's rows, as asked for or bf16 alone, then all peers'."""
    asked = eva or [["bf16"]]
    ours = [Row("Eva", name, "eva_side.py", overrides=tuple(settings)) for name, *settings in asked]
    return [*ours, *PEER_ROWS]


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


def measure(row: Row, arguments: argparse.Namespace) -> Outcome | None:
    """Runs a row's script; None if it measured nothing."""
    print(f"{row.side}, {row.name}", file=sys.stderr, flush=True)
    out = BENCH / "step_speed" / f"{row.side}-{row.name}.jsonl".replace(" ", "-")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    request = {
        "config": arguments.config,
        "overrides": [*overrides(arguments.data), *row.overrides],
        "batches": arguments.batches or list(row.batches),
        "warm_up": arguments.warm_up,
        "steps": arguments.steps,
        "settings": row.settings,
        "out": str(out),
        "profiled": bool(arguments.profile),
    }
    command = [sys.executable, "-W", "ignore", str(PEERS / row.script), json.dumps(request)]
    paths = [str(ROOT), *install(row, arguments.wheels), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        subprocess.run(command, env=environment, stdout=sys.stderr, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        print(f"{row.side}, {row.name}: stopped after {arguments.limit:.0f} s", file=sys.stderr)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    measured = [line for line in lines[1:] if "times" in line]
    return Outcome(row, lines[0], measured) if measured else None


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


def print_table(outcomes: Sequence[Outcome], config: Config) -> None:
    """Each row at its best batch, then how it was set and what it showed."""
    seq_len = config.train.seq_len
    flops = training_flops_per_token(config.model, seq_len)
    versions: dict[str, str] = {}
    for outcome in outcomes:
        versions |= outcome.about["versions"]
    print(f"\n{date.today()}, {outcomes[0].about['device']}, Python {platform.python_version()}")
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    print(f"{Path(config.run.name).name}, sequences of {seq_len}, {flops / 1e9:.3f} GFLOPs a token\n")
    print("| side | setting | sequences a step | ms a step (fastest to slowest) | tokens/s | MFU | peak GiB | Eva is |")
    print("|---|---|---|---|---|---|---|---|")
    first = speed(outcomes[0], outcomes[0].best, seq_len)
    for outcome in outcomes:
        best = outcome.best
        tokens = speed(outcome, best, seq_len)
        times = [seconds * 1e3 for seconds in best["times"]]
        step = f"{median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        ratio = "" if outcome is outcomes[0] else f"{first / tokens:.2f}x as fast"
        numbers = f"{tokens:,.0f} | {mfu(tokens, flops)} | {best['peak_gib']:.1f} | {ratio}"
        print(f"| {outcome.row.side} | {outcome.row.name} | {best['batch']} | {step} | {numbers} |")
    print()
    expected = count_parameters(config.model).trained
    for outcome in outcomes:
        parameters = outcome.about["parameters"]
        same = "" if parameters == expected else f", not {expected:,} as they should be"
        at_batches = ", ".join(
            f"{batch['batch']}: {mfu(speed(outcome, batch, seq_len), flops)}" for batch in outcome.batches
        )
        losses = " ".join(f"{loss:.2f}" for loss in outcome.batches[0]["losses"])
        print(f"- {outcome.row.side}, {outcome.row.name}: {outcome.about['notes']}.")
        print(f"  {parameters:,} parameters{same}; MFU by batch {at_batches}; first losses {losses}")


def speed(outcome: Outcome, batch: dict[str, Any], seq_len: int) -> float:
    """Tokens a second."""
    return float(batch["batch"] * seq_len / outcome.seconds(batch))


def mfu(tokens_per_s: float, flops_per_token: float) -> str:
    """Share of an H100's dense bf16 peak, in percent."""
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
