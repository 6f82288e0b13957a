"""What a schedule costs, whether it can be carried out, and which transfers carry it out.

A rank begins a step when it has ended the one before and everything the step reads has arrived: the activation of the
stage before for F, the gradient of the stage after for B and I. From the times follow the bubble, the activations held,
and the places of sends and receives.

The bubble of a rank is the time of the whole run less the time it works. With equal stages and no time for sending it
is what `parallel.schedule` states, exactly.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, Protocol

from parallel.schedule import Action, Kind, Overlapped, Schedule, Step, actions_of

Payload = Literal["activation", "gradient"]
GIVES_GRADIENT = (Kind.BACKWARD, Kind.INPUT_GRAD)


class ScheduleError(Exception):
    """A schedule that cannot be carried out or does not do all the work."""


class StepCosts(Protocol):
    """How long each step takes, and a transfer between ranks."""

    @property
    def send(self) -> float:
        """Duration of a transfer."""

    def of_step(self, step: Step) -> float:
        """Duration of a step."""


@dataclass(frozen=True)
class Costs:
    """How long steps take, in any unit: F, full B, its part W (so I = B - W), the pair F&B (None: F + B; a pair with I
    takes W less), and a transfer between ranks. Integers and `Fraction`s give exact results."""

    forward: float
    backward: float
    weight: float
    overlapped: float | None = None
    send: float = 0

    def of_step(self, step: Step) -> float:
        """Duration of a step."""
        if isinstance(step, Overlapped):
            both = self.forward + self.backward if self.overlapped is None else self.overlapped
            return both if step.backward.kind is Kind.BACKWARD else both - self.weight
        if step.kind is Kind.FORWARD:
            return self.forward
        if step.kind is Kind.WEIGHT_GRAD:
            return self.weight
        return self.backward if step.kind is Kind.BACKWARD else self.backward - self.weight


UNIT = Costs(forward=1, backward=2, weight=1)


@dataclass(frozen=True)
class Span:
    """When a step runs."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every rank does what."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """When the last rank ends."""
        return max((spans[-1].end for spans in self.spans if spans), default=0)

    def idle(self, rank: int) -> float:
        """How long a rank waits, the time before its first and after its last step included."""
        return self.makespan - sum(span.end - span.start for span in self.spans[rank])

    @property
    def bubbles(self) -> tuple[float, ...]:
        """`idle` of every rank."""
        return tuple(self.idle(rank) for rank in range(len(self.spans)))

    @property
    def bubble(self) -> float:
        """`idle` of the rank that waits longest."""
        return max(self.bubbles)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """The most micro-batches whose activations each rank holds at once, counted once per stage: from the start of F
        to the end of B or W."""
        return tuple(_peak(span.step for span in spans) for spans in self.spans)

    @property
    def peak_share(self) -> tuple[Fraction, ...]:
        """The same in units of one micro-batch's activations in the whole model."""
        return tuple(Fraction(peak, self.schedule.num_stages) for peak in self.peak_activations)


def _peak(steps: Iterable[Step]) -> int:
    live = peak = 0
    for step in steps:
        kinds = [action.kind for action in actions_of(step)]
        live += kinds.count(Kind.FORWARD)
        peak = max(peak, live)
        live -= kinds.count(Kind.BACKWARD) + kinds.count(Kind.WEIGHT_GRAD)
    return peak


_Result = tuple[Literal["activation", "gradient", "weight parts"], int, int]
"""What an action leaves for others, its stage and micro-batch."""


def _needs(action: Action, num_stages: int) -> Iterator[_Result]:
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.FORWARD:
        if stage > 0:
            yield "activation", stage - 1, micro_batch
    elif action.kind is Kind.WEIGHT_GRAD:
        yield "weight parts", stage, micro_batch
    else:
        yield "activation", stage, micro_batch
        if stage < num_stages - 1:
            yield "gradient", stage + 1, micro_batch


def _gives(action: Action) -> Iterator[_Result]:
    if action.kind is Kind.FORWARD:
        yield "activation", action.stage, action.micro_batch
    if action.kind in GIVES_GRADIENT:
        yield "gradient", action.stage, action.micro_batch
    if action.kind is Kind.INPUT_GRAD:
        yield "weight parts", action.stage, action.micro_batch


