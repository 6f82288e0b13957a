"""What a run does about steps that go wrong: pure decisions over what a step showed, the same on every rank.

A step whose loss or gradient norm is not finite on any rank changes nothing. A spike is a finite loss or norm far above
those of the steps before:

    x > m + d · max(1.4826 · MAD, f · |m|)        m = median of a window, MAD = median of |x_i - m|

1.4826 · MAD is the standard deviation where values are normal (Rousseeuw and Croux, JASA 88, 1993). Half of a window
would have to be wrong to move its median or its MAD; and what is not finite, or a spike, does not enter it at all, so
that after one spike the next step is judged as if there had been none. f · |m| keeps a window of equal values from
calling noise a spike: f is 1 % for losses and 10 % for norms. Nothing is wrong with becoming small.

What stays is no spike but a new level. After `max_skipped_in_a_row` spikes in a row the next one is taken for that, is
applied, and begins the window anew. So no fault can make this guard skip more steps in a row.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from parallel.equality import Difference
from parallel.faults import Fault
from parallel.launch import COLLECTIVE_TIMEOUT

Verdict = Literal["fine", "not finite", "spike", "new level"]
GUARDS = "guards"
NORMAL = 1.4826
NUM_NAMED = 4
LEAST_OF_LOSS, LEAST_OF_NORM = 0.01, 0.1
LONGEST_TIMEOUT_S = COLLECTIVE_TIMEOUT.total_seconds()


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """`[guards]`: a step that is not finite is skipped by all ranks; after `max_skipped_in_a_row` of them the run ends
    with a report.

    A spike (`spike_deviations` above the last `spike_window` steps, once half of them are there) is told ("warn"), not
    applied ("skip"), or makes the run go on from its newest checkpoint with the samples after the spike ("rollback").
    A step that takes longer than `timeout` seconds, saving included, ends the run with the stacks of all ranks in
    RUN/log; so does a rank that has not answered for `lost_after` seconds. Every `check_replicas_every` steps and
    before saving (0: never), copies of parameters are compared bit by bit. `check_health` looks at all ranks before the
    first step.
    """

    max_skipped_in_a_row: int = 5
    on_spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    spike_window: int = 128
    spike_deviations: float = 10.0
    timeout: float = 1800.0
    lost_after: float = 18.0
    check_replicas_every: int = 500
    check_health: bool = True

    def __post_init__(self) -> None:
        if self.max_skipped_in_a_row < 1:
            raise ValueError(f"max_skipped_in_a_row = {self.max_skipped_in_a_row} must be at least 1 step")
        if self.spike_window < 8:
            raise ValueError(f"spike_window = {self.spike_window} must be at least 8 steps, to have a median; use 128")
        if self.spike_deviations <= 0:
            raise ValueError(f'spike_deviations = {self.spike_deviations} must be above 0; on_spike = "off" is never')
        if not 1 <= self.timeout <= LONGEST_TIMEOUT_S:
            raise ValueError(
                f"timeout = {self.timeout} must lie between 1 and {LONGEST_TIMEOUT_S:g} seconds, after which "
                "collectives give up by themselves"
            )
        if self.lost_after < 5:
            raise ValueError(f"lost_after = {self.lost_after} must be at least 5 seconds, for a rank that is only slow")
        if self.check_replicas_every < 0:
            raise ValueError(f"check_replicas_every = {self.check_replicas_every} must not be negative; 0 is never")


@dataclass(frozen=True)
class GuardState:
    """What the guards remember of the steps before: losses and norms of the newest good ones, which have sequences of
    `seq_len`; how many in a row were not finite, or spikes; all spikes; how often the run went back to the checkpoint
    of which step."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    seq_len: int = 0
    not_finite_in_a_row: int = 0
    spikes_in_a_row: int = 0
    spikes: int = 0
    rolled_back_to: int = -1
    rollbacks: int = 0

    def of_length(self, seq_len: int) -> "GuardState":
        """The state for steps with sequences of this length; other lengths have other losses."""
        return self if seq_len == self.seq_len else replace(self, losses=(), norms=(), seq_len=seq_len)

    def after(self, config: GuardsConfig, verdict: Verdict, loss: float, norm: float) -> "GuardState":
        """The state after a step that was judged so."""
        if verdict == "not finite":
            return replace(self, not_finite_in_a_row=self.not_finite_in_a_row + 1)
        if verdict == "spike":
            in_a_row = self.spikes_in_a_row + 1
            return replace(self, spikes=self.spikes + 1, spikes_in_a_row=in_a_row, not_finite_in_a_row=0)
        kept = config.spike_window - 1 if verdict == "fine" else 0
        return replace(
            self,
            losses=(*_newest(self.losses, kept), loss),
            norms=(*_newest(self.norms, kept), norm),
            not_finite_in_a_row=0,
            spikes_in_a_row=0,
        )

    def rolled_back(self, before: "GuardState", step: int) -> "GuardState":
        """This state, loaded from the checkpoint of `step`, for a run that goes back to it from `before`."""
        rollbacks = before.rollbacks + 1 if before.rolled_back_to == step else 1
        return replace(self, rolled_back_to=step, rollbacks=rollbacks, spikes=before.spikes)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**vars(self), "losses": list(self.losses), "norms": list(self.norms)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> "GuardState":
        """The inverse of `to_json`; the first state where there is nothing."""
        if value is None:
            return cls()
        return cls(**{**value, "losses": tuple(value["losses"]), "norms": tuple(value["norms"])})


