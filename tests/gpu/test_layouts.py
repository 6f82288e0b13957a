"""Layouts over NCCL on two GPUs against one: the same losses and norms."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import WIDE, read_metrics, start_processes, write_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

DEEP = {**WIDE, "num_hidden_layers": 4}
LAYOUTS = {
    "dp2": (),
    "ep2": ("parallel.ep=2",),
    "ep2 overlapped": ("parallel.ep=2", "parallel.schedule=dualpipev"),
    "cp2": ("parallel.cp=2",),
    "pp2 1f1b": ("parallel.pp=2",),
    "pp2 zbv": ("parallel.pp=2", "parallel.schedule=zbv"),
    "pp2 dualpipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "pp2 dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "pp2 dualpipev, computed again": (
        "parallel.pp=2", "parallel.schedule=dualpipev", 'parallel.recompute=["norms", "mla_up", "swiglu"]',
    ),
}  # fmt: skip
# In bf16 a rate at which rounding does not send two runs to different places.
RATES = {"fp32": 1e-3, "bf16": 1e-4}
STEPS = 6
COMMON = (f"train.steps={STEPS}", "train.micro_batch_size=1", "checkpoint.every=0")
LAUNCH_TIMEOUT_S = 240


@dataclass(frozen=True)
class Runs:
    """The folder of all runs, and of each that failed what was printed by the processes that it was the last of."""

    folder: Path
    failures: dict[str, str]


def run_name(dtype: str, layout: str) -> str:
    return f"{dtype}-{layout.replace(' ', '-').replace(',', '')}"


def exact_name(dtype: str) -> str:
    """The run in fp32 that one in `dtype` is to follow."""
    return f"exact-for-{dtype}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All layouts, in fp32 and in bf16, and what one GPU gives, at either rate in fp32 too."""
    config = write_run(tmp_path_factory.mktemp("layouts"), **DEEP)

    alone, spread = {}, {}
    for dtype, rate in RATES.items():
        settings = [*COMMON, f"timeline.learning_rate={rate}"]
        for name, precision in ((dtype, dtype), (exact_name(dtype), "fp32")):
            alone[name] = [f"run.name={name}", f"precision.dtype={precision}", *settings]
        for layout, overrides in LAYOUTS.items():
            name = run_name(dtype, layout)
            spread[name] = [f"run.name={name}", f"precision.dtype={dtype}", *settings, *overrides]
    failures = train_in_turn(config, alone, processes=1) | train_in_turn(config, spread, processes=2)
    return Runs(config.parent, failures)


def train_in_turn(config: Path, pending: dict[str, list[str]], *, processes: int) -> dict[str, str]:
    """Runs all, in new processes after one that fails; returns of each that did what was printed."""
    failures = {}
    while pending:
        launched = start_processes(
            ["tests/train_in_turn.py", str(config), json.dumps(list(pending.values()))], processes=processes
        )
        try:
            output, _ = launched.communicate(timeout=LAUNCH_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            launched.terminate()
            output, _ = launched.communicate(timeout=60)
            output += f"\nnot done within {LAUNCH_TIMEOUT_S} s"
        left = {name: run for name, run in pending.items() if not is_complete(config.parent / name)}
        if left:
            failed = next(iter(left))
            failures[failed] = output
            left.pop(failed)
        pending = left
    return failures


def is_complete(run: Path) -> bool:
    return (run / "metrics.jsonl").is_file() and len(read_metrics(run)) == STEPS


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", RATES)
def test_same_as_one_gpu(runs: Runs, name: str, dtype: str) -> None:
    needed = run_name(dtype, name), dtype, exact_name(dtype)
    for run in needed:
        assert run not in runs.failures, runs.failures[run]
    ours, one, exact = (read_metrics(runs.folder / run) for run in needed)
    for key in ("loss", "lm_loss", "grad_norm"):
        gap = max(abs(a[key] / b[key] - 1) for a, b in zip(one, exact, strict=True))
        for mine, other in zip(ours, exact, strict=True):
            assert mine[key] == pytest.approx(other[key], rel=max(1e-5, 2 * gap)), (key, mine["step"])
