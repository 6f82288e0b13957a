"""The gate from its logits, and the gradient of its logits, each in one pass over [T, E].

A program takes some positions of one sequence with all their experts. Experts lie in columns group by group, each group
padded to a power of two, so that groups are a dimension of their own and columns keep the order of the experts: of
equal values the first column wins. Counts are added up by atomic additions of integers, sums of floats program by
program in an order that is the same in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 2048  # affinities that a program holds


class Routing(NamedTuple):
    """The `experts` [T, K] (int64) and `weights` [T, K] of tokens; the `load` [E] of experts; and for each of B
    sequences how often an expert is among the K best affinities, `counts` [B, E] (int64), and its sum of normalised
    affinities, `sums` [B, E]."""

    experts: Tensor
    weights: Tensor
    load: Tensor
    counts: Tensor
    sums: Tensor


def route(
    logits: Tensor,
    bias: Tensor,
    *,
    num_sequences: int,
    num_experts: int,
    num_groups: int,
    num_chosen_groups: int,
    is_sigmoid: bool,
    factor: float,
) -> Routing:
    """Routes tokens by their logits [T, E] and the bias [E], both in fp32, as the module of the gate says; weights are
    times `factor`."""
    num_tokens, size = logits.shape
    num_positions = num_tokens // num_sequences
    groups = num_groups if num_chosen_groups < num_groups else 1
    padded_groups, padded_size = triton.next_power_of_2(groups), triton.next_power_of_2(size // groups)
    rows = max(_VALUES // (padded_groups * padded_size), 1)
    num_programs = triton.cdiv(num_positions, rows)
    experts = torch.empty(num_tokens, num_experts, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, num_experts, device=logits.device)
    sums = torch.empty(num_sequences, num_programs, size, device=logits.device)
    tallies = torch.zeros(1 + num_sequences, size, dtype=torch.int64, device=logits.device)
    load, counts = tallies[0], tallies[1:]
    _forward_kernel[(num_programs, num_sequences)](
        logits, bias, experts, weights, load, counts, sums, num_positions, factor,
        EXPERTS=size, GROUPS=groups, CHOSEN_GROUPS=num_chosen_groups, CHOSEN=num_experts, SIGMOID=is_sigmoid,
        ROWS=rows, PADDED_GROUPS=padded_groups, PADDED_SIZE=padded_size, SLOTS=triton.next_power_of_2(num_experts),
    )  # fmt: skip
    return Routing(experts, weights, load, counts, sums.sum(1))


def route_backward(
    grad_weights: Tensor,
    grad_balance: Tensor,
    logits: Tensor,
    experts: Tensor,
    counts: Tensor,
    *,
    is_sigmoid: bool,
    factor: float,
    balance_factor: float,
    in_terms: bool,
) -> Tensor:
    """The gradient of the logits [T, E], from those of the weights [T, K] and of `balance_factor` · Σ counts · sums, a
    scalar, in fp32. `in_terms` gives it as three bf16 terms, [T, 3, E], whose sum is exact, as 3 × 8 bits hold 24."""
    num_tokens, size = logits.shape
    num_positions = num_tokens // len(counts)
    columns = triton.next_power_of_2(size)
    rows = max(_VALUES // columns, 1)
    shape, dtype = ((num_tokens, 3, size), torch.bfloat16) if in_terms else ((num_tokens, size), torch.float32)
    grad_logits = torch.empty(shape, dtype=dtype, device=logits.device)
    _backward_kernel[(triton.cdiv(num_positions, rows), len(counts))](
        grad_weights.contiguous(), grad_balance, logits, experts, counts, grad_logits,
        num_positions, factor, balance_factor,
        EXPERTS=size, CHOSEN=experts.shape[1], SIGMOID=is_sigmoid, IN_TERMS=in_terms, ROWS=rows, COLUMNS=columns,
    )  # fmt: skip
    return grad_logits


@triton.jit
def _affinities(x: tl.tensor, is_expert: tl.tensor, SIGMOID: tl.constexpr) -> tl.tensor:
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        x = tl.where(is_expert[None, :], x, -float("inf"))
        powers = tl.exp(x - tl.max(x, axis=1)[:, None])
        scores = powers / tl.sum(powers, axis=1)[:, None]
    return tl.where(is_expert[None, :], scores, 0.0)


@triton.jit
def _in_best_groups(
    values: tl.tensor,
    GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, PADDED_GROUPS: tl.constexpr, PADDED_SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The values [ROWS, columns], but −∞ outside the groups with the best sums of two."""
    grouped = tl.reshape(values, (ROWS, PADDED_GROUPS, PADDED_SIZE))
    member, group = tl.arange(0, PADDED_SIZE), tl.arange(0, PADDED_GROUPS)
    first = tl.argmax(grouped, axis=2)
    rest = tl.where(member[None, None, :] == first[:, :, None], -float("inf"), grouped)
    left = tl.max(grouped, axis=2) + tl.max(rest, axis=2)
    kept = tl.zeros((ROWS, PADDED_GROUPS), dtype=tl.int32)
    for _ in tl.static_range(CHOSEN_GROUPS):
        hit = tl.argmax(left, axis=1)[:, None] == group[None, :]
        kept = tl.where(hit, 1, kept)
        left = tl.where(hit, -float("inf"), left)
    grouped = tl.where(kept[:, :, None] > 0, grouped, -float("inf"))
    return tl.reshape(grouped, (ROWS, PADDED_GROUPS * PADDED_SIZE))


