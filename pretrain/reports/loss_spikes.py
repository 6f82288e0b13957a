"""Where the loss of a run leaps: further above the median of the steps before than ten deviations, and than a tenth of
it.

These are the numbers of `pretrain.guards`. But while a guard must judge a step at once and by what it remembers, here
the deviation is that of the differences between neighbours, in which the fall of the loss is not seen: so smaller leaps
show, also early in a run."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pretrain.guards import LEAST_OF_LOSS, NORMAL, GuardsConfig
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import Column

_WINDOW, _DEVIATIONS = GuardsConfig().spike_window, GuardsConfig().spike_deviations
# Of these the median is the level: few enough to follow the loss, and twice as many as most spikes are long.
_LEVEL = 32
# So many steps are judged by the same window: the median hardly moves, and long runs are read in seconds.
_BLOCK = 16
_MAX_BLOCKS = 20_000


@dataclass(frozen=True)
class Spike:
    """Steps in a row whose loss is far above the `median` before: the `step` of the highest, how high, how many, and
    whether the loss was still there when the window had passed."""

    step: float
    peak: float
    median: float
    num_steps: int
    stays: bool

    @property
    def size(self) -> float:
        """How far above the median."""
        return self.peak - self.median


def find_spikes(record: RunRecord) -> list[Spike]:
    """All of a run, in order. Sequences of another length have other losses, so each length is judged by itself."""
    columns = record.columns
    loss = columns["lm_loss"] if np.isfinite(columns["lm_loss"]).any() else columns["loss"]
    lengths = np.nan_to_num(columns["seq_len"])
    edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1), len(loss)]
    return [
        spike for begin, end in pairwise(edges) for spike in _of_stretch(columns["step"][begin:end], loss[begin:end])
    ]


def _of_stretch(steps: Column, loss: Column) -> list[Spike]:
    known = np.isfinite(loss)
    steps, loss = steps[known], loss[known]
    medians, limits = _limits(loss)
    high = np.flatnonzero(loss > limits)
    if not len(high):
        return []
    episodes = np.split(high, np.flatnonzero(np.diff(high) > _BLOCK) + 1)
    return [_spike(steps, loss, episode, float(medians[episode[0]]), float(limits[episode[0]])) for episode in episodes]


def _spike(steps: Column, loss: Column, episode: np.ndarray, median: float, limit: float) -> Spike:
    top = episode[np.argmax(loss[episode])]
    after = loss[episode[-1] + 1 :][:_BLOCK]
    lasts = episode[-1] - episode[0] >= _BLOCK
    stays = bool(lasts and (not len(after) or np.median(after) > limit))
    return Spike(float(steps[top]), float(loss[top]), median, int(episode[-1] - episode[0]) + 1, stays)


def _limits(loss: Column) -> tuple[Column, Column]:
    """The median before each step, and above what a loss is a spike; both infinite until half a window is there."""
    medians, limits = np.full(len(loss), np.inf), np.full(len(loss), np.inf)
    block = max(_BLOCK, -(-len(loss) // _MAX_BLOCKS))
    for begin in range(_WINDOW // 2, len(loss), block):
        before = loss[max(0, begin - _WINDOW) : begin]
        median = float(np.median(before[-_LEVEL:]))
        deviation = NORMAL * float(np.median(np.abs(np.diff(before)))) / math.sqrt(2)
        medians[begin : begin + block] = median
        limits[begin : begin + block] = median + _DEVIATIONS * max(deviation, LEAST_OF_LOSS * abs(median))
    return medians, limits
