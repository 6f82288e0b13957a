"""Where tokens' copies stand when they are ordered by expert, and the sums that bring them back.

The order is a stable counting sort with E + 1 buckets: each program finds, in its block of choices, the rank of every
choice among the earlier ones of the same expert, and how many each expert has there; a cumulative sum over (expert,
block) tells where the first of each stands. Only integers are counted, and nothing is read back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # choices in a block of the sort
COLUMNS = 2048  # of rows that a program sums, at most


def sum_rows(
    rows: Tensor,
    slots: Tensor,
    addends: tuple[Tensor, ...],
    *,
    weights: Tensor | None = None,
    num_rows: int | None = None,
) -> Tensor:
    """For each token the sum of its `rows` [R, D], in the order of its `slots` [T, C] int64, each times its weight of
    `weights` [T, C] in fp32 if there are any, and of up to two `addends` [T, D]; [T, D], added up in fp32. A slot of R
    or more stands for no row; R is `num_rows`, or all there are."""
    assert len(addends) <= 2, len(addends)
    (num_tokens, num_slots), size = slots.shape, rows.shape[1]
    result = rows.new_empty(num_tokens, size)
    if num_tokens:
        block = min(triton.next_power_of_2(size), COLUMNS)
        rows, slots = rows.contiguous(), slots.contiguous()
        first, second = (*(addend.contiguous() for addend in addends), rows, rows)[:2]
        _sum_kernel[(num_tokens, triton.cdiv(size, block))](
            rows, slots, first, second, rows if weights is None else weights.contiguous(), result,
            len(rows) if num_rows is None else num_rows, SIZE=size, SLOTS=num_slots, ADDENDS=len(addends),
            WEIGHTED=weights is not None, BLOCK=block, num_warps=max(block // 512, 1),
        )  # fmt: skip
    return result


def count_and_place(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of choices [N] from 0 to E, where E = `num_experts` means none: `places` [N], where each stands among all of them
    ordered by expert, those of one expert in their order and those of none at the end; `order` [N], the choice that
    stands at each place; and how many choose each expert, [E]. All int64."""
    num_choices, device = len(experts), experts.device
    places = torch.empty(num_choices, dtype=torch.int64, device=device)
    order = torch.empty_like(places)
    if num_choices == 0:
        return places, order, torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts = torch.empty(num_experts, dtype=torch.int64, device=device)
    experts = experts.contiguous()
    num_blocks = triton.cdiv(num_choices, BLOCK)
    in_blocks = torch.zeros((num_experts + 1) * num_blocks, dtype=torch.int32, device=device)
    _rank_kernel[(num_blocks,)](experts, places, in_blocks, num_choices, num_blocks, BLOCK=BLOCK, num_warps=4)
    ends = in_blocks.cumsum(0, dtype=torch.int32)
    _place_kernel[(max(num_blocks, triton.cdiv(num_experts, BLOCK)),)](
        experts, places, order, counts, in_blocks, ends, num_choices, num_blocks, num_experts, BLOCK=BLOCK, num_warps=4
    )
    return places, order, counts


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(
    rows: tl.tensor, slots: tl.tensor, first: tl.tensor, second: tl.tensor, weights: tl.tensor, result: tl.tensor,
    num_rows: tl.tensor,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, ADDENDS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(SLOTS):
        slot = tl.broadcast_to(tl.load(slots + token * SLOTS + choice), (BLOCK,))
        value = tl.load(rows + slot * SIZE + column, mask=mask & (slot < num_rows), other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * SLOTS + choice)
        total += value
    if ADDENDS > 0:
        total += tl.load(first + token * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    if ADDENDS > 1:
        total += tl.load(second + token * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(result + token * SIZE + column, total, mask=mask)


@triton.jit(do_not_specialize=["num_choices", "num_blocks"])
def _rank_kernel(
    experts: tl.tensor, ranks: tl.tensor, in_blocks: tl.tensor, num_choices: tl.tensor, num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Ranks [N] within blocks, and the counts [E + 1, blocks] of experts that are there, the others being zero."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    mine = tl.arange(0, BLOCK)
    expert = tl.load(experts + start + mine, mask=start + mine < num_choices, other=-1).to(tl.int32)
    # Each thread has a column of the comparison, so its sums are its own.
    same = expert[:, None] == expert[None, :]
    count = tl.sum(same.to(tl.int32), axis=0)
    rank = tl.sum((same & (mine[:, None] < mine[None, :])).to(tl.int32), axis=0)
    real = start + mine < num_choices
    tl.store(ranks + start + mine, rank.to(tl.int64), mask=real)
    tl.store(in_blocks + expert.to(tl.int64) * num_blocks + tl.program_id(0), count, mask=real & (rank == 0))


@triton.jit(do_not_specialize=["num_choices", "num_blocks", "num_experts"])
def _place_kernel(
    experts: tl.tensor, places: tl.tensor, order: tl.tensor, counts: tl.tensor, in_blocks: tl.tensor, ends: tl.tensor,
    num_choices: tl.tensor, num_blocks: tl.tensor, num_experts: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Turns ranks, which `places` holds, into places, and stores their inverse and the counts."""
    choice = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = choice < num_choices
    bucket = tl.load(experts + choice, mask=real, other=0) * num_blocks + tl.program_id(0)
    before = tl.load(ends + bucket, mask=real, other=0) - tl.load(in_blocks + bucket, mask=real, other=0)
    place = tl.load(places + choice, mask=real, other=0) + before
    tl.store(places + choice, place, mask=real)
    tl.store(order + place, choice, mask=real)
    end = tl.load(ends + (choice + 1) * num_blocks - 1, mask=choice < num_experts, other=0)
    begin = tl.load(ends + choice * num_blocks - 1, mask=(choice < num_experts) & (choice > 0), other=0)
    tl.store(counts + choice, (end - begin).to(tl.int64), mask=choice < num_experts)
