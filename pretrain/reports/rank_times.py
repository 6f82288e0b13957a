"""Which ranks are slow: how long each computes in a step, waiting left out, beside the ranks with the same work.

Ranks that share a part of the layers do the same work, but for the tokens their experts get. The rank that all wait for
is the one that computes longest, while their steps all take the same time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.guards import NORMAL
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import Column

# The newest records count, so that a rank that was repaired is not named; and at least so many, as one may be chance.
_NEWEST, _LEAST = 20, 3
# Clocks and the tokens that experts get set healthy ranks a few per cent apart; in a group whose ranks differ more, so
# many deviations.
_SLOW, _DEVIATIONS = 1.15, 6.0
_LEAST_TO_DEVIATE = 5
# Between parts of the layers: embedding, head and uneven divisions make some work longer by design.
_SLOW_BESIDE_OTHER_WORK = 1.5


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
    if len(steps) < _LEAST or busy.shape[1] < 2:
        return []
    found = [
        slow
        for group, peers, limit in _groups(record, busy.shape[1])
        for slow in _slow(steps, busy, group, peers, limit)
    ]
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


def _groups(record: RunRecord, num_ranks: int) -> Iterator[tuple[list[int], str, float]]:
    """Ranks with the same work, what they are called, and from which ratio on one of them is slow."""
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
    if all(len(ranks) == 1 for ranks in stages.values()):
        yield list(range(num_ranks)), "all ranks, though their layers differ", _SLOW_BESIDE_OTHER_WORK
        return
    for ranks in stages.values():
        if len(ranks) > 1:
            peers = "all ranks" if pp == 1 else f"the {len(ranks)} ranks with the same layers"
            yield ranks, peers, _SLOW


def _slow(steps: Column, busy: Column, group: list[int], peers: str, limit: float) -> Iterator[SlowRank]:
    """Beside the lower median, as the slow one of a pair would else be compared with itself."""
    times = busy[:, group]
    middle = np.sort(times, 1)[:, (len(group) - 1) // 2]
    ratios = times / np.maximum(middle, 1e-12)[:, None]
    now = np.median(ratios[-_NEWEST:], 0)
    if len(group) >= _LEAST_TO_DEVIATE:
        limit = max(limit, 1 + _DEVIATIONS * NORMAL * float(np.median(np.abs(now - np.median(now)))))
    for place in np.flatnonzero(now > limit):
        fine = np.flatnonzero(_smoothed(ratios[:, place]) <= limit)
        begin = min(int(fine[-1]) + 1, len(steps) - 1) if len(fine) else 0
        yield SlowRank(
            rank=group[int(place)],
            ratio=float(now[place]),
            seconds=float(np.median(times[-_NEWEST:, place])),
            since=float(steps[begin]),
            peers=peers,
        )


def _smoothed(values: Column) -> Column:
    """The median of each value and its two neighbours, so that a single record neither begins nor ends anything."""
    return np.median(np.lib.stride_tricks.sliding_window_view(np.pad(values, 1, mode="edge"), 3), 1)
