"""Rows that leave by kernels against those by plain torch, exactly, at sizes that the caller chooses."""

import torch
from kernel_cases import DEVICE, random, rows_apart
from torch import Tensor

from parallel.rows import Leaving, Members, count_by_kernels, count_by_torch, pack_leaving

KINDS = ("even", "few", "none", "one member", "own", "ties", "others")


def draw_experts(kind: str, num_tokens: int, num_choices: int, members: Members) -> Tensor:
    """Choices [T, K] of distinct experts but for ties: of all; some of none, with tokens that have no other; all of
    none; of one member or of this rank's, as far as these have experts; of all but one's."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    num_experts = members.number * members.num_experts
    scores = torch.rand(num_tokens, num_experts, generator=generator, device=DEVICE)
    if kind in ("one member", "own", "others"):
        member = members.place if kind == "own" else members.number - 1
        scores[:, member * members.num_experts :][:, : members.num_experts] += -2 if kind == "others" else 2
    experts = scores.argsort(1, descending=True)[:, :num_choices]
    if kind in ("one member", "own"):
        experts = torch.where(experts // members.num_experts == member, experts, -1)
    elif kind == "none":
        experts = torch.full_like(experts, -1)
    elif kind == "few":
        experts = torch.where(torch.rand(experts.shape, generator=generator, device=DEVICE) < 0.3, experts, -1)
    elif kind == "ties":
        experts = experts[:, :1].expand(-1, num_choices)
    return experts


def one_round(leaving: Leaving) -> Tensor:
    """What the host knows of it."""
    return leaving.members.in_turn(leaving.counts[:1].cpu(), 1)


def check_rounds(members: Members) -> None:
    """Rows counted by kernels that go in two rounds are those counted by torch."""
    experts = draw_experts("few", 30, 3, members)
    x, weights = rows_apart(30, 16, torch.float32, 0), random(30, 3, seed=1)
    results = []
    for count in (count_by_kernels, count_by_torch):
        leaving = count(experts, members)
        whole = one_round(leaving)
        copies, packed = pack_leaving(leaving, x, weights, torch.cat((whole // 2, whole - whole // 2)))
        results.append((copies.slots, copies.choices, packed.rows, packed.experts, packed.weights))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_rows(
    kind: str, num_tokens: int, num_choices: int, members: Members, size: int, dtype: torch.dtype
) -> list[Tensor]:
    """Counts, places, rows and what they take along, and the gradients of tokens and weights."""
    experts = draw_experts(kind, num_tokens, num_choices, members)
    x = rows_apart(num_tokens, size, dtype, 0)
    weights = random(num_tokens, num_choices, seed=1)
    results = []
    for count in (count_by_kernels, count_by_torch):
        leaving = count(experts, members)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weights)]
        copies, packed = pack_leaving(leaving, *leaves, one_round(leaving))
        num_rows = len(packed.rows)
        grads = random(num_rows, size, dtype=dtype, seed=2), random(num_rows, num_choices, seed=3)
        grad_x, grad_weights = torch.autograd.grad([packed.rows, packed.weights], leaves, grads)
        exact = [
            leaving.counts,
            copies.slots,
            copies.choices,
            packed.rows,
            packed.experts,
            packed.weights,
            grad_weights,
        ]
        results.append((exact, grad_x, copies.complete, leaving.in_blocks is None))
    (by_kernels, grad_x, *complete), (by_torch, plain_grad_x, *plain_complete) = results
    assert (complete, plain_complete) == ([plain_complete[0], False], [complete[0], True])
    for actual, expected in zip(by_kernels, by_torch, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # Added up in fp32 in the same order, and rounded once, which the interpreter does by cutting off.
    unit = 2.0**-7 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 1e-6
    torch.testing.assert_close(grad_x, plain_grad_x, rtol=unit, atol=1e-6)
    return [*by_kernels, grad_x]
