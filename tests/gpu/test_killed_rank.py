"""A rank that is killed under NCCL: the other names it and stops, torchrun starts both again, and the run goes on bit
for bit. With fewer GPUs than two, what gloo can do."""

import math
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from support import WIDE, gpus_reach_one_another, read_events, read_metrics, start_training, write_run

from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHARE_GPU = torch.cuda.device_count() < 2
ON_TWO = {
    "dp2": (),
    "ep2-overlapped": ("parallel.ep=2", "parallel.schedule=dualpipev"),
    "ep2-by-nccl": ("parallel.ep=2", "parallel.schedule=dualpipev", "parallel.copy_engines=false"),
    "pp2-dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
}
LAYOUTS = {name: overrides for name, overrides in ON_TWO.items() if not SHARE_GPU or "pp2" not in name}
STEPS = 30
COMMON = ("precision.dtype=bf16", "run.deterministic=true", "train.micro_batch_size=1", f"train.steps={STEPS}")
RESTARTS = ("--max-restarts", "1")
# `guards.lost_after`, its rounds, and stacks that are written down; then importing, joining and loading.
WITHIN_S, START_S = 30.0, 60.0


@dataclass
class Broken:
    """A run whose rank 1 is killed once it has a checkpoint: the processes of its ranks, the moment of the kill, and
    after how many seconds rank 0 had ended."""

    launcher: "Popen[str]"
    folder: Path
    pids: tuple[int, int] = (0, 0)
    killed: float = 0.0
    ended_after: float = math.inf
    output: str = ""

    def look(self) -> bool:
        """Does what is due; False when nothing is left to wait for."""
        if self.launcher.poll() is not None:
            return False
        if not self.killed and step_folder(self.folder, 5).is_dir():
            self.pids = worker(self.launcher.pid, 0), worker(self.launcher.pid, 1)
            self.killed = time.time()
            os.kill(self.pids[1], signal.SIGKILL)
        elif self.killed and not Path(f"/proc/{self.pids[0]}").exists():
            self.ended_after = time.time() - self.killed
            return False
        return True


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Broken]]:
    """All layouts at once, as each start takes longer than its steps."""
    folder = tmp_path_factory.mktemp("two")
    config = write_run(folder, **{**WIDE, "num_hidden_layers": 4})

    def start(kind: str, name: str, options: tuple[str, ...] = ()) -> "Popen[str]":
        settings = (f"run.name={kind}-{name}", *COMMON, *LAYOUTS[name])
        return start_training(config, *settings, processes=2, launcher_options=options, share_gpu=SHARE_GPU)

    straight = [start("straight", name) for name in LAYOUTS]
    broken = {name: Broken(start("broken", name, RESTARTS), folder / f"broken-{name}") for name in LAYOUTS}
    launchers = [*straight, *(run.launcher for run in broken.values())]
    try:
        waiting = list(broken.values())
        while waiting:
            waiting = [run for run in waiting if run.look()]
            time.sleep(0.005)
        for run in broken.values():
            run.output, _ = run.launcher.communicate(timeout=180)
        for launcher in straight:
            output, _ = launcher.communicate(timeout=60)
            assert launcher.returncode == 0, output
        yield broken
    finally:
        for launcher in launchers:
            launcher.terminate()


@pytest.mark.parametrize("name", LAYOUTS)
def test_goes_on_bit_for_bit_after_a_killed_rank(runs: dict[str, Broken], name: str) -> None:
    run = runs[name]
    assert run.launcher.returncode == 0, run.output
    assert re.search(rf"pretrain: rank 0: rank 1 \(pid {run.pids[1]} on ", run.output), run.output
    assert run.output.count("resumed after step") == 1, run.output
    resumed = next(event for event in read_events(run.folder) if event["kind"] == "resume")
    restarted = resumed["time"] - run.killed
    print(f"{name}: rank 0 ended {run.ended_after:.1f} s after the kill, and went on after {restarted:.1f} s")
    assert run.ended_after < WITHIN_S
    assert restarted < WITHIN_S + START_S
    if "ep2" in name:
        carriers = "collectives" if "nccl" in name or not gpus_reach_one_another() else "copy engines"
        assert f"rows to experts: {carriers}" in (run.folder / "log.txt").read_text()
    check_equal(run.folder.with_name(f"straight-{name}"), run.folder)


def worker(launcher: int, rank: int) -> int:
    """The process of a rank, a child of the launcher."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = stat.with_name("environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(stat.parent.name)
    raise AssertionError(f"process {launcher} has no rank {rank}")


def check_equal(one: Path, other: Path) -> None:
    """The same metrics of all steps, the same bits in the last checkpoint."""
    keys = ("step", "tokens", "loss", "lm_loss", "grad_norm", "data_position")
    expected, found = ([[line[key] for key in keys] for line in read_metrics(run)] for run in (one, other))
    assert found == expected
    straight, broken = (CheckpointReader(step_folder(run, STEPS)) for run in (one, other))
    for kind in ("param", "exp_avg", "exp_avg_sq", "buffer", "rng"):
        assert straight.keys(kind)
        for name in straight.keys(kind):
            assert torch.equal(straight.tensor(f"{kind}/{name}"), broken.tensor(f"{kind}/{name}")), name
