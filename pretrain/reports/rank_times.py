"""Which ranks are slow: how long each computes in a step, waiting left out, beside the ranks with the same work.

Ranks that share a part of the layers do the same work, but for the tokens their experts get. The rank that all wait for
is the one that computes longest, while their steps all take the same time."""

from dataclasses import dataclass, replace

import numpy as np

from pretrain.guards import NORMAL
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import Column

# The newest quarter of the records counts, so that a rank that was repaired is not named; but not fewer, as one may be
# chance, and not more.
_FEWEST, _MOST, _LEAST = 5, 20, 3
# Clocks and the tokens that experts get set healthy ranks a few per cent apart; in a group whose ranks differ more, so
# many deviations.
_SLOW, _DEVIATIONS = 1.15, 6.0
_LEAST_TO_DEVIATE = 5
# Where each rank has layers of its own, with more or less work by design, it is compared with its own share of the work
# in the first quarter of the run: seen is only what became slower.
_SLOWER_THAN_BEFORE = 1.3


@dataclass(frozen=True)
class SlowRank:
    """A rank that takes `ratio` times as long as the median of its `peers` (in words): `seconds` of each step, from
    step `since` on."""

    rank: int
    ratio: float
    seconds: float
    since: float
    peers: str


def find_slow_ranks(record: RunRecord) -> list[SlowRank]:
    """All that are slow now, the slowest first; none without records of ranks."""
    steps, busy = busy_seconds(record)
    num_ranks = busy.shape[1]
    if len(steps) < _LEAST or num_ranks < 2:
        return []
    groups = _groups(record, num_ranks)
    if all(len(group) == 1 for group in groups):
        before = np.median(busy[: max(_LEAST, len(steps) // 4)], 0)
        found = _slow(steps, busy, busy / np.maximum(before, 1e-12), list(range(num_ranks)), _SLOWER_THAN_BEFORE)
        peers = "all ranks, all beside their own time at the start"
        return sorted((replace(slow, peers=peers) for slow in found), key=lambda slow: -slow.ratio)
    found = [slow for group in groups if len(group) > 1 for slow in _slow(steps, busy, busy, group, _SLOW)]
    return sorted(found, key=lambda slow: -slow.ratio)


def busy_seconds(record: RunRecord) -> tuple[Column, Column]:
    """Steps [records], and how long each rank computed in them [records, ranks], as far as the run had as many ranks as
    at its end."""
    series = record.ranks
    keys = sorted(series.columns, key=int)
    if not keys:
        return np.zeros(0), np.zeros((0, 0))
    busy = series.matrix(keys)
    counts = np.isfinite(busy).sum(1)
    alike = counts == counts[-1]
    return series.steps[alike], busy[alike][:, : counts[-1]]


def _groups(record: RunRecord, num_ranks: int) -> list[list[int]]:
    """Ranks with the same work."""
    table = record.config.get("parallel")
    parallel = table if isinstance(table, dict) else {}
    pp = parallel.get("pp", 1)
    if not isinstance(pp, int) or isinstance(pp, bool) or not 1 <= pp <= num_ranks or num_ranks % pp:
        pp = 1
    size = num_ranks // pp
    stages: dict[int, list[int]] = {}
    for rank in range(num_ranks):
        place = rank // size
        # The two ends of a bidirectional pipeline hold the same layers.
        stage = min(place, pp - 1 - place) if parallel.get("schedule") == "dualpipe" else place
        stages.setdefault(stage, []).append(rank)
    return list(stages.values())


def _slow(steps: Column, busy: Column, compared: Column, group: list[int], limit: float) -> list[SlowRank]:
    """Of a group, by times [records, ranks] that can be compared, beside the lower median: the slow one of a pair would
    else be compared with itself."""
    times, newest = compared[:, group], min(_MOST, max(_FEWEST, len(steps) // 4))
    middle = np.sort(times, 1)[:, (len(group) - 1) // 2]
    ratios = times / np.maximum(middle, 1e-12)[:, None]
    now = np.median(ratios[-newest:], 0)
    if len(group) >= _LEAST_TO_DEVIATE:
        limit = max(limit, 1 + _DEVIATIONS * NORMAL * float(np.median(np.abs(now - np.median(now)))))
    found = []
    for place in np.flatnonzero(now > limit):
        fine = np.flatnonzero(_smoothed(ratios[:, place]) <= limit)
        begin = min(int(fine[-1]) + 1, len(steps) - 1) if len(fine) else 0
        rank, peers = group[int(place)], f"the {len(group)} ranks with the same layers"
        seconds = float(np.median(busy[-newest:, rank]))
        found.append(SlowRank(rank, float(now[place]), seconds, float(steps[begin]), peers))
    return found


def _smoothed(values: Column) -> Column:
    """The median of each value and its two neighbours, so that a single record neither begins nor ends anything."""
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(values, 1, mode="edge"), 3), 1)
