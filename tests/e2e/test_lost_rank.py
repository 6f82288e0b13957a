"""A training that loses a rank in mid-run: the other names it and ends within 30 s, with torchrun above them or not."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from support import PROJECT, read_metrics, start_training, write_run

from parallel.heartbeat import LOST_RANK_STATUS

WITHIN_S = 30.0


def start_rank(config: Path, rank: int, port: int) -> subprocess.Popen[str]:
    """One of two ranks with nobody above them, who would end the other."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
    environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pretrain",
            "train",
            str(config),
            "--set",
            "train.steps=100000",
            "--set",
            "run.name=two",
        ],
        cwd=PROJECT,
        env={**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(run: Path, processes: list[subprocess.Popen[str]]) -> None:
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 6:
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def test_the_other_rank_names_the_lost_one(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start_rank(config, rank, port) for rank in range(2)]
    torchrun = start_training(config, "train.steps=100000", "run.name=torchrun", processes=2)
    workers: list[psutil.Process] = []
    try:
        wait_for_steps(tmp_path / "two", ranks)
        wait_for_steps(tmp_path / "torchrun", [torchrun])
        workers = [worker(torchrun, rank) for rank in range(2)]
        ranks[1].kill()
        workers[1].kill()
        deadline = time.monotonic() + WITHIN_S
        alone, _ = ranks[0].communicate(timeout=deadline - time.monotonic())
        below, _ = torchrun.communicate(timeout=deadline - time.monotonic())
    finally:
        for process in (*ranks, torchrun, *workers):
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()
    assert ranks[0].returncode == LOST_RANK_STATUS, alone
    assert torchrun.returncode == 1, below
    for output, pid in ((alone, ranks[1].pid), (below, workers[1].pid)):
        assert f"pretrain: rank 0: rank 1 (pid {pid} on " in output
        assert "the same command resumes it from its newest checkpoint" in output
