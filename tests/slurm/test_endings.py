"""What slurm/train.sbatch does for each way in which ranks end. In the place of a training, ranks run a few lines of
bash that end at once."""

import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from support import PROJECT, write_run

ENVIRONMENT = """
PYTHON={python}
MAX_RETRIES=1
CONTAINER=(bash "{folder}/rank.sh")
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of the run that `submit` submits."""
    write_run(tmp_path)
    (tmp_path / "environment.sh").write_text(ENVIRONMENT.format(python=sys.executable, folder=tmp_path))
    return tmp_path / "small"


def submit(cluster: SlurmCluster, run: Path, ranks: str, *options: str) -> str:
    """Submits a job whose ranks are this text in bash, in which $RUN is the run's folder; returns its id."""
    (run.parent / "rank.sh").write_text(f"RUN={run}\n{ranks}\n")
    cluster.environment["EVA_ENVIRONMENT"] = str(run.parent / "environment.sh")
    words = cluster.run(str(PROJECT / "slurm" / "submit.sh"), str(run.parent / "run.toml"), *options)
    return words.splitlines()[0].removeprefix("job ")


def log(run: Path, job: str) -> str:
    """What the job wrote, without its ranks."""
    return (run / "slurm" / f"{job}.log").read_text()


def test_a_stop_by_the_guards_is_not_requeued(cluster: SlurmCluster, run: Path) -> None:
    job = submit(cluster, run, "echo 'pretrain: because of $RANK'; exit 78", "--nodes=2")
    ended = cluster.wait(job, "FAILED", "COMPLETED")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "78:0")
    assert "stopped by a guard, which says why; not requeued" in log(run, job)
    assert log(run, job).count("pretrain: because of $RANK\n") == 1


def test_lost_ranks_are_requeued_while_there_is_progress(cluster: SlurmCluster, run: Path) -> None:
    ranks = """
    mkdir -p "$RUN/checkpoints/step-0000000$((${SLURM_RESTART_COUNT:-0} > 0))"
    ((SLURM_PROCID)) && exit 76
    kill -KILL $$
    """
    job = submit(cluster, run, ranks, "--ntasks-per-node=2")
    ended = cluster.wait(job, "FAILED", "COMPLETED")
    # The second life leaves a new checkpoint, the third does not.
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "2", "137:0"), log(run, job)
    assert "status 137; not requeued, 1 times in a row since checkpoint step-00000001" in log(run, job)


def test_nodes_that_fail_the_health_check_are_left_out(cluster: SlurmCluster, run: Path) -> None:
    ranks = """
    [[ $SLURMD_NODENAME == n2 ]] && exit 0
    echo "$SLURMD_NODENAME.example.org" >> "$RUN/unhealthy_hosts"
    exit 77
    """
    job = submit(cluster, run, ranks)
    ended = cluster.wait(job, "FAILED", "COMPLETED")
    assert (ended["JobState"], ended["NodeList"], ended["ExcNodeList"]) == ("COMPLETED", "n2", "n1"), log(run, job)
    assert "nodes failed the health check: n1; requeued" in log(run, job)
    assert not (run / "unhealthy_hosts").exists()
    assert (run / "slurm" / f"{job}.0" / "unhealthy_hosts").read_text() == "n1.example.org\n"


def test_cancelled_jobs_stay_cancelled(cluster: SlurmCluster, run: Path) -> None:
    waits = "trap 'exit 75' TERM; touch \"$RUN/ready\"; while true; do sleep 0.1; done"
    jobs = []
    for cancel in ([], ["--signal=TERM"]):
        job = submit(cluster, run, waits, "--array=3")
        jobs.append(job)
        while not (run / "ready").exists():
            time.sleep(0.1)
        (run / "ready").unlink()
        if cancel:
            cluster.run("scontrol", "update", f"JobId={job}_3", "Requeue=0")
        cluster.run("scancel", *cancel, job)
        ended = cluster.wait(f"{job}_3", "CANCELLED", "FAILED", "COMPLETED", "PENDING")
        assert (ended["JobState"], ended["Restarts"]) == ("FAILED" if cancel else "CANCELLED", "0")
    assert "stopped early, with a checkpoint; not requeued, the job is COMPLETING" in log(run, f"{jobs[0]}_3")
    assert "stopped early, with a checkpoint; not requeued, the job is RUNNING" in log(run, f"{jobs[1]}_3")


def test_chain_goes_on_whatever_happened(cluster: SlurmCluster, run: Path) -> None:
    first, second = submit(cluster, run, 'echo x >> "$RUN/ends"; exit 78', "--chain=2").split()
    assert cluster.wait(first, "FAILED")["ExitCode"] == "78:0"
    cluster.wait(second, "FAILED")
    assert (run / "ends").read_text() == "x\nx\n"
