"""Copies of tokens, and the sum of what became of them.

`spread` copies token rows into a buffer, `by_token` and `collect` bring the buffer rows of each token together again.
All of them, and their gradients, only gather, so they need no atomic additions and give the same bits in every run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Buffer rows that are copies of tokens: `slots` [T, C] are the rows of each token, `choices` [R] says of each row
    which entry of the flattened slots it is. Where a token has fewer than C copies the slot is R, and `complete` is
    false."""

    slots: Tensor
    choices: Tensor
    complete: bool

    @property
    def tokens(self) -> Tensor:
        """The token that each row is a copy of, [R]."""
        return self.choices // self.slots.shape[1]


def find_copies(slots: Tensor, num_rows: int, *, complete: bool) -> Copies:
    """`Copies` of `num_rows` buffer rows from the slots."""
    flat = slots.flatten()
    choices = flat.new_empty(num_rows + 1)
    choices[flat] = torch.arange(len(flat), device=flat.device)
    return Copies(slots, choices[:num_rows], complete)


def spread(x: Tensor, copies: Copies) -> Tensor:
    """Token rows [T, D] to buffer rows [R, D]."""
    result: Tensor = _Spread.apply(x, copies)
    return result


def by_token(rows: Tensor, copies: Copies) -> Tensor:
    """Buffer rows [R, D] as [T, C, D], zero where a token has no such copy."""
    result: Tensor = _ByToken.apply(rows, copies)
    return result


def collect(rows: Tensor, copies: Copies) -> Tensor:
    """Buffer rows [R, D] to their sums by token, [T, D], added up in fp32."""
    return by_token(rows, copies).sum(1, dtype=torch.float32).to(rows.dtype)


def _gather(rows: Tensor, copies: Copies) -> Tensor:
    if not copies.complete:
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    return rows.index_select(0, copies.slots.flatten()).unflatten(0, copies.slots.shape)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.copies).sum(1, dtype=torch.float32).to(grad.dtype), None


class _ByToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _gather(rows, copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.flatten(0, 1).index_select(0, ctx.copies.choices), None
