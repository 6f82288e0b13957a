"""Copies of tokens, and the sum of what became of them.

`spread` copies token rows into a buffer, `collect` adds up the buffer rows of each token, in fp32 and in the order of
its copies; each is the other's gradient. All of it only gathers, so it needs no atomic additions and gives the same
bits in every run.
"""

from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
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


def collect(rows: Tensor, copies: Copies) -> Tensor:
    """Buffer rows [R, D] to their sums by token, [T, D]."""
    result: Tensor = _Collect.apply(rows, copies)
    return result


def pick(values: Tensor, copies: Copies) -> Tensor:
    """What each copy has for itself, one value each: [T, C] to [R]."""
    result: Tensor = _Pick.apply(values, copies)
    return result


def bring_back(values: Tensor, copies: Copies) -> Tensor:
    """What each copy has, [R], to where `pick` took it from, [T, C]: zero where a token has no such copy."""
    return _gather(values.unsqueeze(-1), copies).squeeze(-1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, copies.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad, ctx.copies), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return _sum_rows(rows, copies)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.copies.tokens), None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return values.flatten().index_select(0, copies.choices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return bring_back(grad, ctx.copies), None


def _sum_rows(rows: Tensor, copies: Copies) -> Tensor:
    if rows.is_cuda:
        from model.kernels.permute import sum_rows

        return sum_rows(rows, copies.slots, ())
    return _gather(rows, copies).sum(1, dtype=torch.float32).to(rows.dtype)


def _gather(rows: Tensor, copies: Copies) -> Tensor:
    """The rows of each token, [T, C, D], zero where it has no such copy."""
    if not copies.complete:
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    return rows.index_select(0, copies.slots.flatten()).unflatten(0, copies.slots.shape)
