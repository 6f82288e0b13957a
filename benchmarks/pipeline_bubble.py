"""The bubble of a pipeline as it was, and as `parallel.simulate` has it from the measured durations of passes: from the
medians of each kind on each stage, and, step by step, from the duration that each pass had in that step."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import distributed as dist

from parallel.executor import Executor
from parallel.schedule import Kind, Step, actions_of
from parallel.simulate import Timeline, simulate
from parallel.spans import measured_timeline, newest_run

BUBBLE_HEAD = (
    "F / B / W ms | pipeline ms, measured | simulated | bubble ms, measured | simulated from medians | measured / that "
    "| simulated pass by pass | measured / that | share"
)
_Key = tuple[tuple[Kind, int], ...]


@dataclass(frozen=True)
class Bubble:
    """Seconds of the whole pipeline, measured and simulated; of its bubble, measured, simulated, and pass by pass; of a
    pass by kind, over all stages. Medians over steps."""

    whole: tuple[float, float]
    waiting: tuple[float, float, float]
    passes: dict[Kind, float]

    @property
    def row(self) -> str:
        """Its cells of a table."""
        times = " / ".join(f"{1e3 * self.passes.get(kind, 0):.1f}" for kind in _SHOWN)
        whole = " | ".join(f"{1e3 * each:.1f}" for each in self.whole)
        measured, *simulated = self.waiting
        ratios = " | ".join(f"{1e3 * each:.1f} | {measured / each:.3f}" for each in simulated)
        return f"{times} | {whole} | {1e3 * measured:.1f} | {ratios} | {measured / self.whole[0]:.1%}"


_SHOWN = Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT_GRAD


class MeasuredCosts:
    """The median duration of the steps of a kind on a stage, over some timelines; sends are free."""

    send = 0.0

    def __init__(self, timelines: Iterable[Timeline]) -> None:
        found: defaultdict[_Key, list[float]] = defaultdict(list)
        for timeline in timelines:
            for spans in timeline.spans:
                for span in spans:
                    found[_key(span.step)].append(span.end - span.start)
        self.medians = {key: median(durations) for key, durations in found.items()}

    def of_step(self, step: Step) -> float:
        """Duration of a step."""
        return self.medians[_key(step)]

    def of_kind(self, kind: Kind) -> float:
        """The mean over stages; 0 where a schedule has none that is not in a pair."""
        durations = [seconds for key, seconds in self.medians.items() if [each for each, _ in key] == [kind]]
        return sum(durations) / len(durations) if durations else 0.0


class OwnCosts:
    """The duration of each step in one timeline; sends are free."""

    send = 0.0

    def __init__(self, timeline: Timeline) -> None:
        self._durations = {span.step: span.end - span.start for spans in timeline.spans for span in spans}

    def of_step(self, step: Step) -> float:
        """Duration of a step."""
        return self._durations[step]


def measure_bubble(
    executor: Executor, step: Callable[[], None], group: dist.ProcessGroup, device: torch.device, rounds: int
) -> Bubble:
    """Of so many steps, each of which `step` runs with a clock that marks spans and was aligned. A collective of the
    pipeline `group`."""
    timelines = []
    for _ in range(rounds):
        step()
        timelines.append(measured_timeline(newest_run(executor), group, device))
    costs = MeasuredCosts(timelines)
    simulated = simulate(timelines[0].schedule, costs)
    exactly = [simulate(timeline.schedule, OwnCosts(timeline)).bubble for timeline in timelines]
    return Bubble(
        (median(timeline.makespan for timeline in timelines), simulated.makespan),
        (median(timeline.bubble for timeline in timelines), simulated.bubble, median(exactly)),
        {kind: costs.of_kind(kind) for kind in _SHOWN},
    )


def _key(step: Step) -> _Key:
    return tuple((action.kind, action.stage) for action in actions_of(step))
