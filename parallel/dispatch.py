"""Rows to the ranks that hold their experts, and the results back.

A token goes once to each rank that holds any of its experts, with the choices and weights that are for that rank. There
it is one row; its experts' results are summed there by weight and come back as one row (a partial sum), which the token
adds to the others. With `nodes`, the way has two hops: once to each node, by the rank there that has the sender's
place, which passes the row on to the ranks of its node. Both ways are the same hop over different groups.

The rows of a hop are in order of destination, and of tokens for each. Counts are exchanged once a hop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from model.experts import RoutedRows
from model.permute import Copies, collect, find_copies, spread
from parallel.mesh import Mesh
from parallel.tape import Steps, Tape


@dataclass(frozen=True)
class Hop:
    """Members of `group` hold `num_experts` experts each, in order of rank."""

    group: dist.ProcessGroup
    num_experts: int


class AllToAll:
    """`leaving` rows to each member of a group, `arriving` rows from each; gradients go the other way."""

    def __init__(self, group: dist.ProcessGroup, leaving: Sequence[int], arriving: Sequence[int]) -> None:
        self._group, self._leaving, self._arriving = group, list(leaving), list(arriving)

    def send(self, *tensors: Tensor) -> "_Flight":
        """Launches the transfer of tensors [rows, ...]."""
        return _Flight(self._group, tensors, self._leaving, self._arriving)

    def send_gradients(self, *gradients: Tensor) -> "_Flight":
        """Launches the transfer of the gradients of what arrived."""
        return self.reversed().send(*gradients)

    def reversed(self) -> "AllToAll":
        """The way back."""
        return AllToAll(self._group, self._arriving, self._leaving)


class _Flight:
    """All-to-alls under way."""

    def __init__(
        self, group: dist.ProcessGroup, tensors: Sequence[Tensor], leaving: list[int], arriving: list[int]
    ) -> None:
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._arrived = tuple(tensor.new_empty(sum(arriving), *tensor.shape[1:]) for tensor in tensors)
        self._works = [
            dist.all_to_all_single(out, sent, arriving, leaving, group=group, async_op=True)
            for out, sent in zip(self._arrived, self._sent, strict=True)
        ]

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived, in the order of what was sent."""
        for work in self._works:
            work.wait()
        self._sent.clear()
        return self._arrived


@dataclass(frozen=True)
class Way:
    """How the rows of one hop went, for their way back."""

    copies: Copies
    exchange: AllToAll


class Dispatcher:
    """Carries rows over `hops`, one after another; with none, all experts are here."""

    def __init__(self, hops: Sequence[Hop] = ()) -> None:
        self._hops = tuple(hops)

    def dispatch(self, tape: Tape, routed: RoutedRows) -> Steps[tuple[RoutedRows, list[Way]]]:
        """Rows [T, D] and weights that are leaves, with choices among all experts, to the rows that arrive here, with
        choices among the experts here. Yields while something is under way."""
        ways = []
        for hop in self._hops:
            copies, leaving = _plan(routed.experts, hop)
            arriving = torch.empty_like(leaving)
            work = dist.all_to_all_single(arriving, leaving, group=hop.group, async_op=True)
            yield
            work.wait()
            exchange = AllToAll(hop.group, leaving.tolist(), arriving.tolist())
            packed = _pack(routed, copies, leaving, hop)
            rows, weights = tape.cut(packed.rows, packed.weights)
            choices = exchange.send(packed.experts)
            transfer = tape.launch(exchange, rows, weights)
            yield
            (experts,) = choices.wait()
            rows, weights = tape.arrive(transfer)
            routed = RoutedRows(rows, experts, weights, complete=False)
            ways.append(Way(copies, exchange))
        return routed, ways

    def combine(self, tape: Tape, rows: Tensor, ways: list[Way]) -> Steps[Tensor]:
        """Results [R, D] of the rows that arrived here to the sums of the tokens' results, [T, D]."""
        for way in reversed(ways):
            (leaf,) = tape.cut(rows)
            transfer = tape.launch(way.exchange.reversed(), leaf)
            yield
            (rows,) = tape.arrive(transfer)
            rows = collect(rows, way.copies)
        return rows


def make_dispatcher(mesh: Mesh, num_experts: int) -> Dispatcher:
    """The way to the `num_experts` experts of a layer: none, over an expert group, or over its nodes first."""
    nodes, ranks = dist.get_world_size(mesh.expert_node_peers), dist.get_world_size(mesh.expert_node)
    hops = [Hop(mesh.expert_node_peers, num_experts // nodes), Hop(mesh.expert_node, num_experts // nodes // ranks)]
    return Dispatcher([hop for hop in hops if dist.get_world_size(hop.group) > 1])


def _plan(experts: Tensor, hop: Hop) -> tuple[Copies, Tensor]:
    """The copies that choices [T, K] ask for, and how many go to each member."""
    num_tokens, num_choices = experts.shape
    members = dist.get_world_size(hop.group)
    destinations = torch.where(experts < 0, members, experts // hop.num_experts)
    goes = experts.new_zeros(num_tokens, members + 1, dtype=torch.bool).scatter_(1, destinations, True)[:, :members]
    leaving = goes.sum(0)
    num_rows = int(leaving.sum())
    places = (goes.t().flatten().cumsum(0) - 1).view(members, num_tokens).t()
    slots = torch.where(goes, places, num_rows)
    if members > num_choices:
        slots = slots.sort(1).values[:, :num_choices]
    return find_copies(slots, num_rows, complete=num_rows == slots.numel()), leaving


def _pack(routed: RoutedRows, copies: Copies, leaving: Tensor, hop: Hop) -> RoutedRows:
    """The rows to send. Of a token's choices, each copy has those that are for its destination, counted from the first
    expert there."""
    tokens = copies.tokens
    members = torch.arange(len(leaving), device=tokens.device).repeat_interleave(leaving)
    experts = routed.experts[tokens] - (members * hop.num_experts).unsqueeze(1)
    is_there = (experts >= 0) & (experts < hop.num_experts)
    weights = torch.where(is_there, spread(routed.weights, copies), 0.0)
    return RoutedRows(spread(routed.rows, copies), torch.where(is_there, experts, -1), weights, complete=False)
