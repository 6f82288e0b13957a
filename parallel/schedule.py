"""In which order the ranks of a pipeline work: pure data, made without a process.

A model is cut in stages, a batch in micro-batches. Each stage runs each micro-batch forward (F) and then backward,
either at once (B) or as input gradient (I), which the stage before waits for, and weight gradient (W), which nobody
waits for and which therefore fills gaps. Two steps may be overlapped: F of one micro-batch beside B of another, so that
the all-to-alls of one are hidden under the arithmetic of the other. A schedule lists the steps of every rank.

1f1b       one forward, one backward. Bubble (PP - 1)(F + B).
zb1p       ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): the weight gradients of 1f1b are put off, on
           rank r by r micro-batches, so that all ranks hold as much as rank 0. Bubble (PP - 1)(F + B - 2W).
zbv        ZB-V of "Pipeline Parallelism with Controllable Memory" (arXiv 2405.15362): two stages on each rank, laid out
           as a V, no more activations than 1f1b. Bubble (PP / 2 - 1) F where F = I = W: only the way to the last rank.
dualpipe   of the DeepSeek-V3 report, section 3.2.1: micro-batches enter at both ends, and each rank holds a stage of
           either direction. Bubble (PP / 2 - 1)(F&B + B - 3W).
dualpipev  the same folded in the middle: one direction, half as many ranks, with the two stages of a pair on one rank.

PP is the number of stages. With equal stages and free sends, the rank that waits longest waits exactly that long: 1f1b
always, zb1p if W <= F and W <= I, dualpipe and dualpipev if F <= I and W <= I; otherwise longer. `parallel.simulate`
measures it for any costs.

To fill the pipeline, zb1p needs as many micro-batches as ranks, those with two stages a rank twice as many. A schedule
of fewer is that of this least number without the last micro-batches of each direction: nothing waits for what is left
out, an overlapped pair may lose a half, memory only falls, and the bubble is longer than stated.
"""

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

ScheduleName = Literal["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"]
FOLDED = ("zbv", "dualpipev")
# Micro-batches a rank that fill the pipeline, where it is not 2.
_FILLED = {"1f1b": 0, "zb1p": 1}


class Kind(enum.Enum):
    """What a step computes; B is I and W at once."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"


URGENCY = Kind.INPUT_GRAD, Kind.FORWARD, Kind.WEIGHT_GRAD


@dataclass(frozen=True)
class Action:
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.stage}.{self.micro_batch}"


@dataclass(frozen=True)
class Overlapped:
    """The forward pass of one micro-batch beside the backward pass (B or I) of another."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Step = Action | Overlapped


def actions_of(step: Step) -> tuple[Action, ...]:
    """The one or two actions of a step, forward first."""
    return (step.forward, step.backward) if isinstance(step, Overlapped) else (step,)


@dataclass(frozen=True)
class Schedule:
    """The steps of each rank of a pipeline, in order."""

    name: ScheduleName
    num_ranks: int
    num_stages: int
    num_micro_batches: int
    steps: tuple[tuple[Step, ...], ...]

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """Where a stage runs a micro-batch. Only in "dualpipe", whose second half of micro-batches goes the other way,
        does it depend on the micro-batch."""
        if self.name in FOLDED:
            return min(stage, self.num_stages - 1 - stage)
        if self.name == "dualpipe" and micro_batch >= self.num_micro_batches // 2:
            return self.num_ranks - 1 - stage
        return stage

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages a rank holds, ascending."""
        mirrored = self.num_stages - 1 - rank
        return (rank,) if self.name in ("1f1b", "zb1p") else (min(rank, mirrored), max(rank, mirrored))


def num_stages(name: ScheduleName, num_ranks: int) -> int:
    """In how many stages a schedule cuts the model."""
    return 2 * num_ranks if name in FOLDED else num_ranks


def make_schedule(name: ScheduleName, *, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule of that name. Raises ValueError where it does not exist for these numbers."""
    _check(name, num_ranks, num_micro_batches)
    least = _FILLED.get(name, 2) * num_ranks
    if num_micro_batches < least:
        return _shortened(make_schedule(name, num_ranks=num_ranks, num_micro_batches=least), num_micro_batches)
    if name == "zbv":
        steps = _zbv(num_ranks, num_micro_batches)
    else:
        generate = {"1f1b": _1f1b, "zb1p": _zb1p, "dualpipe": _dualpipe, "dualpipev": _dualpipev}[name]
        steps = tuple(tuple(generate(rank, num_ranks, num_micro_batches)) for rank in range(num_ranks))
    return Schedule(name, num_ranks, num_stages(name, num_ranks), num_micro_batches, steps)


