"""The axis of tokens of a long run, bent onto that of a short one.

    token of the run      0 ──── b1 ────────── b2 ──────────────────── b3 ── end
    token rehearsed       0 ──── t1 ── t2 ──── t3 ── end

Between two boundaries of the timeline, where a piece of any value ends, the map is linear, so that every stretch gets a
few steps however long it is. What a piece ramps or decays over must keep its shape: all stretches inside of it have one
scale.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from pretrain.config import Config
from pretrain.timeline import Piece, TimelineConfig


@dataclass(frozen=True)
class Axis:
    """`original[k]` tokens of the run are `rehearsed[k]` of its rehearsal, linearly between; both begin with 0 and end
    with the end of the run."""

    original: tuple[float, ...]
    rehearsed: tuple[float, ...]

    def to_original(self, tokens: float) -> float:
        """Where in the run a rehearsal is after `tokens`; exact at boundaries."""
        return _interpolate(self.rehearsed, self.original, tokens)

    def to_rehearsed(self, tokens: float) -> float:
        """The other way; beyond the end as in the last stretch."""
        return _interpolate(self.original, self.rehearsed, tokens)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    place = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    if x == xs[place + 1]:
        return ys[place + 1]
    share = (x - xs[place]) / (xs[place + 1] - xs[place])
    return ys[place] + share * (ys[place + 1] - ys[place])


def boundaries(config: Config) -> tuple[float, ...]:
    """The tokens at which pieces of the timeline end before the run does, and at last the end. A run without any gets
    one in its middle, so that there is a place to stop and go on."""
    end = end_of(config)
    ends = {piece.until for _, pieces in piecewise(config.timeline) for piece in pieces if piece.until is not None}
    inner = sorted(float(until) for until in ends if until < end)
    return (*(inner or [end / 2]), end)


def end_of(config: Config) -> float:
    """How many tokens a run has seen at its end."""
    train, timeline = config.train, config.full_timeline
    if train.tokens is not None:
        return float(train.tokens)
    step, tokens = 0, 0
    while not train.is_end(step, tokens):
        values = timeline.at(tokens)
        step, tokens = step + 1, tokens + values.batch_size * values.seq_len
    return float(tokens)


def piecewise(timeline: TimelineConfig) -> list[tuple[str, tuple[Piece, ...]]]:
    """The values of a timeline that are made of pieces, by name."""
    values = [(item.name, getattr(timeline, item.name)) for item in fields(timeline)]
    return [(name, value) for name, value in values if isinstance(value, tuple)]


def zones(config: Config, ends: Sequence[float]) -> list[range]:
    """The stretches that must have one scale, together: those that share a ramp or a decay."""
    starts = [0.0, *ends]
    shared = set()
    for _, pieces in piecewise(config.timeline):
        begin = 0.0
        for piece in pieces:
            if piece.until is not None:
                if piece.shape != "constant":
                    shared |= {place for place, tokens in enumerate(starts) if begin < tokens < piece.until}
                begin = piece.until
    edges = [place for place in range(len(starts)) if place not in shared]
    edges = edges if edges[-1] == len(ends) else [*edges, len(ends)]
    return [range(first, last) for first, last in pairwise(edges)]


def make_axis(config: Config, ends: Sequence[float], least: Sequence[float]) -> Axis:
    """The shortest axis on which each stretch has at least `least` tokens."""
    starts = (0.0, *ends)
    lengths = [end - start for start, end in zip(starts, ends, strict=False)]
    rehearsed = [0.0]
    for zone in zones(config, ends):
        scale = max(least[place] / lengths[place] for place in zone)
        begin, first = rehearsed[-1], starts[zone.start]
        inner = [begin + scale * (ends[place] - first) for place in zone[:-1]]
        # Shapes within a zone are kept to the last bit only if nothing but its end is rounded.
        rehearsed += [*inner, float(math.ceil(begin + scale * (ends[zone[-1]] - first)))]
    return Axis(starts, tuple(rehearsed))