def simulate(schedule: Schedule, costs: StepCosts | Callable[[Action], float]) -> Timeline:
    """The times of all steps, with the costs of each step, or of each action (then sends are free and a pair takes the
    sum). Raises ScheduleError where ranks wait for one another for ever."""
    send = 0 if callable(costs) else costs.send
    spans: list[list[Span]] = [[] for _ in schedule.steps]
    ended: dict[_Result, tuple[float, int]] = {}
    waiting: defaultdict[_Result, list[int]] = defaultdict(list)
    ready = deque(range(len(schedule.steps)))
    while ready:
        rank = ready.popleft()
        steps, row = schedule.steps[rank], spans[rank]
        while len(row) < len(steps):
            step, start = steps[len(row)], row[-1].end if row else 0
            needs = [need for action in actions_of(step) for need in _needs(action, schedule.num_stages)]
            missing = next((need for need in needs if need not in ended), None)
            if missing is not None:
                waiting[missing].append(rank)
                break
            for end, source in map(ended.__getitem__, needs):
                start = max(start, end if source == rank else end + send)
            row.append(Span(step, start, start + _duration(step, costs)))
            for result in (result for action in actions_of(step) for result in _gives(action)):
                ended[result] = row[-1].end, rank
                ready.extend(waiting.pop(result, ()))
    for (name, stage, micro_batch), (rank, *_) in waiting.items():
        place = len(spans[rank])
        raise ScheduleError(
            f"rank {rank} waits for ever: its step {place}, {schedule.steps[rank][place]}, needs the {name} of stage "
            f"{stage} for micro-batch {micro_batch}"
        )
    return Timeline(schedule, tuple(tuple(row) for row in spans))


def _duration(step: Step, costs: StepCosts | Callable[[Action], float]) -> float:
    return sum(costs(action) for action in actions_of(step)) if callable(costs) else costs.of_step(step)


def validate(schedule: Schedule) -> None:
    """Raises ScheduleError unless every stage runs every micro-batch forward once, and backward once or as I and W once
    each, on its rank, in an order that can be carried out."""
    if len(schedule.steps) != schedule.num_ranks:
        raise ScheduleError(f"{len(schedule.steps)} lists of steps for {schedule.num_ranks} ranks")
    counts: Counter[Action] = Counter()
    for rank, steps in enumerate(schedule.steps):
        for step in steps:
            _check_step(schedule, rank, step)
            counts.update(actions_of(step))
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.num_micro_batches):
            _check_counts(counts, stage, micro_batch)
    simulate(schedule, UNIT)


def _check_step(schedule: Schedule, rank: int, step: Step) -> None:
    if isinstance(step, Overlapped) and (step.forward.kind != Kind.FORWARD or step.backward.kind not in GIVES_GRADIENT):
        raise ScheduleError(f"rank {rank}: {step} overlaps something else than F with B or I")
    for action in actions_of(step):
        if not 0 <= action.stage < schedule.num_stages or not 0 <= action.micro_batch < schedule.num_micro_batches:
            raise ScheduleError(
                f"rank {rank}: {action} is outside of {schedule.num_stages} stages and {schedule.num_micro_batches} "
                "micro-batches"
            )
        where = schedule.rank_of(action.stage, action.micro_batch)
        if rank != where:
            raise ScheduleError(f"rank {rank}: {action} belongs on rank {where}")


def _check_counts(counts: Counter[Action], stage: int, micro_batch: int) -> None:
    found = {kind: counts[Action(kind, stage, micro_batch)] for kind in Kind}
    backward = found[Kind.BACKWARD], found[Kind.INPUT_GRAD], found[Kind.WEIGHT_GRAD]
    if found[Kind.FORWARD] != 1 or backward not in ((1, 0, 0), (0, 1, 1)):
        runs = ", ".join(f"{kind.value} {count} times" for kind, count in found.items())
        raise ScheduleError(
            f"stage {stage}, micro-batch {micro_batch} runs {runs}; it needs F once, and B once or I and W once each"
        )


@dataclass(frozen=True)
class Transfer:
    """A tensor on its way between ranks. `stage` is the one that consumes it, an activation in F and a gradient in B or
    I; `peer` is the rank at the other end."""

    payload: Payload
    stage: int
    micro_batch: int
    peer: int


@dataclass(frozen=True)
class Send(Transfer):
    """Leaves; whoever carries it out does not wait."""


@dataclass(frozen=True)
class Recv(Transfer):
    """Is asked for; the step that consumes it waits."""


Op = Step | Send | Recv


def lower(schedule: Schedule) -> tuple[tuple[Op, ...], ...]:
    """The steps of every rank with the transfers between ranks. At the simulated moment a step ends, what it gives is
    sent, and asked for by the rank that needs it. All lists are filled in one order of moments, so the two ends of a
    channel see the same order, in both directions taken together, and the earliest transfer under way never waits for a
    later one. Neighbouring stages on one rank need no transfer."""
    lists: list[list[Op]] = [[] for _ in schedule.steps]
    spans = [(rank, span) for rank, row in enumerate(simulate(schedule, UNIT).spans) for span in row]
    # At one moment, what ends comes before what starts.
    events = [(span.end, 0, rank, span.step) for rank, span in spans]
    events += [(span.start, 1, rank, span.step) for rank, span in spans]
    for _, starts, rank, step in sorted(events, key=lambda event: event[:3]):
        if starts:
            lists[rank].append(step)
            continue
        for action in actions_of(step):
            for payload, stage in _outputs(action, schedule.num_stages):
                peer = schedule.rank_of(stage, action.micro_batch)
                if peer != rank:
                    lists[rank].append(Send(payload, stage, action.micro_batch, peer))
                    lists[peer].append(Recv(payload, stage, action.micro_batch, rank))
    return tuple(tuple(ops) for ops in lists)


