"""Which rows leave for whom: counted, put in order, and packed.

Plain torch says what is meant; it runs on a CPU, and wherever rows go in several rounds. On a GPU each of its many
small operations costs the host more time than the device, so there kernels do the same, for one round, in four
launches: counting (two, with the sum over blocks), places, packing. Both give equal results.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.experts import RoutedRows
from model.permute import Copies, find_copies, spread


@dataclass(frozen=True)
class Members:
    """`number` members hold `num_experts` experts each, in order; this rank has the `place`-th."""

    number: int
    num_experts: int
    place: int

    def in_turn(self, values: Tensor, dim: int) -> Tensor:
        """What members have along `dim`, in the order of their rows: this rank, then the others."""
        before, own, after = values.split((self.place, 1, self.number - self.place - 1), dim)
        return torch.cat((own, before, after), dim)

    def in_order(self, values: Tensor) -> Tensor:
        """What members have along the first dimension, in their order, from that of their rows."""
        own, before, after = values.split((1, self.place, self.number - self.place - 1))
        return torch.cat((before, own, after))


@dataclass(frozen=True)
class Leaving:
    """The choices [T, K] of the tokens here among the experts of all members, −1 for none, and how many rows and how
    many choices are for each member: `counts` [2, members]. Kernels counted by block, too."""

    experts: Tensor
    members: Members
    counts: Tensor
    in_blocks: Tensor | None = None


def count_leaving(experts: Tensor, members: Members) -> Leaving:
    """Counts on the device what leaves."""
    return (count_by_kernels if experts.device.type == "cuda" else count_by_torch)(experts, members)


def pack_leaving(leaving: Leaving, rows: Tensor, weights: Tensor, sizes: Tensor) -> tuple[Copies, RoutedRows]:
    """The rows to send, copies of tokens [T, D], in order of round, turn and token, when `sizes` [rounds, turn], known
    to the host, go in each round. Of a token's choices and weights [T, K], each copy has those that are for its
    member, the choices counted from the first expert there."""
    if leaving.in_blocks is not None and len(sizes) == 1:
        return _pack_by_kernels(leaving, leaving.in_blocks, rows, weights, int(sizes.sum()))
    copies, members = _order(leaving, sizes)
    return copies, _pack(leaving, rows, weights, copies, members)


def count_by_kernels(experts: Tensor, members: Members) -> Leaving:
    """`count_leaving` on a GPU."""
    from model.kernels import dispatch as kernels

    experts = experts.contiguous()  # once for all kernels
    return Leaving(experts, members, *kernels.count_copies(experts, members.number, members.num_experts))


def _pack_by_kernels(
    leaving: Leaving, in_blocks: Tensor, rows: Tensor, weights: Tensor, num_rows: int
) -> tuple[Copies, RoutedRows]:
    from model.kernels import dispatch as kernels

    experts, members = leaving.experts, leaving.members
    slots, entries, carriers = kernels.place_copies(
        experts, leaving.counts, in_blocks, place=members.place, num_experts=members.num_experts, num_rows=num_rows
    )
    packed, there, taken = _Pack.apply(rows, weights, experts, slots, carriers, num_rows, members.num_experts)
    copies = Copies(slots, entries, complete=num_rows == slots.numel())
    return copies, RoutedRows(packed, there, taken, complete=False)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        experts: Tensor,
        slots: Tensor,
        carriers: Tensor,
        num_rows: int,
        num_experts: int,
    ) -> tuple[Tensor, ...]:
        from model.kernels import dispatch as kernels

        ctx.slots, ctx.carriers = slots, carriers
        sizes = {"num_experts": num_experts, "num_rows": num_rows}
        packed = kernels.pack_rows(rows, experts, weights, slots, carriers, **sizes)
        ctx.mark_non_differentiable(packed[1])
        ctx.set_materialize_grads(False)
        return packed

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, _: Any, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        from model.kernels import dispatch as kernels
        from model.kernels.permute import sum_rows

        of_rows = None if grad_rows is None else sum_rows(grad_rows, ctx.slots, ())
        of_weights = None if grad_weights is None else kernels.values_of_choices(grad_weights, ctx.carriers)
        return of_rows, of_weights, None, None, None, None, None


def count_by_torch(experts: Tensor, members: Members) -> Leaving:
    """`count_leaving`, plainly."""
    chosen = _members_of(experts, members).flatten()
    choices = chosen.new_zeros(members.number + 1).scatter_add(0, chosen, torch.ones_like(chosen))
    return Leaving(experts, members, torch.stack((_goes(experts, members).sum(0), choices[:-1])))


def _members_of(experts: Tensor, members: Members) -> Tensor:
    """The members that have the experts of choices [T, K], of a choice of none their number."""
    return torch.where(experts < 0, members.number, experts // members.num_experts)


def _goes(experts: Tensor, members: Members) -> Tensor:
    """[T, members]: which members the tokens go to."""
    none = experts.new_zeros(members.number + 1, dtype=torch.bool).expand(len(experts), -1)
    return none.scatter(1, _members_of(experts, members), True)[:, :-1]


def _order(leaving: Leaving, sizes: Tensor) -> tuple[Copies, Tensor]:
    """The copies in order of round, turn and token; and the member that each row goes to."""
    members, num_rows = leaving.members, int(sizes.sum())
    goes = members.in_turn(_goes(leaving.experts, members), 1)
    if goes.device.type == "cuda":
        # From pinned memory the host does not wait for the copy.
        sizes = sizes.contiguous().pin_memory().to(goes.device, non_blocking=True)
    number = goes.long().cumsum(0) - 1
    ends = sizes.cumsum(0)
    rounds = (number.unsqueeze(0) >= ends.unsqueeze(1)).sum(0).clamp(max=len(sizes) - 1)
    # Where a (round, member) begins among all rows, less the rows that its member got in earlier rounds.
    begins = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes) - (ends - sizes)
    slots = torch.where(goes, number + begins.gather(0, rounds), num_rows)
    slots = slots.sort(1).values[:, : leaving.experts.shape[1]].contiguous()  # without the rest of what was sorted
    turn = members.in_turn(torch.arange(members.number, device=goes.device), 0)
    members_of_rows = turn.repeat(len(sizes)).repeat_interleave(sizes.flatten(), output_size=num_rows)
    return find_copies(slots, num_rows, complete=num_rows == slots.numel()), members_of_rows


def _pack(leaving: Leaving, rows: Tensor, weights: Tensor, copies: Copies, members: Tensor) -> RoutedRows:
    num_experts = leaving.members.num_experts
    experts = leaving.experts[copies.tokens] - (members * num_experts).unsqueeze(1)
    is_there = (experts >= 0) & (experts < num_experts)
    weights = torch.where(is_there, spread(weights, copies), 0.0)
    return RoutedRows(spread(rows, copies), torch.where(is_there, experts, -1), weights, complete=False)