def _check(name: str, num_ranks: int, num_micro_batches: int) -> None:
    if name not in get_args(ScheduleName):
        raise ValueError(f'there is no schedule "{name}"; choose one of {", ".join(get_args(ScheduleName))}')
    if num_ranks < 1:
        raise ValueError(f'schedule "{name}" has {num_ranks} ranks; it needs at least 1')
    if name == "dualpipe" and num_ranks % 2:
        raise ValueError(
            f'schedule "dualpipe" has {num_ranks} ranks; it needs an even number, since ranks hold the stages in '
            f'pairs: use {num_ranks + 1} ranks, or "dualpipev"'
        )
    if name == "dualpipe" and num_micro_batches % 2:
        raise ValueError(
            f'schedule "dualpipe" has {num_micro_batches} micro-batches; it needs an even number, since one half '
            f'goes each way: use {num_micro_batches + 1}, or "dualpipev"'
        )
    least = 2 if name == "dualpipe" else 1
    if num_micro_batches < least:
        raise ValueError(
            f'schedule "{name}" has {num_micro_batches} micro-batches on {num_ranks} ranks; it needs at least {least}: '
            "use more micro-batches"
        )


def _shortened(schedule: Schedule, num_micro_batches: int) -> Schedule:
    """Without the last micro-batches, in "dualpipe" without the last of either direction."""
    directions = 2 if schedule.name == "dualpipe" else 1
    before, after = schedule.num_micro_batches // directions, num_micro_batches // directions

    def kept(row: tuple[Step, ...]) -> Iterator[Step]:
        for step in row:
            places = [(action, *divmod(action.micro_batch, before)) for action in actions_of(step)]
            actions = [
                replace(action, micro_batch=direction * after + number)
                for action, direction, number in places
                if number < after
            ]
            if actions:
                yield Overlapped(*actions) if len(actions) == 2 else actions[0]

    return replace(
        schedule, num_micro_batches=num_micro_batches, steps=tuple(tuple(kept(row)) for row in schedule.steps)
    )


def _1f1b(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Step]:
    forward, backward = (_passes(kind, rank) for kind in (Kind.FORWARD, Kind.BACKWARD))
    ahead = min(num_ranks - 1 - rank, num_micro_batches)
    for _ in range(ahead):
        yield next(forward)
    for _ in range(num_micro_batches - ahead):
        yield next(forward)
        yield next(backward)
    for _ in range(ahead):
        yield next(backward)


def _zb1p(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Step]:
    kinds = Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD
    forward, input_grad, weight_grad = (_passes(kind, rank) for kind in kinds)
    ahead = num_ranks - 1 - rank
    for _ in range(ahead):
        yield next(forward)
    for number in range(num_micro_batches - ahead):
        yield next(forward)
        yield next(input_grad)
        if number >= rank:
            yield next(weight_grad)
    for _ in range(ahead):
        yield next(input_grad)
        yield next(weight_grad)
    for _ in range(rank):
        yield next(weight_grad)


def _passes(kind: Kind, stage: int, first: int = 0) -> Iterator[Action]:
    micro_batch = first
    while True:
        yield Action(kind, stage, micro_batch)
        micro_batch += 1


def _dualpipev(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Step]:
    stages = rank, 2 * num_ranks - 1 - rank
    return _dualpipe_of_pair(_Pair(stages, (0, 0)), rank, num_ranks, num_micro_batches)


