"""How fast ready batches come: Eva's loader beside litdata and mosaicml-streaming, on the same tokens in one run.

    python benchmarks/loader_speed.py                  # about 20 minutes
    python benchmarks/loader_speed.py --rounds 1 --seconds 1

Each library runs in its own virtual environment under .bench/, made on demand, and reads its own format, shuffled, with
one consumer that takes batches [batch, seq_len + 1]: once in uint16, as all of them store and yield tokens, and once
widened to int64 by the consumer. Rounds are interleaved; the table gives medians. Each is shown at the best of its
numbers of workers: processes of the others, a thread of Eva's, none being the consumer itself.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import product, zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / ".bench"
LOADERS = ROOT / "benchmarks" / "loaders"
SHAPES = ((2048, 32), (4096, 64))
DTYPES = ("uint16", "int64")
NUM_TOKENS = 64_000_000


@dataclass(frozen=True)
class Side:
    """One library: the script that uses it, its environment (None: this one), and how it is run.

    `rows` are its lines of the table, with what the script is told for each; every row is measured with each number of
    `workers` in uint16, the first also in int64. Where `per_seq_len`, the data must be written for one sequence length.
    """

    name: str
    script: str
    environment: str | None
    requirements: tuple[str, ...]
    rows: dict[str, dict[str, Any]]
    workers: tuple[int, ...]
    per_seq_len: bool


TORCH = "torch==2.13.0"
SIDES = (
    Side(
        name="Eva",
        script="eva_loader.py",
        environment=None,
        requirements=(),
        rows={
            "shuffled documents, packed": {"fim_rate": 0.0, "masks": False},
            "the same with FIM 0.1": {"fim_rate": 0.1, "masks": False},
            "the same with FIM 0.1 and document masks": {"fim_rate": 0.1, "masks": True},
        },
        workers=(0, 1),
        per_seq_len=False,
    ),
    Side(
        name="litdata 0.2.76",
        script="litdata_loader.py",
        environment="litdata",
        requirements=(TORCH, "litdata==0.2.76"),
        rows={"shuffled blocks": {}},
        workers=(0, 1, 2),
        per_seq_len=True,
    ),
    Side(
        name="mosaicml-streaming 0.13.0",
        script="streaming_loader.py",
        environment="mosaic",
        requirements=(TORCH, "mosaicml-streaming==0.13.0"),
        rows={"shuffled samples": {}},
        workers=(0, 1, 2),
        per_seq_len=True,
    ),
)
Case = tuple[str, str, str, int, tuple[int, int]]
Speeds = dict[Case, list[float]]


def main() -> None:
    """Prepares what is missing, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long one number is measured (default 3)")
    arguments = parser.parse_args()
    work = BENCH / "loader_speed"
    make_tokens(work)
    for side in SIDES:
        make_environment(side)
        for seq_len in sorted({seq_len for seq_len, _ in SHAPES}):
            prepare(side, work, seq_len)
    print_table(measure(work, arguments.rounds, arguments.seconds))


def make_tokens(work: Path) -> None:
    """Random tokens in documents whose lengths are spread like those of web text: median 600, mean about 1200."""
    if (work / "ends.npy").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lengths = np.maximum(2, generator.lognormal(6.4, 1.2, NUM_TOKENS // 1000).astype(np.int64))
    ends = np.cumsum(lengths)
    ends = ends[: np.searchsorted(ends, NUM_TOKENS) + 1]
    tokens = generator.integers(4, 1 << 15, int(ends[-1])).astype(np.uint16)
    tokens[ends - 1] = 0
    np.save(work / "tokens.npy", tokens)
    np.save(work / "ends.npy", ends)


def python_of(side: Side) -> str:
    """The interpreter that has the library."""
    return sys.executable if side.environment is None else str(BENCH / side.environment / "bin" / "python")


def make_environment(side: Side) -> None:
    """Makes the virtual environment of a side, unless it is there."""
    if side.environment is None or (BENCH / side.environment / "complete").exists():
        return
    folder = BENCH / side.environment
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    subprocess.run([python_of(side), "-m", "pip", "install", "--quiet", *side.requirements], check=True)
    (folder / "complete").touch()


def folder_of(side: Side, work: Path, seq_len: int) -> Path:
    """Where a side's data lie."""
    return work / (f"{side.environment}-{seq_len}" if side.per_seq_len else "eva")


def prepare(side: Side, work: Path, seq_len: int) -> None:
    """Writes the tokens in a side's format, unless they are there."""
    folder = folder_of(side, work, seq_len)
    if folder.with_suffix(".complete").exists():
        return
    folder.mkdir(exist_ok=True)
    run(side, {"do": "prepare", "source": str(work), "folder": str(folder), "seq_len": seq_len})
    folder.with_suffix(".complete").touch()


def measure(work: Path, rounds: int, seconds: float) -> Speeds:
    """Tokens a second by library, row, workers and shape; one number of each in every round."""
    speeds: Speeds = {}
    for number in range(rounds):
        for side, row, dtype, workers, (seq_len, batch_size) in cases():
            case = f"{side.name}, {row}, {dtype}, {workers} workers, {batch_size} x {seq_len}"
            print(f"round {number + 1}/{rounds}: {case}", file=sys.stderr)
            request = side.rows[row] | {"do": "measure", "folder": str(folder_of(side, work, seq_len)), "dtype": dtype}
            request |= {"workers": workers, "seq_len": seq_len, "batch_size": batch_size, "seconds": seconds}
            speed = float(run(side, request).split()[-1])
            speeds.setdefault((side.name, row, dtype, workers, (seq_len, batch_size)), []).append(speed)
    return speeds


def rows_in(side: Side, dtype: str) -> list[str]:
    """The rows that are measured with tokens of a type."""
    return list(side.rows)[: 1 if dtype == "int64" else None]


def cases() -> Iterator[tuple[Side, str, str, int, tuple[int, int]]]:
    """All that is measured in a round; libraries take turns."""
    for shape, dtype in product(SHAPES, DTYPES):
        lists = [
            [(side, row, dtype, workers, shape) for row in rows_in(side, dtype) for workers in side.workers]
            for side in SIDES
        ]
        yield from (case for turn in zip_longest(*lists) for case in turn if case)


def run(side: Side, request: dict[str, Any]) -> str:
    """Runs a side's script and returns what it printed."""
    # More than one thread of torch's makes the others up to seven times slower on busy cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT) if side.environment is None else ""}
    command = [python_of(side), "-W", "ignore", str(LOADERS / side.script), json.dumps(request)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def print_table(speeds: Speeds) -> None:
    """Medians, each at the best number of workers, and how many times faster Eva's plain batches come."""
    print(
        f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {TORCH}\n"
    )
    print("| batch | tokens | loader | batches of | workers | million tokens/s (slowest to fastest) | Eva's first is |")
    print("|---|---|---|---|---|---|---|")
    for shape, dtype in product(SHAPES, DTYPES):
        first = None
        for side in SIDES:
            for row in rows_in(side, dtype):
                measured = {workers: speeds[side.name, row, dtype, workers, shape] for workers in side.workers}
                best = max(measured, key=lambda workers: median(measured[workers]))
                values = sorted(value / 1e6 for value in measured[best])
                first = first or median(values)
                speed = f"{median(values):.0f} ({values[0]:.0f} to {values[-1]:.0f})"
                numbers = f"{speed} | {first / median(values):.1f}x as fast"
                print(f"| {shape[1]} x {shape[0]} | {dtype} | {side.name} | {row} | {best} | {numbers} |")


if __name__ == "__main__":
    main()
