"""Real processes with planted faults: how each ends, what it says, and what it leaves behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PROJECT, read_metrics, write_run

from parallel.heartbeat import LOST_RANK_STATUS
from pretrain.errors import STOPPED_BY_GUARD, UNHEALTHY_HOSTS

WITHIN_S = 60.0
# Runs the command line on rank 1 after a line that breaks something there.
SABOTEUR = """
import os, sys, time
import torch
import parallel.health, pretrain.guarding
from pretrain.__main__ import exit_now, main

train_step, steps = pretrain.guarding.train_step, []

def step(*arguments, **named):
    steps.append(0)
    at_step(len(steps))
    return train_step(*arguments, **named)

def at_step(number):
    pass

def wait_for_data_that_never_comes():
    time.sleep(1000)

if os.environ["RANK"] == "1":
    {line}
pretrain.guarding.train_step = step
exit_now(main(sys.argv[1:]))
"""


class Pair:
    """Two ranks of one run with nobody above them."""

    def __init__(self, folder: Path, line: str, *overrides: str) -> None:
        config, script = write_run(folder), folder / "saboteur.py"
        script.write_text(SABOTEUR.format(line=line))
        self.run = folder / "small"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(script), "train", str(config)]
        for override in ("train.steps=100000", *overrides):
            command += ["--set", override]
        self.ranks = [
            subprocess.Popen(
                command,
                cwd=PROJECT,
                env=self._environment(rank, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]

    @staticmethod
    def _environment(rank: int, port: int) -> dict[str, str]:
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
        environment.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        return {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(PROJECT)}

    def wait(self, expect: int, ranks: tuple[int, ...] = (0, 1)) -> list[str]:
        """What ranks said that must end with this status."""
        deadline, said = time.monotonic() + WITHIN_S, []
        for rank in ranks:
            output, _ = self.ranks[rank].communicate(timeout=max(deadline - time.monotonic(), 1))
            assert self.ranks[rank].returncode == expect, output
            said.append(output)
        return said

    def wait_for_steps(self, count: int) -> None:
        while not (self.run / "metrics.jsonl").is_file() or len(read_metrics(self.run)) < count:
            for rank in self.ranks:
                assert rank.poll() is None, rank.communicate()[0]
            time.sleep(0.05)


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    started: list[Pair] = []
    yield started
    for pair in started:
        for process in pair.ranks:
            process.kill()
            process.wait()


def test_a_hang_ends_all_ranks_with_their_stacks(tmp_path: Path, pairs: list[Pair]) -> None:
    hang = "at_step = lambda number: wait_for_data_that_never_comes() if number == 4 else None"
    pairs.append(Pair(tmp_path, hang, "guards.timeout=4"))
    said = pairs[0].wait(LOST_RANK_STATUS)
    for rank, output in enumerate(said):
        assert f"pretrain: rank {rank}: no progress for 4 s (guards.timeout); what its threads did is in " in output
        assert "the same command resumes from the newest checkpoint" in output
    stacks = [(pairs[0].run / "log" / f"stacks-0000{rank}.txt").read_text() for rank in range(2)]
    assert "wait_for_data_that_never_comes" in stacks[1]
    assert "wait_for_data_that_never_comes" not in stacks[0]
    assert "all_reduce" in stacks[0]
    assert len(read_metrics(pairs[0].run)) == 3


def test_a_stopped_rank_is_named_and_the_stacks_of_the_other_written(tmp_path: Path, pairs: list[Pair]) -> None:
    pairs.append(Pair(tmp_path, "pass", "guards.lost_after=5"))
    pairs[0].wait_for_steps(4)
    pairs[0].ranks[1].send_signal(signal.SIGSTOP)
    (output,) = pairs[0].wait(LOST_RANK_STATUS, ranks=(0,))
    assert f"pretrain: rank 0: rank 1 (pid {pairs[0].ranks[1].pid} on " in output
    assert ") has not answered for 5 s; the run cannot go on" in output
    # In which of a step's collectives it waits depends on the moment; that it is inside the loop does not.
    assert "pretrain/loop.py" in (pairs[0].run / "log" / "stacks-00000.txt").read_text()


def test_a_machine_that_computes_wrongly_is_named_before_the_first_step(tmp_path: Path, pairs: list[Pair]) -> None:
    wrong = "parallel.health.is_exact = lambda *_: False; parallel.health.socket.gethostname = lambda: 'node-bad'"
    pairs.append(Pair(tmp_path, wrong))
    said = pairs[0].wait(UNHEALTHY_HOSTS)
    assert "rank 1 on node-bad: products of whole numbers come out wrong" in said[0]
    assert "guards.check_health = false" in said[0]
    assert said[1] == ""
    assert (pairs[0].run / "unhealthy_hosts").read_text() == "node-bad\n"
    assert not (pairs[0].run / "metrics.jsonl").exists()


def test_too_many_nans_end_the_run_with_a_report(tmp_path: Path, pairs: list[Pair]) -> None:
    pairs.append(Pair(tmp_path, "pass", "guards.max_skipped_in_a_row=2", "timeline.learning_rate=1e30"))
    said = pairs[0].wait(STOPPED_BY_GUARD)
    assert "pretrain: 2 steps in a row were not finite (guards.max_skipped_in_a_row = 2)" in said[0]
    assert "pretrain:" not in said[1]


def test_too_little_room_and_unlike_configurations_are_mistakes(tmp_path: Path, pairs: list[Pair]) -> None:
    pairs.append(Pair(tmp_path, "pretrain.guarding._free_bytes = lambda folder: 0"))
    said = pairs[0].wait(UNHEALTHY_HOSTS)
    assert "rank 1 on " in said[0]
    assert "too little free space for a checkpoint" in said[0]
    other = tmp_path / "other"
    other.mkdir()
    pairs.append(Pair(other, "sys.argv += ['--set', 'train.steps=99']"))
    said = pairs[1].wait(2)
    assert "ranks 0, 1 have another configuration than the rest; start all of them with the same file" in said[0]