def _outputs(action: Action, num_stages: int) -> Iterator[tuple[Payload, int]]:
    """What an action gives to another stage, and which."""
    if action.kind == Kind.FORWARD and action.stage < num_stages - 1:
        yield "activation", action.stage + 1
    if action.kind in GIVES_GRADIENT and action.stage > 0:
        yield "gradient", action.stage - 1


def check_lowering(schedule: Schedule, lowered: tuple[tuple[Op, ...], ...]) -> None:
    """Raises ScheduleError unless the lists hold exactly the steps of the schedule, each after the receipts it consumes
    and followed by what it sends; the k-th send of a channel (source, destination, payload) is its k-th receipt; and
    the lists run to their end even where every rank carries out the transfers of a payload one after another, each
    waiting for its other end."""
    for rank, (steps, ops) in enumerate(zip(schedule.steps, lowered, strict=True)):
        if tuple(op for op in ops if not isinstance(op, Transfer)) != steps:
            raise ScheduleError(f"rank {rank}: the steps are not those of the schedule")
        _check_places(schedule, rank, ops)
    sent, received = (_channels(lowered, kind) for kind in (Send, Recv))
    for channel in sent.keys() | received.keys():
        if sent[channel] != received[channel]:
            raise ScheduleError(f"channel {channel}: sent {sent[channel]}, received {received[channel]}")
    _check_progress(lowered)


def _check_places(schedule: Schedule, rank: int, ops: tuple[Op, ...]) -> None:
    """Receipts before their consumer; sends after their producer, with nothing but transfers between."""
    arrived: set[tuple[Payload, int, int]] = set()
    outputs: set[tuple[Payload, int, int]] = set()
    for op in ops:
        if isinstance(op, Recv):
            arrived.add((op.payload, op.stage, op.micro_batch))
        elif isinstance(op, Send):
            if (op.payload, op.stage, op.micro_batch) not in outputs:
                raise ScheduleError(f"rank {rank}: {op} does not follow the step that gives it")
            outputs.remove((op.payload, op.stage, op.micro_batch))
        else:
            if outputs:
                raise ScheduleError(f"rank {rank}: {sorted(outputs)} not sent before {op}")
            inputs = {entry for action in actions_of(op) for entry in _inputs(schedule, rank, action)}
            if not inputs <= arrived:
                raise ScheduleError(f"rank {rank}: {op} begins before {sorted(inputs - arrived)} are asked for")
            arrived -= inputs
            outputs = {
                (payload, stage, action.micro_batch)
                for action in actions_of(op)
                for payload, stage in _outputs(action, schedule.num_stages)
                if schedule.rank_of(stage, action.micro_batch) != rank
            }
    if arrived or outputs:
        raise ScheduleError(f"rank {rank}: {sorted(arrived)} never consumed, {sorted(outputs)} never sent")


def _inputs(schedule: Schedule, rank: int, action: Action) -> Iterator[tuple[Payload, int, int]]:
    """What an action gets from another rank."""
    stage, micro_batch = action.stage, action.micro_batch
    for name, source, _ in _needs(action, schedule.num_stages):
        if name != "weight parts" and schedule.rank_of(source, micro_batch) != rank:
            yield name, stage, micro_batch


def _channels(
    lowered: tuple[tuple[Op, ...], ...], kind: type[Send] | type[Recv]
) -> defaultdict[tuple[int, int, Payload], list[tuple[int, int]]]:
    """(stage, micro-batch) of the transfers of one kind by source, destination and payload, in order."""
    channels: defaultdict[tuple[int, int, Payload], list[tuple[int, int]]] = defaultdict(list)
    for rank, ops in enumerate(lowered):
        for op in ops:
            if isinstance(op, kind):
                source, destination = (rank, op.peer) if isinstance(op, Send) else (op.peer, rank)
                channels[source, destination, op.payload].append((op.stage, op.micro_batch))
    return channels


def _check_progress(lowered: tuple[tuple[Op, ...], ...]) -> None:
    """That every rank can go through its list even if each transfer waits for its other end. Steps are left out: what
    they consume is asked for, here even arrived, before they begin."""
    queues = [deque(op for op in ops if isinstance(op, Transfer)) for ops in lowered]
    ready = deque(range(len(queues)))
    while ready:
        rank = ready.popleft()
        while queues[rank]:
            op = queues[rank][0]
            if not queues[op.peer] or not _are_ends(op, rank, queues[op.peer][0]):
                break
            queues[rank].popleft()
            queues[op.peer].popleft()
            ready.append(op.peer)
    for rank, queue in enumerate(queues):
        if queue:
            raise ScheduleError(f"rank {rank} waits for ever for the other end of {queue[0]}")


def _are_ends(op: Transfer, rank: int, other: Transfer) -> bool:
    one, two = ((end.payload, end.stage, end.micro_batch) for end in (op, other))
    return type(op) is not type(other) and other.peer == rank and one == two
