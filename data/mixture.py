"""Which dataset each sample comes from, as a pure function of the sample's number.

Weights become whole counts of every group of 4096 consecutive samples; within a group the datasets come in random
order. So proportions are exact from group to group, and how many samples a dataset gave before any point is known at
once.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.randomness import permutation

GROUP = 4096


class Mixture:
    """The order of D datasets, given the weight of each by name."""

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
        self.counts = quantise(weights)
        self._seed = seed
        self._sorted = np.repeat(np.arange(len(self.counts)), self.counts)
        self._group = lru_cache(maxsize=2)(self._lay_group)

    def datasets(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The dataset of each sample from `start` to `start + count` [count], count >= 1; not to be written to."""
        first, last = start // GROUP, -(-(start + count) // GROUP)
        groups = [self._group(group) for group in range(first, last)]
        return (groups[0] if len(groups) == 1 else np.concatenate(groups))[start - first * GROUP :][:count]

    def before(self, sample: int) -> npt.NDArray[np.int64]:
        """How many samples each dataset gave before the one of this number [D]."""
        group, rest = divmod(sample, GROUP)
        return group * self.counts + np.bincount(self._group(group)[:rest], minlength=len(self.counts))

    def _lay_group(self, group: int) -> npt.NDArray[np.int64]:
        if len(self.counts) == 1:
            return self._sorted
        return self._sorted[permutation(GROUP, "mixture", self._seed, group)]


def quantise(weights: Mapping[str, float]) -> npt.NDArray[np.int64]:
    """Whole counts that sum to a group, by largest remainder. Raises DataError for a weight too small to count."""
    shares = np.array(list(weights.values())) / sum(weights.values()) * GROUP
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: GROUP - counts.sum()]] += 1
    for (name, weight), share, count in zip(weights.items(), shares, counts, strict=True):
        if count == 0:
            raise DataError(
                f"data.datasets.weight = {weight} of {name} comes to {share:.2g} samples in {GROUP}, which rounds to "
                "none; raise it or remove the dataset"
            )
    return counts
