"""Counts of rows on their way to the host: what a rank has for itself is awaited like what others send."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist

from parallel.dispatch import Announcement
from parallel.launch import Place, join_processes, leave_processes
from parallel.rows import Members, count_leaving
from parallel.transfer import Collectives

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SLEEP_CYCLES = 50_000_000


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    join_processes(Place(0, 1, 0, torch.device("cuda", 0), 1))
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    leave_processes()


def test_own_counts_that_are_late(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    all_to_all, stream = dist.all_to_all_single, torch.cuda.Stream()

    def and_sleep(*arguments: Any, **named: Any) -> Any:
        work = all_to_all(*arguments, **named)
        torch.cuda._sleep(SLEEP_CYCLES)
        return work

    monkeypatch.setattr(dist, "all_to_all_single", and_sleep)
    for num_tokens in (1000, 700, 1, 900):
        experts = torch.arange(2 * num_tokens, device="cuda").view(-1, 2) % 8
        leaving = count_leaving(experts, Members(1, 8, 0))
        counts = Announcement(leaving, Collectives(group), stream).wait()
        assert (int(counts.rows), int(counts.choices)) == (num_tokens, 2 * num_tokens)
