"""How far the losses of two runs lie apart, and how sure that is.

Both runs see the same samples, so what the data adds to the loss of a step cancels in that step's relative gap

    g_t = (B_t - A_t) / A_t

The gap of the runs is the mean of g over the last fifth of the steps. Its noise comes from batch means: neighbouring
steps are correlated, because a difference between weights stays for many steps, so the standard error is not σ/√n but
is taken from the means m_k of K = 5 long stretches of that fifth,

    s² = Σ (m_k - m)² / (K (K - 1)),        m ± t s,    t the 97.5 % quantile of Student's t with K - 1 degrees

(batch means: Schmeiser, Operations Research 30, 1982). Few batches cost a wider interval than
many, but hold what they promise while stretches are a few times longer than the correlation: with 200 steps and a
correlation of 0.9 from one step to the next, 93 of 100 intervals of 95 % hold the true gap, and 78 of 100 with K = 20.
What this cannot see is how far apart two runs would end that differ in nothing but chance; runs with other initial
weights tell (`noise_floor`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from pretrain.reports.series import Column

LAST_PART = 0.2
NUM_BATCHES = 5
MIN_STEPS = 10
CONFIDENCE = 0.95
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776)


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its interval of 95 %; NaN where a value was not finite."""

    mean: float
    noise: float

    @property
    def bound(self) -> float:
        """How far from 0 it may lie."""
        return abs(self.mean) + self.noise


class Verdict(Enum):
    """What a gap and its noise say about a limit; the text is for people."""

    WITHIN = "within the limit"
    BEYOND = "beyond the limit"
    UNDECIDED = "too noisy to tell"
    NOT_FINITE = "a loss is not finite"


def relative_gaps(a: Column, b: Column) -> Column:
    """g of each step [T], from the losses of both runs [T]; NaN where one of them is not finite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        gaps: Column = (b - a) / a
    return np.where(np.isfinite(gaps), gaps, math.nan)


def last_steps(num_steps: int) -> int:
    """How many steps at the end count: about a fifth, in whole batches, two at least."""
    wanted = max(2, round(LAST_PART * num_steps))
    return wanted - wanted % min(NUM_BATCHES, wanted)


def estimate_end(values: Column) -> Estimate:
    """The mean over the last fifth of a series [T], T >= 2, with its noise."""
    last = values[-last_steps(len(values)) :]
    means = last.reshape(min(NUM_BATCHES, len(last)), -1).mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means))
    return Estimate(float(means.mean()), float(_STUDENT[len(means) - 2] * error))


def estimate_along(values: Column, stride: int) -> tuple[Column, Column]:
    """What `estimate_end` would have said at the end of every `stride` steps and at the last: means and noises [T], NaN
    in between and before there are `MIN_STEPS`."""
    means, noises = np.full(len(values), math.nan), np.full(len(values), math.nan)
    for begin in range(0, len(values), stride):
        end = min(begin + stride, len(values))
        if end >= MIN_STEPS:
            estimate = estimate_end(values[:end])
            means[end - 1], noises[end - 1] = estimate.mean, estimate.noise
    return means, noises


def judge(gap: Estimate, limit: float) -> Verdict:
    """Within the limit is only what the whole interval is: a short or noisy comparison is no proof that a gap is small.
    `limit` is a fraction, as the gap is."""
    if not math.isfinite(gap.bound):
        return Verdict.NOT_FINITE
    if gap.bound < limit:
        return Verdict.WITHIN
    return Verdict.BEYOND if abs(gap.mean) - gap.noise >= limit else Verdict.UNDECIDED


def noise_floor(gaps: Sequence[float]) -> float:
    """The standard deviation of the gap between two runs that differ in their initial weights only, from the gaps of
    such runs to one of them: √2 times the deviation of runs, that one included. NaN without any."""
    return float(math.sqrt(2) * np.std([0.0, *gaps], ddof=1)) if gaps else math.nan
