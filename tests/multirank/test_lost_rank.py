"""A rank that is killed or frozen in mid-step is named by all others, which end by themselves, whatever they do."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from parallel.heartbeat import LOST_RANK_STATUS, LostRankError, Pace, end_process, watch_ranks
from parallel.launch import Place

NUM_RANKS = 4
PACE = Pace(interval=0.2, limit=2.0)
# `limit`, at most ten rounds until all have read of it, and a slow machine.
WITHIN_S = 15.0
UNWATCHED_S = 4.0


def reduce_all(_rank: int, _number: int) -> None:
    dist.all_reduce(torch.ones(64))


def exchange_all(_rank: int, _number: int) -> None:
    sent = torch.ones(NUM_RANKS * 8)
    dist.all_to_all_single(torch.empty_like(sent), sent)


def send_along(rank: int, _number: int) -> None:
    """A pipeline: each rank waits for its neighbours only."""
    if rank > 0:
        dist.recv(torch.empty(64), rank - 1)
    if rank < NUM_RANKS - 1:
        dist.send(torch.ones(64), rank + 1)
        dist.recv(torch.empty(64), rank + 1)
    if rank > 0:
        dist.send(torch.ones(64), rank - 1)


def compute(_rank: int, _number: int) -> None:
    """No communication at all."""
    time.sleep(0.01)


class Ranks:
    """Forked processes in a loop of steps, each with a file for what it prints and for its steps."""

    def __init__(
        self, folder: Path, step: Callable[[int, int], None], *, watched: bool = True, steps: int = 10**9
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.outputs = [folder / f"rank{rank}" for rank in range(NUM_RANKS)]
        self.processes = [
            context.Process(target=rank_main, args=(rank, port, output, step, watched, steps))
            for rank, output in enumerate(self.outputs)
        ]
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + 30
        while not all(output.exists() and "step 3" in output.read_text() for output in self.outputs):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def statuses(self, *, without: int | None = None, within: float) -> list[int | None]:
        """The exit statuses after at most so many seconds, None of those that still run."""
        deadline = time.monotonic() + within
        others = [process for rank, process in enumerate(self.processes) if rank != without]
        for process in others:
            process.join(max(deadline - time.monotonic(), 0))
        return [process.exitcode for process in others]

    def said(self) -> list[str]:
        return [output.read_text() for output in self.outputs]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def rank_main(rank: int, port: int, output: Path, step: Callable[[int, int], None], watched: bool, steps: int) -> None:
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = sys.stderr = os.fdopen(file, "w", buffering=1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS)
    place = Place(rank, NUM_RANKS, rank, torch.device("cpu"))
    status = 0
    try:
        with watch_ranks(place, PACE) if watched else nullcontext():
            for number in range(steps):
                step(rank, number)
                # Leaves the machine to the other ranks.
                time.sleep(0.005)
                if number == 3:
                    print("step 3")
            if steps == 4:
                # The first to end waits for the last, which would otherwise miss the store.
                time.sleep(rank * PACE.limit / 2)
    except LostRankError as error:
        end_process(error, rank)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        status = 1
    os._exit(status)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start_ranks(step: Callable[[int, int], None], *, watched: bool = True, steps: int = 10**9) -> Ranks:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Ranks(folder, step, watched=watched, steps=steps))
        return started[-1]

    yield start_ranks
    for ranks in started:
        ranks.end()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_all_others_end_and_name_the_lost_rank(start: Callable[..., Ranks], number: signal.Signals) -> None:
    runs = [start(step) for step in (reduce_all, exchange_all, send_along, compute)]
    for ranks in runs:
        ranks.send(3, number)
    for ranks in runs:
        assert ranks.statuses(without=3, within=WITHIN_S) == [LOST_RANK_STATUS] * 3, ranks.said()
        for rank, said in enumerate(ranks.said()[:3]):
            assert f"pretrain: rank {rank}: rank 3 (pid {ranks.processes[3].pid} on " in said
            assert "has not answered for 2 s; the run cannot go on" in said
            assert not any(f"rank {other} (" in said for other in range(3)), said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_rank_that_keeps_the_store_is_named(start: Callable[..., Ranks], number: signal.Signals) -> None:
    ranks = start(send_along)
    ranks.send(0, number)
    assert ranks.statuses(without=0, within=WITHIN_S) == [LOST_RANK_STATUS] * 3, ranks.said()
    for rank, said in enumerate(ranks.said()[1:], 1):
        assert f"pretrain: rank {rank}: rank 0" in said
        assert "has not answered for 2 s; the run cannot go on" in said


@pytest.mark.parametrize("apart", [0.0, 0.3 * PACE.limit])
def test_several_lost_ranks_are_all_named(start: Callable[..., Ranks], apart: float) -> None:
    ranks = start(reduce_all)
    for rank in (1, 2):
        ranks.send(rank, signal.SIGSTOP)
        time.sleep(apart)
    for rank in (0, 3):
        ranks.processes[rank].join(WITHIN_S)
        assert ranks.processes[rank].exitcode == LOST_RANK_STATUS, ranks.said()
        for lost in (1, 2):
            assert ranks.said()[rank].count(f"rank {lost} (pid {ranks.processes[lost].pid} on ") == 1


def fail_later(rank: int, number: int) -> None:
    """Rank 2 fails at its hundredth step; nothing is communicated that would tell."""
    if rank == 2 and number == 100:
        raise ValueError("a fault of this rank alone")
    time.sleep(0.02)


def test_a_rank_that_fails_tells_the_others_why(start: Callable[..., Ranks]) -> None:
    ranks = start(fail_later)
    assert ranks.statuses(within=WITHIN_S) == [LOST_RANK_STATUS, LOST_RANK_STATUS, 1, LOST_RANK_STATUS], ranks.said()
    pid = ranks.processes[2].pid
    for rank, said in enumerate(ranks.said()):
        if rank != 2:
            assert f"rank {rank}: rank 2 (pid {pid} on " in said
            assert ") failed with ValueError: a fault of this rank alone; the run cannot go on" in said
    assert "ValueError: a fault of this rank alone" in ranks.said()[2]


def test_a_long_suspension_of_all_accuses_nobody(start: Callable[..., Ranks]) -> None:
    ranks = start(reduce_all)
    for rank in range(NUM_RANKS):
        ranks.send(rank, signal.SIGSTOP)
    time.sleep(1.5 * PACE.limit)
    for rank in range(NUM_RANKS):
        ranks.send(rank, signal.SIGCONT)
        time.sleep(0.2)
    assert ranks.statuses(within=PACE.limit) == [None] * NUM_RANKS, ranks.said()


def test_ranks_that_end_well_wait_for_one_another(start: Callable[..., Ranks]) -> None:
    ranks = start(reduce_all, steps=4)
    assert ranks.statuses(within=WITHIN_S) == [0] * NUM_RANKS, ranks.said()


def test_without_the_heartbeat_nobody_is_named(start: Callable[..., Ranks]) -> None:
    """The planted fault: frozen, the peer hangs all others; killed, it is not named."""
    ranks = start(reduce_all, watched=False)
    ranks.send(3, signal.SIGSTOP)
    assert ranks.statuses(without=3, within=UNWATCHED_S) == [None] * 3
    ranks.send(3, signal.SIGKILL)
    ranks.statuses(without=3, within=UNWATCHED_S)
    assert not any("rank 3" in said for said in ranks.said())
