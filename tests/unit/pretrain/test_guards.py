"""Decisions of the guards, over series of losses and norms with planted faults."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.faults import Fault
from pretrain.guards import GuardsConfig, GuardState, JudgedStep, Verdict, describe, is_applied, judge, limit, report

SKIP = GuardsConfig(on_spike="skip", spike_window=32)


def noisy_steps(count: int, *, seed: int = 0) -> list[tuple[float, float]]:
    """Losses that fall slowly and norms that vary by a third."""
    chance = random.Random(seed)
    return [(5 - step / 200 + chance.gauss(0, 0.03), 0.5 * math.exp(chance.gauss(0, 0.3))) for step in range(count)]


def run(
    config: GuardsConfig, steps: list[tuple[float, float]], state: GuardState | None = None
) -> tuple[list[Verdict], GuardState]:
    """The verdict on every step, and the state at the end."""
    state, verdicts = state or GuardState(), []
    for loss, norm in steps:
        verdict = judge(config, state, loss, norm)
        state = state.after(config, verdict, loss, norm)
        verdicts.append(verdict)
    return verdicts, state


def test_noise_is_no_spike() -> None:
    for seed in range(20):
        verdicts, _ = run(SKIP, noisy_steps(500, seed=seed))
        assert set(verdicts) == {"fine"}, seed


@pytest.mark.parametrize("fault", [(50.0, 0.5), (5.0, 5.0), (math.nan, 0.5), (5.0, math.inf), (5.0, math.nan)])
@pytest.mark.parametrize("place", [0, 3, 40, 199])
def test_one_fault_costs_one_step(fault: tuple[float, float], place: int) -> None:
    steps = noisy_steps(200)
    steps[place] = fault
    verdicts, state = run(SKIP, steps)
    is_finite = all(map(math.isfinite, fault))
    # Nothing finite is judged before the window is half full.
    expected = "not finite" if not is_finite else "spike" if place >= 16 else "fine"
    assert verdicts[place] == expected
    assert [verdict for number, verdict in enumerate(verdicts) if number != place] == ["fine"] * 199
    if expected != "fine":
        assert fault[0] not in state.losses
        assert fault[1] not in state.norms
    unharmed = run(SKIP, steps[:place] + steps[place + 1 :])[1]
    if expected != "fine":
        assert (state.losses, state.norms) == (unharmed.losses, unharmed.norms)


def test_a_window_that_takes_in_everything_would_be_poisoned() -> None:
    """The planted fault: a mean and a deviation over all values, which one NaN leaves without a limit."""
    values = [1.0, 1.1, math.nan, 0.9]
    mean = sum(values) / len(values)
    assert not mean + 3 * math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) < 10.0


def test_a_level_that_stays_is_taken_on() -> None:
    config = GuardsConfig(on_spike="skip", spike_window=32, max_skipped_in_a_row=5)
    higher = [(2 * loss, norm) for loss, norm in noisy_steps(200, seed=1)]
    verdicts, state = run(config, noisy_steps(200) + higher)
    assert verdicts[200:207] == ["spike"] * 5 + ["new level", "fine"]
    assert set(verdicts[206:]) == {"fine"}
    assert state.spikes == 5
    assert min(state.losses) > 7


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=32), st.floats(width=32) | st.sampled_from([0.5, 0.5, 5.0, math.nan])), max_size=120
    )
)
def test_no_series_makes_it_skip_for_longer(steps: list[tuple[float, float]]) -> None:
    in_a_row, state = 0, run(SKIP, noisy_steps(40))[1]
    for loss, norm in steps:
        applied = is_applied(SKIP, state, loss, norm)
        verdict = judge(SKIP, state, loss, norm)
        assert applied == (verdict in ("fine", "new level"))
        state = state.after(SKIP, verdict, loss, norm)
        in_a_row = in_a_row + 1 if verdict == "spike" else 0 if applied else in_a_row
        assert in_a_row <= SKIP.max_skipped_in_a_row
        assert all(map(math.isfinite, (*state.losses, *state.norms)))


def test_the_window_survives_a_checkpoint() -> None:
    _, state = run(SKIP, noisy_steps(40))
    again = GuardState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state
    assert GuardState.from_json(None) == GuardState()
    loss, norm = noisy_steps(41)[-1]
    assert judge(SKIP, again, 10 * loss, norm) == judge(SKIP, again, loss, 10 * norm) == "spike"
    assert judge(SKIP, GuardState(), 10 * loss, norm) == "fine"


def test_other_lengths_have_other_limits() -> None:
    state = GuardState((1.0,) * 16, (1.0,) * 16, seq_len=64)
    assert state.of_length(64) is state
    assert limit(SKIP, state, "loss") == pytest.approx(1.1)
    assert limit(SKIP, state, "norm") == pytest.approx(2.0)
    assert limit(SKIP, state.of_length(128), "loss") == math.inf


@pytest.mark.parametrize(("action", "applied"), [("warn", True), ("skip", False), ("rollback", False), ("off", True)])
def test_what_is_done_about_a_spike(action: str, applied: bool) -> None:
    config = GuardsConfig(on_spike=action, spike_window=32)  # type: ignore[arg-type]
    _, state = run(config, noisy_steps(40))
    assert is_applied(config, state, 50.0, 0.5) is applied
    assert not is_applied(config, state, math.nan, 0.5)
    assert judge(config, state, 50.0, 0.5) == ("fine" if action == "off" else "spike")


def test_rollbacks_to_one_checkpoint_are_counted() -> None:
    loaded = GuardState(losses=(1.0,), norms=(1.0,))
    once = loaded.rolled_back(GuardState(spikes=3), 100)
    assert (once.rollbacks, once.spikes, once.losses) == (1, 3, (1.0,))
    assert loaded.rolled_back(once, 100).rollbacks == 2
    assert loaded.rolled_back(once, 200).rollbacks == 1


def test_reports_name_step_samples_ranks_and_parameters() -> None:
    names = tuple(f"layers.{layer}.norm.weight" for layer in range(6))
    faults = (Fault(1, "node7", True, names), Fault(3, "node9", False, names[:1]))
    config = GuardsConfig(max_skipped_in_a_row=3)
    said = report(config, describe(config, GuardState(), "not finite", JudgedStep(12, range(96, 104), 1, 1, faults)))
    for part in (
        "3 steps in a row were not finite (guards.max_skipped_in_a_row = 3)",
        "step 12: loss or gradient not finite, left out; samples 96 to 103",
        "rank 1 on node7: its loss and its own gradients of layers.0.norm.weight, ",
        "layers.3.norm.weight and 2 more\n",
        "rank 3 on node9: its own gradients of layers.0.norm.weight\n",
        "suspect its machine",
        "timeline.learning_rate",
    ):
        assert part in said
    _, state = run(SKIP, [(1.0, 1.0)] * 40)
    said = describe(SKIP, state, "spike", JudgedStep(41, range(8), 10.0, 1.0))
    assert said == "step 41: spike: loss 10.0000 (limit 1.1000), norm 1 (limit 2), samples 0 to 7: left out"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_skipped_in_a_row": 0}, "max_skipped_in_a_row = 0 must be at least 1 step"),
        ({"spike_window": 4}, "spike_window = 4 must be at least 8 steps"),
        ({"spike_deviations": 0.0}, "spike_deviations = 0.0 must be above 0"),
        ({"timeout": 0.5}, "timeout = 0.5 must lie between 1 and 7200 seconds"),
        ({"check_replicas_every": -1}, "check_replicas_every = -1 must not be negative"),
    ],
)
def test_refused_values(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuardsConfig(**values)  # type: ignore[arg-type]
