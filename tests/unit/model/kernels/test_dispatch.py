"""Rows that leave for others' experts, by kernels as by plain torch."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from dispatch_cases import KINDS, check_rounds, check_rows

from model.kernels import dispatch
from parallel.rows import Members


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "num_choices", "members"),
    [(0, 2, Members(2, 4, 0)), (70, 3, Members(4, 2, 2)), (9, 8, Members(3, 5, 1)), (5, 1, Members(64, 2, 63))],
)
def test_kernels_do_what_torch_does(kind: str, num_tokens: int, num_choices: int, members: Members) -> None:
    check_rows(kind, num_tokens, num_choices, members, 40, torch.bfloat16)


def test_more_blocks_than_are_added_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BLOCK", 4)
    check_rows("even", 39, 3, Members(4, 2, 1), 8, torch.float32)


def test_rows_of_more_than_one_program() -> None:
    check_rows("few", 5, 4, Members(4, 4, 1), 2500, torch.float32)


def test_rounds_of_what_kernels_counted() -> None:
    check_rounds(Members(4, 2, 1))