def _dualpipe(rank: int, num_ranks: int, num_micro_batches: int) -> Iterator[Step]:
    half = num_micro_batches // 2
    place = min(rank, num_ranks - 1 - rank)
    firsts = (0, half) if rank == place else (half, 0)
    return _dualpipe_of_pair(_Pair((place, num_ranks - 1 - place), firsts), place, num_ranks // 2, half)


class _Pair:
    """The two stages of a rank: 0, near the end where its micro-batches enter, and 1, near the end where they leave.
    `firsts` are the micro-batches each begins with."""

    def __init__(self, stages: tuple[int, int], firsts: tuple[int, int]) -> None:
        self._next = {
            (kind, near_or_far): partial(next, _passes(kind, stages[near_or_far], firsts[near_or_far]))
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for near_or_far in (0, 1)
        }
        self._deferred: deque[Action] = deque()

    def forward(self, which: int) -> Action:
        return self._next[Kind.FORWARD, which]()

    def backward(self, which: int) -> Action:
        return self._next[Kind.BACKWARD, which]()

    def input_grad(self, which: int) -> Action:
        full = self.backward(which)
        self._deferred.append(Action(Kind.WEIGHT_GRAD, full.stage, full.micro_batch))
        return Action(Kind.INPUT_GRAD, full.stage, full.micro_batch)

    def weight_grad(self) -> Action:
        """The one deferred longest."""
        return self._deferred.popleft()

    def overlapped(self, forward: int, backward: int) -> Overlapped:
        return Overlapped(self.forward(forward), self.backward(backward))


def _dualpipe_of_pair(pair: _Pair, place: int, num_places: int, num_micro_batches: int) -> Iterator[Step]:
    """The eight phases of a rank `place` steps from the end where its stage 0 lies; `num_places` - 1 is the middle.
    `num_micro_batches` pass through either stage."""
    inner = num_places - 1 - place
    for _ in range(2 * inner):
        yield pair.forward(0)
    for _ in range(place + 1):
        yield pair.forward(0)
        yield pair.forward(1)
    for _ in range(inner):
        yield pair.input_grad(1)
        yield pair.weight_grad()
        yield pair.forward(1)
    for _ in range(num_micro_batches - num_places - inner):
        yield pair.overlapped(0, 1)
        yield pair.overlapped(1, 0)
    for _ in range(inner):
        yield pair.backward(1)
        yield pair.overlapped(1, 0)
    for number in range(2 * (place + 1)):
        which = 1 - number % 2
        yield pair.backward(which) if number <= place else pair.input_grad(which)
    for _ in range(inner):
        yield pair.weight_grad()
        yield pair.input_grad(0)
    for _ in range(place + 1):
        yield pair.weight_grad()


def _zbv(num_ranks: int, num_micro_batches: int) -> tuple[tuple[Step, ...], ...]:
    """Played in rounds in which every rank takes at most one step, as if F = I = W."""
    ranks = [_ZbvRank(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)]
    # How many micro-batches each stage has passed on, as activations and as gradients.
    done = {kind: [0] * (2 * num_ranks) for kind in (Kind.FORWARD, Kind.INPUT_GRAD)}
    while any(rank.busy for rank in ranks):
        chosen = [step for rank in ranks if (step := rank.choose(done)) is not None]
        assert chosen, "a micro-batch that can neither go on nor come back"
        for step in chosen:
            if step.kind != Kind.WEIGHT_GRAD:
                done[step.kind][step.stage] += 1
    return tuple(tuple(rank.steps) for rank in ranks)


class _ZbvRank:
    """What a rank of "zbv" has done, and what it does next.

    It fills the time until its first gradient with forward passes, which makes 2 x ranks - 1 activations held; lets
    one more in only before one goes, one F, I and W of either stage in turn; and, once all micro-batches have entered,
    takes whatever is most urgent: input gradients, forward passes, weight gradients."""

    def __init__(self, rank: int, num_ranks: int, num_micro_batches: int) -> None:
        self.steps: list[Step] = []
        self._num_micro_batches, self._num_stages = num_micro_batches, 2 * num_ranks
        self._near, self._far = near, far = rank, 2 * num_ranks - 1 - rank
        self._next = {(kind, stage): 0 for kind in Kind for stage in (near, far)}
        ahead = 2 * (num_ranks - rank) - 1
        turns = {
            stage: [(kind, stage) for kind in (Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)]
            for stage in (near, far)
        }
        self._planned = deque(
            [(Kind.FORWARD, near)] * ahead
            + [(Kind.FORWARD, far), (Kind.FORWARD, near)] * rank
            + turns[far] * (num_ranks - rank)
            + (turns[near] + turns[far]) * (num_micro_batches - ahead - rank)
        )

    @property
    def busy(self) -> bool:
        return len(self.steps) < 6 * self._num_micro_batches

    def choose(self, done: dict[Kind, list[int]]) -> Action | None:
        """Appends and returns the next step, if it can begin after what all ranks have `done`."""
        urgent = [(kind, stage) for kind in URGENCY for stage in (self._far, self._near)]
        for kind, stage in [self._planned[0]] if self._planned else urgent:
            if self._can_begin(kind, stage, done):
                if self._planned:
                    self._planned.popleft()
                action = Action(kind, stage, self._next[kind, stage])
                self._next[kind, stage] += 1
                self.steps.append(action)
                return action
        return None

    def _can_begin(self, kind: Kind, stage: int, done: dict[Kind, list[int]]) -> bool:
        micro_batch = self._next[kind, stage]
        if kind == Kind.WEIGHT_GRAD:
            return micro_batch < done[Kind.INPUT_GRAD][stage]
        if kind == Kind.FORWARD:
            return micro_batch < (self._num_micro_batches if stage == 0 else done[kind][stage - 1])
        last = stage == self._num_stages - 1
        return micro_batch < (done[Kind.FORWARD][stage] if last else done[kind][stage + 1])
