"""Rows that copy engines bring to other processes: the bits that were sent, whoever is late. They share a GPU where
there is one."""

import pytest
import torch
from support import PROJECT, finish, start_processes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SCRIPT = str(PROJECT / "tests" / "peer_copies_ranks.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_what_arrives_is_what_was_sent(processes: int) -> None:
    output = finish(start_processes([SCRIPT], processes=processes))
    assert output.count("all as sent") == processes


def test_copies_that_wait_for_nobody_are_found_out() -> None:
    output = finish(start_processes([SCRIPT, "fault"], processes=2), expect=1)
    assert "brought other rows" in output
