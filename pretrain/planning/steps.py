"""The steps of a run, worked out from its timeline without taking them one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pretrain.config import TrainConfig
from pretrain.timeline import Timeline, TimelineValues


@dataclass(frozen=True)
class Stretch:
    """`num_steps` steps of one size that follow one another, from `step` on, when `tokens` tokens have been seen."""

    step: int
    tokens: int
    num_steps: int
    batch_size: int
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the batch of each step."""
        return self.batch_size * self.seq_len

    @property
    def end(self) -> int:
        """Tokens seen after the last of the steps."""
        return self.tokens + self.num_steps * self.tokens_per_step


@dataclass(frozen=True)
class Milestone:
    """A step with which the timeline begins or turns, and what holds for it."""

    step: int
    tokens: int
    values: TimelineValues


def stretches(timeline: Timeline, train: TrainConfig) -> Iterator[Stretch]:
    """All steps of a run, those of equal size together, up to where `[train]` stops it.

    Between two boundaries of the timeline batch sizes rise or fall, never both, so the last step of a size is found by
    bisection.
    """
    step, tokens = 0, 0
    while not train.is_end(step, tokens):
        values = timeline.at(tokens)
        size = values.batch_size * values.seq_len
        limits = [boundary for boundary in timeline.boundaries() if boundary > tokens]
        limits += [train.tokens] if train.tokens is not None else []
        most = min([-(-(limit - tokens) // size) for limit in limits], default=train.steps or 0)
        if train.steps is not None:
            most = min(most, train.steps - step)
        num_steps = _count_equal(timeline, tokens, size, most)
        yield Stretch(step, tokens, num_steps, values.batch_size, values.seq_len)
        step, tokens = step + num_steps, tokens + num_steps * size


def _count_equal(timeline: Timeline, tokens: int, size: int, most: int) -> int:
    """How many of `most` steps of `size` tokens from `tokens` on have that size by the timeline; the first has."""
    known, unknown = 1, most + 1
    while unknown - known > 1:
        middle = (known + unknown) // 2
        values = timeline.at(tokens + (middle - 1) * size)
        if values.batch_size * values.seq_len == size:
            known = middle
        else:
            unknown = middle
    return known


def find_milestones(timeline: Timeline, steps: list[Stretch]) -> Iterator[Milestone]:
    """The first step, and the first step of each new piece of the timeline."""
    yield Milestone(0, 0, timeline.at(0))
    for before, after in pairwise(steps):
        if any(before.tokens < boundary <= after.tokens for boundary in timeline.boundaries()):
            yield Milestone(after.step, after.tokens, timeline.at(after.tokens))
