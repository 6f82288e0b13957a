"""Where the time of a step goes, as a clock on the host and one that lags behind tell it."""

import time

import pytest
import torch

from parallel.clock import Clock, Moment
from parallel.tape import Steps, run_in_turns

CPU = torch.device("cpu")
NAP_S = 0.02


def nap(times: int = 1) -> None:
    time.sleep(times * NAP_S)


def passing(clock: Clock, turns: int) -> Steps[int]:
    """A pass that computes and waits, so many times."""
    for _ in range(turns):
        nap()
        yield
        with clock.phase("all_to_all"):
            nap()
    return turns


def test_phases_add_up_to_the_lap() -> None:
    clock = Clock(CPU)
    began = time.perf_counter()
    clock.start()
    with clock.phase("forward"):
        nap()
        with clock.phase("all_to_all"):
            nap(3)
        nap()
    with clock.phase("backward"):
        nap(4)
    clock.stop()
    lasted = time.perf_counter() - began
    seconds = clock.late.seconds()
    assert sum(seconds.values()) == pytest.approx(lasted, abs=NAP_S / 2)
    assert seconds["forward"] >= 2 * NAP_S
    assert seconds["all_to_all"] >= 3 * NAP_S
    assert clock.late.busy() == pytest.approx(seconds["forward"] + seconds["backward"])


def test_passes_in_turns_keep_their_phases() -> None:
    clock = Clock(CPU)
    clock.start()
    clock.switch("optimizer")
    one, other = (clock.during(phase, passing(clock, 3)) for phase in ("forward", "backward"))
    assert run_in_turns(other, one) == 3
    clock.stop()
    phases = [phase for phase, _ in clock.late.marks]
    assert phases.count("all_to_all") == 6
    assert phases[-1] == "optimizer", "the phase before goes on"
    seconds = clock.late.seconds()
    assert min(seconds["forward"], seconds["backward"]) >= 3 * NAP_S
    assert seconds["all_to_all"] >= 6 * NAP_S


def test_a_phase_ends_when_its_work_fails() -> None:
    clock = Clock(CPU)
    clock.start()
    with pytest.raises(ValueError), clock.phase("forward"):
        raise ValueError
    assert clock.switch("data") == "other"


def test_a_clock_that_does_not_run_marks_nothing() -> None:
    clock = Clock(CPU)
    with clock.phase("forward"):
        nap()
    clock.start(runs=False)
    assert clock.switch("forward") == "other"
    clock.stop()
    assert clock.late.marks == []
    assert clock.late.seconds() == {}
    assert clock.late.busy() == 0.0


class Event:
    """What CUDA has, in the time of the host."""

    waited = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


def test_a_gpu_is_read_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    moments: list[Moment] = []
    for step in range(3):
        clock.start(runs=step != 1, spans=step == 0)
        with clock.phase("forward"):
            nap()
        moments.append(clock.now())
        clock.align()
        clock.stop()
        assert Event.waited == 0, "a step waits for its device"
        if step == 0:
            assert clock.late.marks == []
        else:
            assert ("forward" in clock.late.seconds()) == (step == 1)
            Event.waited = 0
    assert isinstance(moments[0], Event)
    assert isinstance(moments[2], float), "events of spans nobody asked for"
