"""Trainings under a real Slurm are interrupted in each way there is, go on by themselves, and lose nothing."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster
from support import PROJECT, finish, read_metrics, start_training, write_run

STEPS = 40
VALUES = ("step", "tokens", "loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "data_position")
ENVIRONMENT = """
PYTHON={python}
CONTAINER=({python} {tests}/slow_training.py)
export OMP_NUM_THREADS=1
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of forty steps with a batch that grows, in `tmp_path`, and an environment file beside it."""
    path = write_run(tmp_path)
    path.write_text(path.read_text().replace("steps = 12", f"steps = {STEPS}"))
    environment = ENVIRONMENT.format(python=sys.executable, tests=PROJECT / "tests")
    (tmp_path / "environment.sh").write_text(environment)
    return path


def submit(cluster: SlurmCluster, config: Path, *options: str, settings: Sequence[str] = ()) -> tuple[str, Path]:
    """Submits with `slurm/submit.sh`; returns the job and the run's folder."""
    cluster.environment["EVA_ENVIRONMENT"] = str(config.parent / "environment.sh")
    words = [word for setting in settings for word in ("--set", setting)]
    job, run = cluster.run(str(PROJECT / "slurm" / "submit.sh"), str(config), *options, "--", *words).splitlines()
    return job.removeprefix("job "), Path(run.removeprefix("run "))


def wait_for_steps(cluster: SlurmCluster, job: str, run: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < count:
        assert time.monotonic() < deadline, logs(run)
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), logs(run)
        time.sleep(0.2)


def logs(run: Path) -> str:
    """All that the run's jobs and ranks wrote."""
    return "\n".join(f"{path}:\n{path.read_text()}" for path in sorted((run / "slurm").rglob("*.log")))


def values(run: Path) -> list[list[Any]]:
    return [[line[key] for key in VALUES] for line in read_metrics(run)]


def world_sizes(run: Path) -> set[int]:
    return {line["world_size"] for line in read_metrics(run)}


def test_two_nodes_stopped_by_a_signal(cluster: SlurmCluster, config: Path) -> None:
    job, run = submit(cluster, config, "--nodes=2", settings=["run.name=a run of 100%"])
    assert run == config.parent / "a run of 100%"
    wait_for_steps(cluster, job, run, 3)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait(job, "PENDING", "COMPLETED")
    finish(start_training(config, "run.name=unbroken", processes=2))
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    assert ended["JobState"] == "COMPLETED", logs(run)
    assert ended["Restarts"] == "1"
    assert "stopped early, with a checkpoint; requeued" in logs(run)
    for life in range(2):
        assert sorted(path.name for path in (run / "slurm" / f"{job}.{life}").iterdir()) == [
            "rank-00000.log",
            "rank-00001.log",
        ]
    assert "resumed after step" in (run / "slurm" / f"{job}.1" / "rank-00000.log").read_text()
    assert world_sizes(run) == {2}
    assert values(run) == values(config.parent / "unbroken")


def test_two_seeds_stopped_by_the_time_limit(cluster: SlurmCluster, config: Path) -> None:
    job, folder = submit(cluster, config, "--array=1-2", "--time=1", "--signal=TERM@10")
    for seed in (1, 2):
        finish(start_training(config, f"run.name=unbroken-{seed}", f"run.seed={seed}"))
    for seed in (1, 2):
        ended = cluster.wait(f"{job}_{seed}", "COMPLETED", "FAILED", "TIMEOUT")
        assert ended["JobState"] == "COMPLETED", logs(folder)
        said = (folder / "slurm" / f"{job}_{seed}.log").read_text()
        assert "stopped early, with a checkpoint; requeued" in said
        assert values(folder / f"seed-{seed}") == values(config.parent / f"unbroken-{seed}")
    assert values(folder / "seed-1") != values(folder / "seed-2")


def test_dead_node(cluster: SlurmCluster, config: Path) -> None:
    job, run = submit(cluster, config, "--nodes=1-2")
    wait_for_steps(cluster, job, run, 7)
    cluster.kill_node("n1")
    try:
        finish(start_training(config, "run.name=unbroken"))
        ended = cluster.wait(job, "COMPLETED", "FAILED", "NODE_FAIL")
        assert ended["JobState"] == "COMPLETED", logs(run)
        assert ended["NodeList"] == "n2"
    finally:
        cluster.start_node("n1")
    # The steps since the last save are computed again, on one rank.
    assert [line["world_size"] for line in read_metrics(run)] == [2] * 5 + [1] * (STEPS - 5)
    for found, expected in zip(values(run), values(config.parent / "unbroken"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_mistake_in_the_data(cluster: SlurmCluster, config: Path) -> None:
    job, run = submit(cluster, config, "--ntasks-per-node=2", settings=["data.datasets=[{ path = 'nowhere' }]"])
    ended = cluster.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), logs(run)
    said = (run / "slurm" / f"{job}.log").read_text()
    (message,) = [line for line in said.splitlines() if line.startswith("pretrain: ")]
    assert "nowhere" in message
    assert "a mistake in the configuration, the data or the arguments; not requeued" in said
