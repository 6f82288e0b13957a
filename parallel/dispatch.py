"""Rows to the ranks that hold their experts, and the results back.

A token goes once to each rank that holds any of its experts, with the choices and weights that are for that rank. There
it is one row; its experts' results are summed there by weight and come back as one row (a partial sum), which the token
adds to the others. Where an expert group spans nodes, the way has two hops: once to each node, to the rank there that
has the sender's place, which passes the row on to the ranks of its node. Both are the same hop over other groups.

No token is dropped. If routing is skewed, one rank may get the rows of all others. With a bound on the rows that arrive
at its experts at once, the last hop and the experts' work are done in as many rounds as it takes, each recomputed in
the backward pass, so that the bound holds there too.

The rows of a hop are in order of round, destination and token. Counts are exchanged once a hop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from model.experts import RoutedRows
from model.permute import Copies, collect, find_copies, spread
from parallel.clock import Clock
from parallel.mesh import Mesh
from parallel.tape import Steps, Tape
from parallel.transfer import AllToAll, Fp8AllToAll

Experts = Callable[[RoutedRows], Tensor]
Count = Callable[[int, int], None]
"""Is told, once a pass, how many rows arrive at the experts here, and in how many rounds."""


@dataclass(frozen=True)
class Hop:
    """The members of `group`, in order of rank, hold `num_experts` experts each."""

    group: dist.ProcessGroup
    num_experts: int


@dataclass(frozen=True)
class _Way:
    """How the rows of one hop go: which tokens they are copies of, the rows of each round, and the exchange there;
    and how many arrive here in all rounds."""

    copies: Copies
    rows_of_rounds: tuple[int, ...]
    num_arriving: int
    exchanges: tuple[AllToAll, ...]


class Dispatcher:
    """Carries rows over `hops` among the ranks of `group`; with none, all experts are here. At most `max_rows` (0: any
    number) arrive at the experts at once. With `fp8` rows are in FP8 on the way there. `clock` hears of waiting."""

    def __init__(
        self, hops: Sequence[Hop], *, group: dist.ProcessGroup, clock: Clock, max_rows: int = 0, fp8: bool = False
    ) -> None:
        self._hops = tuple(hops)
        self._clock = clock
        self._group = group
        self._max_rows = max_rows
        self._exchange = Fp8AllToAll if fp8 else AllToAll

    @property
    def travels(self) -> bool:
        """Whether rows go anywhere. If not, `run` leaves nothing on the tape, and its inputs need not be leaves."""
        return bool(self._hops)

    def run(
        self, tape: Tape, routed: RoutedRows, experts: Experts, experts_at_once: Experts, count: Count
    ) -> Steps[Tensor]:
        """What the tokens [T, D] get from their experts. Rows and weights are leaves; choices are among all experts.
        `experts` are those that live here, `experts_at_once` the same without deferring anything. Yields while
        something is under way."""
        if not self._hops:
            count(len(routed.rows), 1)
        return (yield from self._run(self._hops, tape, routed, experts, experts_at_once, count))

    def _run(
        self,
        hops: tuple[Hop, ...],
        tape: Tape,
        routed: RoutedRows,
        experts: Experts,
        experts_at_once: Experts,
        count: Count,
    ) -> Steps[Tensor]:
        if not hops:
            return experts(routed)
        way, packed = yield from self._prepare(hops[0], routed, bound=self._max_rows if len(hops) == 1 else 0)
        if len(hops) == 1:
            count(way.num_arriving, len(way.exchanges))
        if len(way.exchanges) == 1:
            rows, weights = tape.cut(packed.rows, packed.weights)
            there = self._there_and_back(
                way.exchanges[0],
                packed.experts,
                lambda tape, arrived: self._run(hops[1:], tape, arrived, experts, experts_at_once, count),
            )
            results = yield from there(tape, rows, weights)
            return collect(results, way.copies)
        parts, sizes, num_rounds = [], way.rows_of_rounds, len(way.exchanges)
        pieces = tape.cut(*packed.rows.split(sizes), *packed.weights.split(sizes))
        for number, choices in enumerate(packed.experts.split(sizes)):
            there = self._there_and_back(
                way.exchanges[number],
                choices,
                lambda tape, arrived: self._run((), tape, arrived, experts_at_once, experts_at_once, count),
            )
            parts.append((yield from tape.run_twice(there, pieces[number], pieces[num_rounds + number])))
        return collect(torch.cat(parts), way.copies)

    def _there_and_back(
        self, exchange: AllToAll, choices: Tensor, work: Callable[[Tape, RoutedRows], Steps[Tensor]]
    ) -> Callable[..., Steps[Tensor]]:
        """A part of the pass: sends leaves, works where they arrive, brings the results back as a leaf."""

        def part(tape: Tape, rows: Tensor, weights: Tensor) -> Steps[Tensor]:
            choices_in_flight = AllToAll.send(exchange, choices)
            transfer = tape.launch(exchange, rows, weights)
            yield
            (experts,) = choices_in_flight.wait()
            rows, weights = tape.arrive(transfer)
            results = yield from work(tape, RoutedRows(rows, experts, weights, complete=False))
            (leaf,) = tape.cut(results)
            transfer = tape.launch(exchange.reversed(), leaf)
            yield
            (back,) = tape.arrive(transfer)
            return back

        return part

    def _count_rounds(self, counts: Tensor, bound: int) -> int:
        """How many rounds keep the rows that arrive under the bound, the same on all ranks of the expert group: else
        passes that take turns would take them differently."""
        most = counts.sum(0).max()
        if len(self._hops) > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return max(-(-int(most) // (bound - len(counts))), 1)

    def _prepare(self, hop: Hop, routed: RoutedRows, *, bound: int) -> Steps[tuple[_Way, RoutedRows]]:
        """Finds out what goes where, in how many rounds, and copies it into the order of sending."""
        goes = _destinations(routed.experts, hop)
        leaving = goes.sum(0)
        members, place = len(leaving), dist.get_rank(hop.group)
        everyones = [torch.empty_like(leaving) for _ in range(members)]
        work = dist.all_gather(everyones, leaving, group=hop.group, async_op=True)
        yield
        with self._clock.phase("all_to_all"):
            work.wait()
        # [from, to]
        counts = torch.stack(everyones)
        num_rounds = self._count_rounds(counts, bound) if bound else 1
        counts = counts.cpu()
        sizes = _sizes_of_rounds(counts, num_rounds)
        copies, rounds = _order(goes, sizes[:, place].to(goes.device), routed.experts.shape[1])
        exchanges = [
            self._exchange(hop.group, size[place].tolist(), size[:, place].tolist(), self._clock) for size in sizes
        ]
        way = _Way(copies, tuple(sizes[:, place].sum(1).tolist()), int(counts[:, place].sum()), tuple(exchanges))
        return way, _pack(routed, copies, rounds, hop)


def make_dispatcher(mesh: Mesh, num_experts: int, *, max_rows: int, fp8: bool, clock: Clock) -> Dispatcher:
    """The way to the `num_experts` experts of a layer: none, over an expert group, or over its nodes first."""
    nodes, ranks = dist.get_world_size(mesh.expert_node_peers), dist.get_world_size(mesh.expert_node)
    hops = [Hop(mesh.expert_node_peers, num_experts // nodes), Hop(mesh.expert_node, num_experts // nodes // ranks)]
    hops = [hop for hop in hops if dist.get_world_size(hop.group) > 1]
    return Dispatcher(hops, group=mesh.expert, max_rows=max_rows, fp8=fp8, clock=clock)


def _destinations(experts: Tensor, hop: Hop) -> Tensor:
    """Which members the tokens of choices [T, K] go to: [T, members], boolean."""
    members = dist.get_world_size(hop.group)
    chosen = torch.where(experts < 0, members, experts // hop.num_experts)
    return experts.new_zeros(len(experts), members + 1, dtype=torch.bool).scatter_(1, chosen, True)[:, :members]


def _sizes_of_rounds(counts: Tensor, num_rounds: int) -> Tensor:
    """Divides each of the counts [from, to] evenly: [num_rounds, from, to]."""
    edges = -(-torch.arange(num_rounds + 1)[:, None, None] * counts // num_rounds)
    return edges.diff(dim=0)


def _order(goes: Tensor, sizes: Tensor, num_choices: int) -> tuple[Copies, Tensor]:
    """The copies that `goes` [T, members] asks for, in order of round, member and token, when `sizes`
    [rounds, members] of them go in each round; and the member that each row goes to."""
    members = goes.shape[1]
    num_rows = int(sizes.sum())
    number = goes.long().cumsum(0) - 1
    ends = sizes.cumsum(0)
    rounds = (number.unsqueeze(0) >= ends.unsqueeze(1)).sum(0).clamp(max=len(sizes) - 1)
    # Where a (round, member) begins among all rows, less the rows that its member got in earlier rounds.
    begins = (sizes.flatten().cumsum(0) - sizes.flatten()).view_as(sizes) - (ends - sizes)
    places = number + begins.gather(0, rounds)
    slots = torch.where(goes, places, num_rows)
    if members > num_choices:
        slots = slots.sort(1).values[:, :num_choices].contiguous()  # without the rest of what was sorted
    members_of_rows = torch.arange(members, device=goes.device).repeat(len(sizes)).repeat_interleave(sizes.flatten())
    return find_copies(slots, num_rows, complete=num_rows == slots.numel()), members_of_rows


def _pack(routed: RoutedRows, copies: Copies, members: Tensor, hop: Hop) -> RoutedRows:
    """The rows to send. Of a token's choices, each copy has those that are for its destination, counted from the first
    expert there."""
    experts = routed.experts[copies.tokens] - (members * hop.num_experts).unsqueeze(1)
    is_there = (experts >= 0) & (experts < hop.num_experts)
    weights = torch.where(is_there, spread(routed.weights, copies), 0.0)
    return RoutedRows(spread(routed.rows, copies), torch.where(is_there, experts, -1), weights, complete=False)
