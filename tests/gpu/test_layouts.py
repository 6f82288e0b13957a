"""Layouts on several GPUs against one: the same losses and norms. With fewer GPUs than two, what gloo can do: two ranks
share one, but they cannot be a pipeline."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from support import WIDE, gpus_reach_one_another, read_metrics, start_processes, write_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# As many layers as DualPipeV has stages on four ranks.
DEEP = {**WIDE, "num_hidden_layers": 8}
ON_TWO = {
    "dp2": (),
    "ep2": ("parallel.ep=2",),
    "ep2 by nccl": ("parallel.ep=2", "parallel.copy_engines=false"),
    "ep2 overlapped": ("parallel.ep=2", "parallel.schedule=dualpipev"),
    "ep2 overlapped, by nccl": ("parallel.ep=2", "parallel.schedule=dualpipev", "parallel.copy_engines=false"),
    "cp2": ("parallel.cp=2",),
    "pp2 1f1b": ("parallel.pp=2",),
    "pp2 zbv": ("parallel.pp=2", "parallel.schedule=zbv"),
    "pp2 dualpipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "pp2 dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "pp2 dualpipev, computed again": (
        "parallel.pp=2", "parallel.schedule=dualpipev", 'parallel.recompute=["norms", "mla_up", "swiglu"]',
    ),
}  # fmt: skip
ON_FOUR = {
    "dp4": (),
    "ep4": ("parallel.ep=4",),
    "ep4, by nccl": ("parallel.ep=4", "parallel.copy_engines=false"),
    "dp2 ep2 overlapped": ("parallel.ep=2", "parallel.schedule=dualpipev"),
    "cp2 ep2": ("parallel.cp=2", "parallel.ep=2"),
    "pp2 ep2 dualpipev": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev"),
    "pp2 ep2 dualpipe": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    "pp2 cp2 1f1b": ("parallel.pp=2", "parallel.cp=2"),
    "pp4 1f1b": ("parallel.pp=4",),
    "pp4 dualpipev": ("parallel.pp=4", "parallel.schedule=dualpipev"),
}
ON_ONE = {name: overrides for name, overrides in ON_TWO.items() if "pp2" not in name}
"""For two ranks that share a GPU."""
LAYOUTS = {1: ON_ONE, 2: ON_TWO, 4: ON_FOUR}
# In bf16 a rate at which rounding does not send two runs to different places.
RATES = {"fp32": 1e-3, "bf16": 1e-4}
STEPS = 6
COMMON = (
    f"train.steps={STEPS}", "train.micro_batch_size=1", "checkpoint.every=0",
    'timeline.batch_size=[{ shape = "linear", start = 8, value = 16, until = 4000 }, { value = 16 }]',
)  # fmt: skip
LAUNCH_TIMEOUT_S = 240
Pending = dict[str, list[str]]
"""Runs to make, by name, with what each overrides."""


def is_for(num_gpus: int) -> bool:
    """Whether layouts of so many GPUs are for this machine: those that share one only where no others can be had."""
    number = torch.cuda.device_count()
    return number == 1 if num_gpus == 1 else number >= num_gpus


CASES = [
    pytest.param(
        num_gpus, dtype, name, id=f"{num_gpus}-{dtype}-{name}",
        marks=pytest.mark.skipif(not is_for(num_gpus), reason=f"{torch.cuda.device_count()} CUDA devices"),
    )
    for num_gpus, layouts in LAYOUTS.items() for dtype in RATES for name in layouts
]  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """The configuration of all, in whose folder they are, and of each that failed what was printed by the processes
    that it was the last of."""

    config: Path
    failures: dict[str, str]


def run_name(dtype: str, num_gpus: int, layout: str) -> str:
    return f"{dtype}-on-{num_gpus}-{layout.replace(' ', '-').replace(',', '')}"


def exact_name(dtype: str) -> str:
    """The run in fp32 that one in `dtype` is to follow."""
    return f"exact-for-{dtype}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What one GPU gives in fp32 and in bf16, and in fp32 at the rate of bf16."""
    config = write_run(tmp_path_factory.mktemp("layouts"), **DEEP)
    pending = {}
    for dtype in RATES:
        pending[dtype] = settings(dtype, dtype)
        pending[exact_name(dtype)] = [*settings(exact_name(dtype), dtype), "precision.dtype=fp32"]
    return Runs(config, train_in_turn(config, pending, processes=1))


@pytest.fixture(scope="module")
def runs_on(alone: Runs) -> Callable[[int], Runs]:
    """What the layouts of so many GPUs give; they run once."""
    # A fixture with parameters, of which a case has others too, would run them for each case.
    return cache(partial(spread, alone))


def spread(alone: Runs, num_gpus: int) -> Runs:
    pending = {
        run_name(dtype, num_gpus, name): [*settings(run_name(dtype, num_gpus, name), dtype), *overrides]
        for dtype in RATES
        for name, overrides in LAYOUTS[num_gpus].items()
    }
    failures = train_in_turn(alone.config, pending, processes=max(num_gpus, 2), share_gpu=num_gpus == 1)
    return Runs(alone.config, alone.failures | failures)


def settings(name: str, dtype: str) -> list[str]:
    """The overrides of a run."""
    return [f"run.name={name}", f"precision.dtype={dtype}", f"timeline.learning_rate={RATES[dtype]}", *COMMON]


def train_in_turn(config: Path, pending: Pending, *, processes: int, share_gpu: bool = False) -> dict[str, str]:
    """Runs all, in new processes after one that fails; returns of each that did what was printed."""
    failures = {}
    while pending:
        command = ["tests/train_in_turn.py", str(config), json.dumps(list(pending.values()))]
        launched = start_processes(command, processes=processes, share_gpu=share_gpu)
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


@pytest.mark.parametrize(("num_gpus", "dtype", "name"), CASES)
def test_same_as_one_gpu(runs_on: Callable[[int], Runs], num_gpus: int, dtype: str, name: str) -> None:
    runs, needed = runs_on(num_gpus), (run_name(dtype, num_gpus, name), dtype, exact_name(dtype))
    for run in needed:
        assert run not in runs.failures, runs.failures[run]
    ours, one, exact = (read_metrics(runs.config.parent / run) for run in needed)
    for key in ("loss", "lm_loss", "grad_norm"):
        gap = max(abs(a[key] / b[key] - 1) for a, b in zip(one, exact, strict=True))
        for mine, other in zip(ours, exact, strict=True):
            assert mine[key] == pytest.approx(other[key], rel=max(1e-5, 2 * gap)), (key, mine["step"])
    if any("parallel.ep" in override for override in LAYOUTS[num_gpus][name]):
        carriers = "collectives" if "nccl" in name or not gpus_reach_one_another() else "copy engines"
        assert f"rows to experts: {carriers}" in (runs.config.parent / needed[0] / "log.txt").read_text()
