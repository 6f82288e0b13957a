"""Copies of tokens to the members that hold their experts: counted, put in order and written, a launch each.

Counting leaves for every block of tokens how many go to each member. A copy then stands after all those of members
before its own, those of earlier blocks, and those of earlier tokens in its block. Only integers are counted, nothing is
added atomically, and nothing is read back. Members come in turn: that of this rank first, then the others in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # tokens in a block
MOST_MEMBERS = 128  # for which a block of tokens and members fits into registers
COLUMNS = 2048  # of a row that a program copies, at most


def count_copies(experts: Tensor, num_members: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Of choices [T, K] among all experts (−1: none), of which each member has `num_experts`: how many tokens, and how
    many choices, are for each member, [2, members] int64; and the same by block, [2, blocks, members] int32."""
    assert num_members <= MOST_MEMBERS, num_members
    num_tokens, num_choices = experts.shape
    num_blocks = triton.cdiv(num_tokens, BLOCK)
    in_blocks = torch.empty(2, num_blocks, num_members, dtype=torch.int32, device=experts.device)
    if num_tokens:
        _count_kernel[(num_blocks,)](
            experts.contiguous(), in_blocks, num_tokens, MEMBERS=num_members,
            MEMBERS_BLOCK=_members_block(num_members), EXPERTS=num_experts, CHOICES=num_choices, BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip
    return in_blocks.sum(1), in_blocks


def place_copies(
    experts: Tensor, counts: Tensor, in_blocks: Tensor, *, place: int, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the R = `num_rows` copies that were counted stand, when this rank has `place` among the members: `slots`
    [T, C], the rows of each token, R after the last; `entries` [R], which entry of the flattened slots each row is; and
    `carriers` [T, K], the row that takes each choice along, R for none. C is the smaller of K and the members. All
    int64."""
    (num_tokens, num_choices), num_members = experts.shape, counts.shape[1]
    slots = torch.empty(num_tokens, min(num_choices, num_members), dtype=torch.int64, device=experts.device)
    entries = slots.new_empty(num_rows)
    carriers = slots.new_empty(num_tokens, num_choices)
    if num_tokens:
        _place_kernel[(triton.cdiv(num_tokens, BLOCK),)](
            experts.contiguous(), counts, in_blocks, slots, entries, carriers, place, num_tokens, num_rows,
            MEMBERS=num_members, MEMBERS_BLOCK=_members_block(num_members), EXPERTS=num_experts,
            CHOICES=num_choices, SLOTS=slots.shape[1], BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return slots, entries, carriers


def pack_rows(
    x: Tensor, experts: Tensor, weights: Tensor, slots: Tensor, carriers: Tensor, *, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of token rows x [T, D], [R, D], with what they take along of the token's choices and weights [T, K]: the
    choices, counted from the member's first expert, −1 elsewhere, and the weights, 0 elsewhere, both [R, K]."""
    (num_tokens, size), num_choices = x.shape, experts.shape[1]
    rows = x.new_empty(num_rows, size)
    row_experts, row_weights = (each.new_empty(num_rows, num_choices) for each in (experts, weights))
    if num_tokens:
        block = min(triton.next_power_of_2(size), COLUMNS)
        _pack_kernel[(num_tokens, triton.cdiv(size, block))](
            x.contiguous(), experts.contiguous(), weights.contiguous(), slots, carriers,
            rows, row_experts, row_weights, num_rows,
            SIZE=size, CHOICES=num_choices, CHOICES_BLOCK=triton.next_power_of_2(num_choices), SLOTS=slots.shape[1],
            EXPERTS=num_experts, BLOCK=block, num_warps=max(block // 512, 1),
        )  # fmt: skip
    return rows, row_experts, row_weights


def values_of_choices(values: Tensor, carriers: Tensor) -> Tensor:
    """What rows [R, K] have for the choices that they took along, [T, K]: zero for a choice of none."""
    num_rows, num_choices = values.shape
    result = values.new_empty(carriers.shape)
    total = carriers.numel()
    if total:
        block = 1024
        _values_of_choices_kernel[(triton.cdiv(total, block),)](
            values.contiguous(), carriers, result, total, num_rows, CHOICES=num_choices, BLOCK=block, num_warps=4
        )
    return result


def _members_block(num_members: int) -> int:
    """Places for members: two for one, as Triton cannot add up along an axis of one."""
    return max(triton.next_power_of_2(num_members), 2)


@triton.jit
def _member_of(
    experts: tl.tensor, token: tl.tensor, choice: int, num_tokens: tl.tensor, EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The members that have the experts of a choice of tokens, −1 for none, [BLOCK]."""
    expert = tl.load(experts + token * CHOICES + choice, mask=token < num_tokens, other=-1).to(tl.int32)
    return tl.where(expert < 0, -1, expert // EXPERTS)


@triton.jit
def _choices_for(
    experts: tl.tensor, token: tl.tensor, member: tl.tensor, num_tokens: tl.tensor,
    EXPERTS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr, MEMBERS_BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """How many choices of tokens [BLOCK] are for members [MEMBERS_BLOCK]."""
    count = tl.zeros((BLOCK, MEMBERS_BLOCK), dtype=tl.int32)
    for choice in tl.static_range(CHOICES):
        chosen = _member_of(experts, token, choice, num_tokens, EXPERTS, CHOICES)
        count += (chosen[:, None] == member[None, :]).to(tl.int32)
    return count


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(
    experts: tl.tensor, in_blocks: tl.tensor, num_tokens: tl.tensor,
    MEMBERS: tl.constexpr, MEMBERS_BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, MEMBERS_BLOCK)
    count = _choices_for(experts, token, member, num_tokens, EXPERTS, CHOICES, BLOCK, MEMBERS_BLOCK)
    rows_at = in_blocks + tl.program_id(0) * MEMBERS + member
    choices_at = rows_at + tl.num_programs(0) * MEMBERS
    tl.store(rows_at, tl.sum((count > 0).to(tl.int32), axis=0), mask=member < MEMBERS)
    tl.store(choices_at, tl.sum(count, axis=0), mask=member < MEMBERS)


@triton.jit(do_not_specialize=["place", "num_tokens", "num_rows"])
def _place_kernel(
    experts: tl.tensor, counts: tl.tensor, in_blocks: tl.tensor,
    slots: tl.tensor, entries: tl.tensor, carriers: tl.tensor,
    place: tl.tensor, num_tokens: tl.tensor, num_rows: tl.tensor,
    MEMBERS: tl.constexpr, MEMBERS_BLOCK: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    block, number = tl.program_id(0), tl.arange(0, MEMBERS_BLOCK)
    member = tl.where(number == 0, place, number - (number <= place).to(tl.int32))
    total = tl.load(counts + member, mask=number < MEMBERS, other=0)
    begin = tl.cumsum(total, axis=0) - total
    for first in range(0, block, BLOCK):
        earlier = first + tl.arange(0, BLOCK)
        mask = (earlier < block)[:, None] & (number < MEMBERS)[None, :]
        begin += tl.sum(tl.load(in_blocks + earlier[:, None] * MEMBERS + member[None, :], mask=mask, other=0), axis=0)
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = token < num_tokens
    count = _choices_for(experts, token, member, num_tokens, EXPERTS, CHOICES, BLOCK, MEMBERS_BLOCK)
    goes = count > 0
    one = goes.to(tl.int32)
    row = begin[None, :] + (tl.cumsum(one, axis=0) - one)
    entry = token[:, None] * SLOTS + (tl.cumsum(one, axis=1) - one)
    tl.store(slots + entry, row, mask=goes)
    tl.store(entries + row, entry, mask=goes)
    none = tl.zeros((BLOCK,), dtype=tl.int64) + num_rows
    last = tl.sum(one, axis=1)
    for slot in tl.static_range(SLOTS):
        tl.store(slots + token * SLOTS + slot, none, mask=real & (last <= slot))
    for choice in tl.static_range(CHOICES):
        chosen = _member_of(experts, token, choice, num_tokens, EXPERTS, CHOICES)
        carrier = tl.sum(tl.where(chosen[:, None] == member[None, :], row, 0), axis=1)
        tl.store(carriers + token * CHOICES + choice, tl.where(chosen < 0, none, carrier), mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def _pack_kernel(
    x: tl.tensor, experts: tl.tensor, weights: tl.tensor, slots: tl.tensor, carriers: tl.tensor,
    rows: tl.tensor, row_experts: tl.tensor, row_weights: tl.tensor, num_rows: tl.tensor,
    SIZE: tl.constexpr, CHOICES: tl.constexpr, CHOICES_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + token * SIZE + column, mask=column < SIZE)
    choice = tl.arange(0, CHOICES_BLOCK)
    real = choice < CHOICES
    at = token * CHOICES + choice
    carrier = tl.load(carriers + at, mask=real, other=-1)
    expert = tl.load(experts + at, mask=real, other=-1)
    weight = tl.load(weights + at, mask=real, other=0.0)
    for number in tl.static_range(SLOTS):
        slot = tl.load(slots + token * SLOTS + number)
        if slot < num_rows:
            tl.store(rows + slot * SIZE + column, values, mask=column < SIZE)
            if tl.program_id(1) == 0:
                here, to = carrier == slot, slot * CHOICES + choice
                tl.store(row_experts + to, tl.where(here, expert % EXPERTS, -1), mask=real)
                tl.store(row_weights + to, tl.where(here, weight, 0.0), mask=real)


@triton.jit(do_not_specialize=["total", "num_rows"])
def _values_of_choices_kernel(
    values: tl.tensor, carriers: tl.tensor, result: tl.tensor, total: tl.tensor, num_rows: tl.tensor,
    CHOICES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    carrier = tl.load(carriers + at, mask=at < total, other=0)
    value = tl.load(values + carrier * CHOICES + at % CHOICES, mask=(at < total) & (carrier < num_rows), other=0.0)
    tl.store(result + at, value, mask=at < total)
