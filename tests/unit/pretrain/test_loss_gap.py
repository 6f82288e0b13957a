"""The gap of two losses: known gaps are found, and the noise holds what it promises where steps are correlated."""

import math

import numpy as np
import pytest

from pretrain.loss_gap import (
    MIN_STEPS,
    NUM_BATCHES,
    Estimate,
    Verdict,
    estimate_along,
    estimate_end,
    judge,
    last_steps,
    noise_floor,
    relative_gaps,
)
from pretrain.reports.series import Column

LIMIT = 0.0025
NUM_STEPS = 1000


def correlated(seed: int, correlation: float, num_steps: int = NUM_STEPS) -> Column:
    """Noise of deviation 1 in which half of the variance goes on from step to step, times `correlation`, and half is
    new in each [T]."""
    generator = np.random.default_rng(seed)
    fresh = generator.normal(size=num_steps)
    slow = np.empty(num_steps)
    slow[0] = fresh[0]
    for step in range(1, num_steps):
        slow[step] = correlation * slow[step - 1] + math.sqrt(1 - correlation**2) * fresh[step]
    return (slow + generator.normal(size=num_steps)) / math.sqrt(2)


def losses(seed: int) -> Column:
    """A loss that falls and jumps with the data [T]."""
    steps = np.arange(1, NUM_STEPS + 1)
    return 3 + 7 * np.exp(-steps / 60) + 0.1 * np.random.default_rng(seed).normal(size=NUM_STEPS)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8, 0.9])
def test_intervals_hold_the_true_gap_as_often_as_they_say(correlation: float) -> None:
    true, tries = 0.001, 1000
    held = 0
    for seed in range(tries):
        estimate = estimate_end(true + 0.002 * correlated(seed, correlation))
        held += abs(estimate.mean - true) <= estimate.noise
    # 95 % by intent, 93 % as the correlation grows as long as a batch; three deviations of 1000 tries around these.
    assert 0.91 <= held / tries <= 0.97


def test_what_ignores_the_correlation_would_promise_too_much() -> None:
    """The same series with σ/√n: the check above can fail."""
    held = 0
    for seed in range(300):
        last = correlated(seed, 0.9)[-200:]
        held += abs(last.mean()) <= 1.96 * last.std() / math.sqrt(len(last))
    assert held / 300 < 0.75


def test_the_data_cancel() -> None:
    a = losses(0)
    b = a * 1.001
    estimate = estimate_end(relative_gaps(a, b))
    assert estimate.mean == pytest.approx(0.001)
    assert estimate.noise < 1e-9
    assert a.std() > 0.1


@pytest.mark.parametrize(
    ("bias", "verdict"), [(0.001, Verdict.WITHIN), (-0.001, Verdict.WITHIN), (0.005, Verdict.BEYOND)]
)
def test_a_bias_of_the_loss_is_judged(bias: float, verdict: Verdict) -> None:
    a = losses(1)
    b = a * (1 + bias + 0.001 * correlated(2, 0.8))
    gap = estimate_end(relative_gaps(a, b))
    assert gap.mean == pytest.approx(bias, abs=0.0005)
    assert judge(gap, LIMIT) is verdict


def test_verdicts() -> None:
    assert judge(Estimate(0.0, 0.0), LIMIT) is Verdict.WITHIN
    assert judge(Estimate(0.0024, 0.0002), LIMIT) is Verdict.UNDECIDED
    assert judge(Estimate(-0.0024, 0.0002), LIMIT) is Verdict.UNDECIDED
    assert judge(Estimate(0.0030, 0.0006), LIMIT) is Verdict.UNDECIDED
    assert judge(Estimate(-0.0030, 0.0004), LIMIT) is Verdict.BEYOND
    assert judge(Estimate(math.nan, math.nan), LIMIT) is Verdict.NOT_FINITE


def test_a_loss_that_is_not_finite_is_never_within_the_limit() -> None:
    a, b = losses(0), losses(0)
    b[-3] = math.nan
    assert judge(estimate_end(relative_gaps(a, b)), LIMIT) is Verdict.NOT_FINITE
    b = a.copy()
    b[3] = math.inf
    assert judge(estimate_end(relative_gaps(a, b)), LIMIT) is Verdict.WITHIN


def test_the_last_fifth_is_whole_batches() -> None:
    assert last_steps(1000) == 200
    assert last_steps(MIN_STEPS) == 2
    for num_steps in range(2, 300):
        count = last_steps(num_steps)
        assert 2 <= count <= max(2, round(0.2 * num_steps))
        assert count % min(NUM_BATCHES, count) == 0


def test_the_curve_ends_at_the_gap() -> None:
    gaps = correlated(0, 0.5, num_steps=997)
    for stride in (1, 2, 7):
        means, noises = estimate_along(gaps, stride)
        assert Estimate(means[-1], noises[-1]) == estimate_end(gaps)
        known = np.flatnonzero(np.isfinite(means))
        assert known[0] >= MIN_STEPS - 1
        assert max(np.diff(known)) == stride


def test_the_floor_is_the_deviation_between_runs() -> None:
    generator = np.random.default_rng(0)
    runs = generator.normal(scale=0.001, size=400)
    assert noise_floor((runs[1:] - runs[0]).tolist()) == pytest.approx(math.sqrt(2) * 0.001, rel=0.1)
    assert math.isnan(noise_floor([]))
