"""How rows travel: once to each rank, once to each node, never more than the bound at once, and in FP8 if asked."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks
from torch import Tensor
from torch import distributed as dist

from model.experts import RoutedRows
from model.packing import decode_rows, encode_rows
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.dispatch import Dispatcher, make_dispatcher
from parallel.mesh import MeshShape, make_mesh
from parallel.tape import Flight, Tape, run_to_end
from parallel.transfer import AllToAll, Collectives, Traffic

WORLD, NUM_EXPERTS, WIDTH, TOKENS = 4, 8, 160, 13


def choices(rank: int, skew: bool) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(TOKENS, NUM_EXPERTS, generator=generator)
    if skew:
        scores[:, 5] = 2.0
    return scores.argsort(-1, descending=True)[:, :3]


def travel(rank: int, node_size: int, max_rows: int, fp8: bool, skew: bool) -> dict[str, Any]:
    """Experts multiply by their number + 1, so that what should come back is known."""
    mesh = make_mesh(MeshShape(world_size=WORLD, ep=WORLD, node_size=node_size))
    parallel, cpu = ParallelConfig(ep=WORLD, max_expert_rows=max_rows, fp8_dispatch=fp8), torch.device("cpu")
    dispatcher: Dispatcher = make_dispatcher(parallel, mesh, NUM_EXPERTS, device=cpu, clock=Clock(cpu))
    arrived: list[int] = []
    sent: list[list[int]] = []
    launch = Collectives.launch

    def watched(self: Collectives, traffic: Traffic, tensors: Sequence[Tensor]) -> Flight:
        if len(tensors) > 1:  # not counts
            sent.append(traffic.leaving(traffic.place))
        return launch(self, traffic, tensors)

    Collectives.launch = watched
    first = rank * NUM_EXPERTS // WORLD

    def experts(routed: RoutedRows) -> Tensor:
        arrived.append(len(routed.rows))
        assert routed.num_choices in (None, int((routed.experts >= 0).sum()))
        factors = torch.where(routed.experts >= 0, routed.weights * (routed.experts + first + 1), 0.0)
        return routed.rows * factors.sum(1, keepdim=True)

    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    weights = torch.rand(TOKENS, 3, generator=generator).requires_grad_()
    chosen = choices(rank, skew)
    tape = Tape()
    counted: list[tuple[int, int]] = []
    routed = RoutedRows(x, chosen, weights)
    announced = dispatcher.announce(chosen)
    steps = dispatcher.run(tape, routed, announced, experts, experts, lambda *seen: counted.append(seen))
    (out,) = tape.cut(run_to_end(steps))
    assert counted == [(sum(arrived), len(arrived))]
    forward_rows, forward_sends = list(arrived), len(sent)
    out.grad = torch.ones_like(out)
    run_to_end(tape.backward())
    factors = (weights * (chosen + 1)).sum(1, keepdim=True).detach()
    seen = decode_rows(encode_rows(x.detach()), WIDTH) if fp8 else x.detach()
    torch.testing.assert_close(out.detach(), seen * factors)
    torch.testing.assert_close(x.grad, factors.expand_as(x))
    assert len(counted) == 1, "the backward pass counts again"
    torch.testing.assert_close(weights.grad, seen.sum(1, keepdim=True) * (chosen + 1))
    dist.barrier()
    return {"arrived": forward_rows, "all_arrived": arrived, "sent": sent[:forward_sends], "chosen": chosen.numpy()}


def distinct(ranks: list[dict[str, Any]], experts_each: int) -> int:
    """How many (token, place) pairs there are when a place holds so many experts."""
    return sum(len({*row}) for rank in ranks for row in (rank["chosen"] // experts_each).tolist())


def exchange(rank: int) -> None:
    """Rank r sends r + m rows to member m, all with the values (r, m)."""
    travelled: list[list[int]] = []
    all_to_all = dist.all_to_all_single

    def watched(out: Tensor, sent: Tensor, arriving: list[int], leaving: list[int], **how: Any) -> Any:
        travelled.append(leaving)
        return all_to_all(out, sent, arriving, leaving, **how)

    dist.all_to_all_single = watched
    turn = [rank, *(member for member in range(WORLD) if member != rank)]
    traffic = Traffic([[start + end for end in range(WORLD)] for start in range(WORLD)], rank)
    assert dist.group.WORLD is not None
    way = AllToAll(Collectives(dist.group.WORLD), traffic, Clock(torch.device("cpu")))

    def rows(pairs: list[tuple[int, int]]) -> Tensor:
        return torch.tensor([pair for pair in pairs for _ in range(sum(pair))]).view(-1, 2)

    (arrived,) = way.send(rows([(rank, member) for member in turn])).wait()
    assert torch.equal(arrived, rows([(member, rank) for member in turn]))
    (back,) = way.send_gradients(arrived).wait()
    assert torch.equal(back, rows([(rank, member) for member in turn]))
    assert all(leaving[rank] == 0 for leaving in travelled)


def test_own_rows_are_first_and_do_not_travel(tmp_path: Path) -> None:
    run_ranks(WORLD, exchange, folder=tmp_path)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("skew", [False, True])
def test_a_token_is_one_row_on_each_rank(tmp_path: Path, skew: bool, fp8: bool) -> None:
    ranks = run_ranks(WORLD, travel, 0, 0, fp8, skew, folder=tmp_path)
    assert sum(sum(rank["arrived"]) for rank in ranks) == distinct(ranks, 2)
    assert distinct(ranks, 2) < WORLD * TOKENS * 3


def test_a_token_crosses_once_to_each_node(tmp_path: Path) -> None:
    ranks = run_ranks(WORLD, travel, 2, 0, False, False, folder=tmp_path)
    # The first transfer of each rank is the one between nodes; it goes to two peers, one a node.
    assert all(len(rank["sent"][0]) == 2 for rank in ranks)
    assert sum(sum(rank["sent"][0]) for rank in ranks) == distinct(ranks, 4)


@pytest.mark.parametrize("skew", [False, True])
def test_no_more_rows_arrive_at_once_than_allowed(tmp_path: Path, skew: bool) -> None:
    bound = 11
    ranks = run_ranks(WORLD, travel, 0, bound, False, skew, folder=tmp_path)
    for rank in ranks:
        assert max(rank["all_arrived"]) <= bound
        assert len(rank["all_arrived"]) == 2 * len(rank["arrived"]), "the backward pass keeps nothing and goes again"
    assert len({len(rank["arrived"]) for rank in ranks}) == 1
    assert sum(sum(rank["arrived"]) for rank in ranks) == distinct(ranks, 2)
    most = max(sum(rank["arrived"]) for rank in ranks)
    assert len(ranks[0]["arrived"]) >= math.ceil(most / bound) > 1
