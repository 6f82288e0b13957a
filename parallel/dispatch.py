"""Rows to the ranks that hold their experts, and the results back.

A token goes once to each rank that holds any of its experts, with the choices and weights that are for that rank. There
it is one row; its experts' results are summed there by weight and come back as one row (a partial sum), which the token
adds to the others. Where an expert group spans nodes, the way has two hops: once to each node, to the rank there that
has the sender's place, which passes the row on to the ranks of its node. Both are the same hop over other groups.

No token is dropped. If routing is skewed, one rank may get the rows of all others. With a bound on the rows that arrive
at its experts at once, the last hop and the experts' work are done in as many rounds as it takes, each recomputed in
the backward pass, so that the bound holds there too.

The rows of a hop are in order of round, destination and token, those that stay here first. Counts are exchanged once a
hop, before rows. Unless there is a bound, they are the one thing that the host waits for: `announce` launches this, so
that a GPU has work while they are copied to the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from model.experts import RoutedRows
from model.permute import Copies, collect
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.peer_copies import PeerCopies
from parallel.peer_memory import find_obstacle
from parallel.rows import Leaving, Members, count_leaving, pack_leaving
from parallel.tape import UNDER_WAY, Steps, Tape
from parallel.transfer import AllToAll, Carrier, Collectives, Fp8AllToAll, Traffic

Experts = Callable[[RoutedRows], Tensor]
Count = Callable[[int, int], None]
"""Is told, once a pass, how many rows arrive at the experts here, and in how many rounds."""


@dataclass(frozen=True)
class Hop:
    """The members of `group`, in order of rank, hold `num_experts` experts each; how rows and counts go to them."""

    group: dist.ProcessGroup
    num_experts: int
    rows: Carrier
    counts: Carrier

    @property
    def carriers(self) -> tuple[Carrier, ...]:
        """One for both, or two."""
        return tuple(dict.fromkeys((self.rows, self.counts)))

    @property
    def members(self) -> Members:
        """These, for what needs no group."""
        return Members(dist.get_world_size(self.group), self.num_experts, dist.get_rank(self.group))


@dataclass(frozen=True)
class _Way:
    """How the rows of one hop go: which tokens they are copies of, the rows of each round, and the exchange there;
    and how many rows with how many choices arrive here in all rounds."""

    copies: Copies
    rows_of_rounds: tuple[int, ...]
    num_arriving: int
    num_choices: int
    exchanges: tuple[AllToAll, ...]


class Counts(NamedTuple):
    """How many rows, and how many choices of theirs, go from each of the members of a hop to each other: [from, to]."""

    rows: Tensor
    choices: Tensor


class Announcement:
    """Counts of what is `leaving`, on their way to the host. What is sent and received lives until the host has it, as
    several streams use it."""

    def __init__(self, leaving: Leaving, carrier: Carrier, stream: torch.cuda.Stream | None) -> None:
        self.leaving = leaving
        number, place = leaving.members.number, leaving.members.place
        # All counts to each: gathering them would make a copy for every member.
        self._sent = leaving.counts.repeat(number, 1, 1)
        self._flight = carrier.launch(Traffic([[1] * number] * number, place), (self._sent,))
        self._copied: torch.cuda.Event | None = None
        if stream is not None:
            if carrier.needs_multiprocessors:
                # What is launched next waits for them, and so for what was sent before. If a product ran first, they
                # would find no free multiprocessor until its end, and the host nothing left to run beside them.
                self._flight.wait()
            # Another stream waits for it, in which nothing else is queued.
            with torch.cuda.stream(stream):
                arrived = self._arrive()
                self._on_host = torch.empty_like(arrived, device="cpu", pin_memory=True)
                self._on_host.copy_(arrived, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()

    def _arrive(self) -> Tensor:
        """[from, rows or choices, to] on the device in the order of turn, for the current stream, which waits."""
        (arrived,) = self._flight.wait()
        return arrived

    def wait(self) -> Counts:
        """The counts on the host."""
        if self._copied is None:
            on_host = self._arrive().cpu()
        else:
            self._copied.synchronize()
            on_host = self._on_host
        return Counts(*self.leaving.members.in_order(on_host).unbind(1))

    def most_rows(self) -> Tensor:
        """The largest number of rows that arrive at any member, on the device."""
        return self._arrive()[:, 0].sum(0).max()


class Dispatcher:
    """Carries rows over `hops` among the ranks of `group`; with none, all experts are here. At most `max_rows` (0: any
    number) arrive at the experts at once. With `fp8` rows are in FP8 on the way there. `clock` hears of waiting.
    `obstacle` says why no copy engines carry them within a node, where they were to."""

    def __init__(
        self,
        hops: Sequence[Hop],
        *,
        group: dist.ProcessGroup,
        clock: Clock,
        max_rows: int = 0,
        fp8: bool = False,
        obstacle: str = "",
    ) -> None:
        self.hops, self.obstacle = tuple(hops), obstacle
        self._clock = clock
        self._group = group
        self._stream: torch.cuda.Stream | None = None
        self._max_rows = max_rows
        self._exchange = Fp8AllToAll if fp8 else AllToAll

    @property
    def num_bytes(self) -> int:
        """Of the device's memory that carriers keep, beside tensors."""
        return sum(carrier.num_bytes for hop in self.hops for carrier in hop.carriers)

    def close(self) -> None:
        """Gives back what carriers keep. All ranks must, when they are done."""
        for hop in self.hops:
            for carrier in hop.carriers:
                carrier.close()

    @property
    def travels(self) -> bool:
        """Whether rows go anywhere. If not, `run` leaves nothing on the tape, and its inputs need not be leaves."""
        return bool(self.hops)

    def announce(self, experts: Tensor) -> Announcement | None:
        """Tells the others how many rows will come, for choices [T, K] among all experts. While the host learns it, the
        device has what is launched until `run`."""
        return self._announce(self.hops[0], experts) if self.hops else None

    def _announce(self, hop: Hop, experts: Tensor) -> Announcement:
        if experts.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(experts.device)
        return Announcement(count_leaving(experts, hop.members), hop.counts, self._stream)

    def run(
        self,
        tape: Tape,
        routed: RoutedRows,
        announced: Announcement | None,
        experts: Experts,
        experts_at_once: Experts,
        count: Count,
    ) -> Steps[Tensor]:
        """What the tokens [T, D] get from their experts, whose choices were announced. Rows and weights are leaves;
        choices are among all experts. `experts` are those that live here, `experts_at_once` the same without deferring
        anything. Yields while counts or rows are under way."""
        if announced is None:
            count(len(routed.rows), 1)
            return experts(routed)
        return (yield from self._run(self.hops, announced, tape, routed, experts, experts_at_once, count))

    def _run(
        self,
        hops: tuple[Hop, ...],
        announced: Announcement,
        tape: Tape,
        routed: RoutedRows,
        experts: Experts,
        experts_at_once: Experts,
        count: Count,
    ) -> Steps[Tensor]:
        yield UNDER_WAY
        bound = self._max_rows if len(hops) == 1 else 0
        way, packed = self._prepare(hops[0], announced, routed, bound=bound)
        if len(hops) == 1:
            count(way.num_arriving, len(way.exchanges))
        if len(way.exchanges) == 1:
            rows, weights = tape.cut(packed.rows, packed.weights)
            there = self._there_and_back(
                way.exchanges[0],
                packed.experts,
                way.num_choices,
                lambda tape, arrived: self._go_on(hops[1:], tape, arrived, experts, experts_at_once, count),
            )
            results = yield from there(tape, rows, weights)
            return collect(results, way.copies)
        parts, sizes, num_rounds = [], way.rows_of_rounds, len(way.exchanges)
        pieces = tape.cut(*packed.rows.split(sizes), *packed.weights.split(sizes))
        for number, choices in enumerate(packed.experts.split(sizes)):
            there = self._there_and_back(
                way.exchanges[number],
                choices,
                None,
                lambda tape, arrived: self._go_on((), tape, arrived, experts_at_once, experts_at_once, count),
            )
            parts.append((yield from tape.run_twice(there, pieces[number], pieces[num_rounds + number])))
        return collect(torch.cat(parts), way.copies)

    def _go_on(
        self, hops: tuple[Hop, ...], tape: Tape, arrived: RoutedRows, experts: Experts, *others: Any
    ) -> Steps[Tensor]:
        """From where rows have arrived to their experts."""
        if not hops:
            return experts(arrived)
        announced = self._announce(hops[0], arrived.experts)
        return (yield from self._run(hops, announced, tape, arrived, experts, *others))

    def _there_and_back(
        self,
        exchange: AllToAll,
        choices: Tensor,
        num_choices: int | None,
        work: Callable[[Tape, RoutedRows], Steps[Tensor]],
    ) -> Callable[..., Steps[Tensor]]:
        """A part of the pass: sends leaves, works where they arrive with `num_choices` of experts there if that is
        known, brings the results back as a leaf."""

        def part(tape: Tape, rows: Tensor, weights: Tensor) -> Steps[Tensor]:
            transfer = tape.launch(exchange, rows, weights, choices)
            yield UNDER_WAY
            rows, weights, experts = tape.arrive(transfer)
            results = yield from work(tape, RoutedRows(rows, experts, weights, False, num_choices))
            (leaf,) = tape.cut(results, weights_last=True)
            transfer = tape.launch(exchange.reversed(), leaf)
            yield UNDER_WAY
            (back,) = tape.arrive(transfer)
            return back

        return part

    def _count_rounds(self, counts: Counts, announced: Announcement, bound: int) -> int:
        """How many rounds keep the rows that arrive under the bound, the same on all ranks of the expert group: else
        passes that take turns would take them differently."""
        most = counts.rows.sum(0).max()
        if len(self.hops) > 1:
            most = announced.most_rows()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        return max(-(-int(most) // (bound - len(counts.rows))), 1)

    def _prepare(self, hop: Hop, announced: Announcement, routed: RoutedRows, *, bound: int) -> tuple[_Way, RoutedRows]:
        """Finds out what goes where, in how many rounds, and copies it into the order of sending."""
        with self._clock.phase("all_to_all"):
            counts = announced.wait()
        members = announced.leaving.members
        place = members.place
        sizes = _sizes_of_rounds(counts.rows, self._count_rounds(counts, announced, bound) if bound else 1)
        leaving = members.in_turn(sizes[:, place], 1)
        copies, packed = pack_leaving(announced.leaving, routed.rows, routed.weights, leaving)
        exchanges = [self._exchange(hop.rows, Traffic(rows, place), self._clock) for rows in sizes.tolist()]
        num_arriving, num_choices = (int(count[:, place].sum()) for count in counts)
        way = _Way(copies, tuple(leaving.sum(1).tolist()), num_arriving, num_choices, tuple(exchanges))
        return way, packed


def make_dispatcher(
    parallel: ParallelConfig, mesh: Mesh, num_experts: int, *, device: torch.device, clock: Clock
) -> Dispatcher:
    """The way to the `num_experts` experts of a layer: none, over an expert group, or over its nodes first."""
    nodes, ranks = dist.get_world_size(mesh.expert_node_peers), dist.get_world_size(mesh.expert_node)
    hops, obstacle = [], ""
    if nodes > 1:
        between = Collectives(mesh.expert_node_peers)
        hops.append(Hop(mesh.expert_node_peers, num_experts // nodes, between, between))
    if ranks > 1:
        rows: Carrier = Collectives(mesh.expert_node)
        counts = rows
        if parallel.copy_engines and not (obstacle := find_obstacle(mesh.expert_node, device)):
            # Counts do not queue behind rows.
            rows, counts = PeerCopies(mesh.expert_node, device), PeerCopies(mesh.expert_node, device)
        hops.append(Hop(mesh.expert_node, num_experts // nodes // ranks, rows, counts))
    return Dispatcher(
        hops,
        group=mesh.expert,
        clock=clock,
        max_rows=parallel.max_expert_rows,
        fp8=parallel.fp8_dispatch,
        obstacle=obstacle,
    )


def _sizes_of_rounds(counts: Tensor, num_rounds: int) -> Tensor:
    """Divides each of the counts [from, to] evenly: [num_rounds, from, to]."""
    edges = -(-torch.arange(num_rounds + 1)[:, None, None] * counts // num_rounds)
    return edges.diff(dim=0)
