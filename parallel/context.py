"""Context parallelism: the positions of a sequence over ranks, each with a run of neighbours.

Attention needs all positions, but every head for itself. So queries change from all heads of some positions to some
heads of all positions, and back after attending (Ulysses, arXiv 2309.14509). Keys and values of multi-head latent
attention need not move: their latents and rotary keys, C + P values a token, are gathered instead, and each rank
decompresses them for its own heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class ContextRanks:
    """The ranks that share sequences, as `model.attention.SequenceParts`: `place` of `size`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.place = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """[B, s, ...] of every rank to [B, S, ...]."""
        result: Tensor = _Gather.apply(x, self._group)
        return result

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of some positions, [B, s, H, d], to some heads of all positions, [B, S, h, d]."""
        result: Tensor = _Reshuffle.apply(x, self._group, True)
        return result

    def to_positions(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        result: Tensor = _Reshuffle.apply(x, self._group, False)
        return result

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over ranks; nothing is differentiated."""
        total = counts.clone()
        dist.all_reduce(total, group=self._group)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = torch.stack(grad.chunk(dist.get_world_size(ctx.group), dim=1))
        return _exchange(parts, ctx.group).sum(0, dtype=torch.float32).to(grad.dtype), None


class _Reshuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _reshuffle(x, group, to_heads=to_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reshuffle(grad, ctx.group, to_heads=not ctx.to_heads), None, None


def _reshuffle(x: Tensor, group: dist.ProcessGroup, *, to_heads: bool) -> Tensor:
    """Divides one of heads (dim 2) and positions (dim 1), and joins the other."""
    divided, joined = (2, 1) if to_heads else (1, 2)
    parts = torch.stack(x.chunk(dist.get_world_size(group), dim=divided))
    return torch.cat(_exchange(parts, group).unbind(), dim=joined)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Part i of [n, ...] to rank i; what rank i sent here becomes part i."""
    arrived = torch.empty_like(parts)
    dist.all_to_all_single(arrived, parts, group=group)
    return arrived
