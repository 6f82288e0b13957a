"""Where the time of a step goes: a clock that is told what begins, and says how long each phase took.

On a CPU the time is the host's. A GPU works behind the host, so there a mark is an event in the stream that computes:
the time between two of them is that of the work between, or of waiting for a transfer where the stream waits for one.
Events are read a step later, when they have long passed, so the host never waits for them.

Phases: `forward` and `backward` are computing, `all_to_all` is waiting for rows of experts, `pipeline` waiting for
other ranks of the pipeline; what a step does beside is named by who runs it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch

from parallel.tape import Steps

T = TypeVar("T")
Phase = Literal["data", "forward", "backward", "all_to_all", "pipeline", "optimizer", "other"]
Moment = Any
"""Seconds of `time.perf_counter`, or an event of CUDA."""
COMPUTING: tuple[Phase, ...] = ("forward", "backward")


class Lap:
    """The marks of one step, each the beginning of a phase; the last ends it. `origin` is a moment that all ranks can
    take for the same one."""

    def __init__(self) -> None:
        self.marks: list[tuple[Phase, Moment]] = []
        self.origin: Moment = time.perf_counter() - time.time()

    def seconds(self) -> dict[Phase, float]:
        """How long each phase lasted in all. On a GPU, waits for the last mark."""
        totals: dict[Phase, float] = {}
        if self.marks and not isinstance(self.marks[-1][1], float):
            self.marks[-1][1].synchronize()
        for (phase, begin), (_, end) in pairwise(self.marks):
            totals[phase] = totals.get(phase, 0.0) + between(begin, end)
        return totals

    def busy(self) -> float:
        """How long this rank computed, in seconds: its forward and backward passes without what they waited for."""
        totals = self.seconds()
        return sum(totals.get(phase, 0.0) for phase in COMPUTING)


class Clock:
    """The clock of one rank. It takes marks from `start` to `stop` if it was started to; else it costs nothing.

    `late` is the lap of the newest step whose marks have passed: where the device `is_late`, the one before the newest.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_late = device.type == "cuda"
        self._is_running = self._marks_spans = False
        self._phase: Phase = "other"
        self.newest = self._lap_before = Lap()

    @property
    def late(self) -> Lap:
        """What can be read now without waiting."""
        return self._lap_before if self.is_late else self.newest

    def start(self, *, runs: bool = True, spans: bool = False) -> None:
        """Begins the lap of a step, in the phase `other`. If it `runs` not, the lap has no marks; with `spans`, `now`
        is exact on a GPU too."""
        self._lap_before, self.newest = self.newest, Lap()
        self._is_running, self._marks_spans, self._phase = runs, spans, "other"
        self._mark()

    def stop(self) -> None:
        """Ends the lap."""
        self._mark()
        self._is_running = self._marks_spans = False

    def align(self) -> None:
        """To be called when a collective of all ranks has just ended: clocks of several machines may differ."""
        if self.is_late and self._marks_spans:
            self.newest.origin = self.now()

    def switch(self, phase: Phase) -> Phase:
        """From now on it is `phase`; returns which it was."""
        before = self._phase
        if self._is_running and phase != before:
            self._phase = phase
            self._mark()
        return before

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """A phase that ends; then the one before goes on."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def during(self, phase: Phase, steps: Steps[T]) -> Steps[T]:
        """The same pass, whose turns are a phase."""
        while True:
            before = self.switch(phase)
            try:
                turn = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self.switch(before)
            yield turn

    def now(self) -> Moment:
        """This moment of the host; of the stream that computes, where spans are marked on a GPU."""
        return self._moment() if self._marks_spans else time.perf_counter()

    def _mark(self) -> None:
        if self._is_running:
            self.newest.marks.append((self._phase, self._moment()))

    def _moment(self) -> Moment:
        if not self.is_late:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def between(begin: Moment, end: Moment) -> float:
    """Seconds from one moment to another of the same kind, both past."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