@triton.jit(do_not_specialize=["num_positions"])
def _forward_kernel(
    logits: tl.tensor, bias: tl.tensor, experts: tl.tensor, weights: tl.tensor,
    load: tl.tensor, counts: tl.tensor, sums: tl.tensor, num_positions: tl.tensor, factor: tl.tensor,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, CHOSEN: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr, PADDED_GROUPS: tl.constexpr, PADDED_SIZE: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = sequence * num_positions + position
    column = tl.arange(0, PADDED_GROUPS * PADDED_SIZE)
    expert = column // PADDED_SIZE * (EXPERTS // GROUPS) + column % PADDED_SIZE
    is_expert = (column // PADDED_SIZE < GROUPS) & (column % PADDED_SIZE < EXPERTS // GROUPS)
    is_real = (position < num_positions)[:, None] & is_expert[None, :]
    x = tl.load(logits + token[:, None] * EXPERTS + expert[None, :], mask=is_real, other=0.0)
    scores = _affinities(x, is_expert, SIGMOID)

    left = tl.where(
        is_expert[None, :], scores + tl.load(bias + expert, mask=is_expert, other=0.0)[None, :], -float("inf")
    )
    if CHOSEN_GROUPS < GROUPS:
        left = _in_best_groups(left, GROUPS, CHOSEN_GROUPS, ROWS, PADDED_GROUPS, PADDED_SIZE)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((ROWS, SLOTS), dtype=tl.int32)
    weight = tl.zeros((ROWS, SLOTS), dtype=tl.float32)
    taken = tl.zeros((ROWS, PADDED_GROUPS * PADDED_SIZE), dtype=tl.int32)
    for k in tl.static_range(CHOSEN):
        best = tl.argmax(left, axis=1)
        hit = best[:, None] == column[None, :]
        taken = tl.where(hit, 1, taken)
        left = tl.where(hit, -float("inf"), left)
        # Among values that are not numbers the best may be a column without an expert.
        index = tl.minimum(best // PADDED_SIZE * (EXPERTS // GROUPS) + best % PADDED_SIZE, EXPERTS - 1)
        chosen = tl.where(slot[None, :] == k, index[:, None], chosen)
        weight = tl.where(slot[None, :] == k, tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], weight)
    if SIGMOID:
        weight = weight / (tl.sum(weight, axis=1) + 1e-20)[:, None]
    is_choice = (position < num_positions)[:, None] & (slot < CHOSEN)[None, :]
    place = token[:, None] * CHOSEN + slot[None, :]
    tl.store(experts + place, chosen.to(tl.int64), mask=is_choice)
    tl.store(weights + place, weight * factor, mask=is_choice)
    taken = tl.sum(tl.where(is_real, taken, 0), axis=0)
    tl.atomic_add(load + expert, taken.to(tl.int64), mask=is_expert & (taken > 0), sem="relaxed")

    left = tl.where(is_expert[None, :], scores, -float("inf"))
    taken = tl.zeros((ROWS, PADDED_GROUPS * PADDED_SIZE), dtype=tl.int32)
    for _ in tl.static_range(CHOSEN):
        hit = tl.argmax(left, axis=1)[:, None] == column[None, :]
        taken = tl.where(hit, 1, taken)
        left = tl.where(hit, -float("inf"), left)
    taken = tl.sum(tl.where(is_real, taken, 0), axis=0)
    counted = counts + sequence * EXPERTS + expert
    tl.atomic_add(counted, taken.to(tl.int64), mask=is_expert & (taken > 0), sem="relaxed")
    share = tl.where(is_real, scores / tl.sum(scores, axis=1)[:, None], 0.0)
    here = (sequence * tl.num_programs(0) + tl.program_id(0)) * EXPERTS
    tl.store(sums + here + expert, tl.sum(share, axis=0), mask=is_expert)


@triton.jit(do_not_specialize=["num_positions"])
def _backward_kernel(
    grad_weights: tl.tensor, grad_balance: tl.tensor, logits: tl.tensor, experts: tl.tensor, counts: tl.tensor,
    grad_logits: tl.tensor, num_positions: tl.tensor, factor: tl.tensor, balance_factor: tl.tensor,
    EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, IN_TERMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = position < num_positions
    token = sequence * num_positions + position
    expert = tl.arange(0, COLUMNS)
    is_expert = expert < EXPERTS
    is_real = is_token[:, None] & is_expert[None, :]
    x = tl.load(logits + token[:, None] * EXPERTS + expert[None, :], mask=is_real, other=0.0)
    scores = _affinities(x, is_expert, SIGMOID)

    grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    taken = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for k in tl.static_range(CHOSEN):
        index = tl.load(experts + token * CHOSEN + k, mask=is_token, other=-1).to(tl.int32)
        value = tl.load(grad_weights + token * CHOSEN + k, mask=is_token, other=0.0)
        hit = index[:, None] == expert[None, :]
        grad = tl.where(hit, value[:, None], grad)
        taken = tl.where(hit, 1, taken)
    if SIGMOID:
        total = tl.sum(tl.where(taken > 0, scores, 0.0), axis=1) + 1e-20
        mean = tl.sum(grad * scores, axis=1) / total
        grad = tl.where(taken > 0, (grad - mean[:, None]) / total[:, None], 0.0)
    grad = grad * factor

    count = tl.load(counts + sequence * EXPERTS + expert, mask=is_expert, other=0).to(tl.float32)
    pull = count * (tl.load(grad_balance) * balance_factor)
    whole = tl.sum(scores, axis=1)
    mean = tl.sum(pull[None, :] * scores, axis=1) / whole
    grad += (pull[None, :] - mean[:, None]) / whole[:, None]

    if not SIGMOID:
        grad = grad - tl.sum(grad * scores, axis=1)[:, None]
    grad = grad * scores
    if SIGMOID:
        grad = grad * (1.0 - scores)
    if IN_TERMS:
        place = grad_logits + token[:, None] * (3 * EXPERTS) + expert[None, :]
        for term in tl.static_range(3):
            rounded = grad.to(tl.bfloat16)
            tl.store(place + term * EXPERTS, rounded, mask=is_real)
            grad = grad - rounded.to(tl.float32)
    else:
        tl.store(grad_logits + token[:, None] * EXPERTS + expert[None, :], grad, mask=is_real)