@dataclass(frozen=True)
class JudgedStep:
    """A step as reports name it: its number, its samples by their place in the run, what it showed, and the ranks where
    something was not finite first."""

    number: int
    samples: range
    loss: float
    norm: float
    faults: Sequence[Fault] = ()


def judge(config: GuardsConfig, state: GuardState, loss: float, norm: float) -> Verdict:
    """What a step is, from the loss and the gradient norm over the whole global batch."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "not finite"
    if config.on_spike == "off" or not (loss > limit(config, state, "loss") or norm > limit(config, state, "norm")):
        return "fine"
    return "spike" if state.spikes_in_a_row < config.max_skipped_in_a_row else "new level"


def is_applied(config: GuardsConfig, state: GuardState, loss: float, norm: float) -> bool:
    """Whether a step with this loss and gradient norm may change the weights."""
    verdict = judge(config, state, loss, norm)
    return verdict in ("fine", "new level") or (verdict == "spike" and config.on_spike == "warn")


def limit(config: GuardsConfig, state: GuardState, which: Literal["loss", "norm"]) -> float:
    """Above it a value is a spike; infinite as long as the window is not half full."""
    values, least = (state.losses, LEAST_OF_LOSS) if which == "loss" else (state.norms, LEAST_OF_NORM)
    if len(values) < config.spike_window // 2:
        return math.inf
    median = statistics.median(values)
    deviation = NORMAL * statistics.median(abs(value - median) for value in values)
    return median + config.spike_deviations * max(deviation, least * abs(median))


def describe(config: GuardsConfig, state: GuardState, verdict: Verdict, step: JudgedStep) -> str:
    """What the log says about a step that is not fine, with `state` of before it."""
    samples = f"samples {step.samples.start:,} to {step.samples.stop - 1:,}"
    if verdict == "not finite":
        where = [f"\n  {_describe_fault(fault)}" for fault in step.faults] or [
            "\n  all losses are finite; which gradients are not first is looked for in the next step"
        ]
        return f"step {step.number:,}: loss or gradient not finite, left out; {samples}{''.join(where)}"
    limits = limit(config, state, "loss"), limit(config, state, "norm")
    what = f"loss {step.loss:.4f} (limit {limits[0]:.4f}), norm {step.norm:.4g} (limit {limits[1]:.4g}), {samples}"
    if verdict == "new level":
        return f"step {step.number:,}: {what}: after {state.spikes_in_a_row} spikes in a row taken for a new level"
    action = {"warn": "applied nevertheless", "skip": "left out", "rollback": "left out"}[config.on_spike]
    return f"step {step.number:,}: spike: {what}: {action}"


def report(config: GuardsConfig, description: str) -> str:
    """With what a run ends after too many steps in a row that were not finite, the last of them described."""
    return (
        f"{config.max_skipped_in_a_row} steps in a row were not finite (guards.max_skipped_in_a_row = "
        f"{config.max_skipped_in_a_row}) and changed nothing. The last was {description}\n"
        "Where one rank alone is named, suspect its machine: leave it out, and the same command goes on from the "
        "newest checkpoint. Else the run may have diverged: move the newest checkpoints away to go back further, and "
        "lower timeline.learning_rate"
    )


def report_differences(step: int, found: Sequence[Difference], hosts: Sequence[str]) -> str:
    """With what a run ends whose ranks hold unlike copies; `hosts` by rank."""
    lines = [f"step {step:,}: copies of parameters are no longer equal bit for bit:"]
    for difference in found[:NUM_NAMED]:
        most, *others = difference.parties
        apart = ", ".join(f"{rank} ({hosts[rank]})" for party in others for rank in party)
        lines.append(f"  {difference.name}: ranks {', '.join(map(str, most))} against {apart}")
    if len(found) > NUM_NAMED:
        lines.append(f"  and {len(found) - NUM_NAMED} more")
    lines.append(
        "Memory or a link of one of these machines is faulty: leave it out. The same command goes on from the newest "
        "checkpoint, before which copies were equal"
    )
    return "\n".join(lines)


def _describe_fault(fault: Fault) -> str:
    parts = ["its loss"] if fault.loss else []
    if fault.parameters:
        shown = fault.parameters[:NUM_NAMED]
        others = len(fault.parameters) - len(shown)
        parts.append(f"its own gradients of {', '.join(shown)}{f' and {others} more' if others else ''}")
    return f"rank {fault.rank} on {fault.host}: {' and '.join(parts)}"


def _newest(values: tuple[float, ...], count: int) -> tuple[float, ...]:
    return values[-count:] if count else ()
