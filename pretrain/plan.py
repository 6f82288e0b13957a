"""What a configuration amounts to, before anything is allocated: sizes, layout, timeline in steps, memory of a rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from model.counts import ParameterCounts, cache_values_per_token, count_parameters, training_flops_per_token
from pretrain.config import Config, TrainConfig, check_layout
from pretrain.errors import UserError
from pretrain.memory import DEVICE_OVERHEAD, GIB, Memory, rank_memory
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


@dataclass(frozen=True)
class Layout:
    """How the ranks are used."""

    world_size: int
    pp: int
    ep: int
    cp: int

    @property
    def dp(self) -> int:
        """Data ranks."""
        return self.world_size // (self.pp * self.cp)


@dataclass(frozen=True)
class Plan:
    """All that `plan` prints. FLOPs are those of training, at the first sequence length and over the whole run; `cache`
    is `model.counts.cache_values_per_token`."""

    name: str
    counts: ParameterCounts
    flops_per_token: float
    flops: float
    cache: tuple[int, int]
    layout: Layout
    micro_batch_size: int
    milestones: tuple[Milestone, ...]
    num_steps: int
    num_tokens: int
    memory: Memory

    @property
    def cache_saving(self) -> float:
        """Share of a multi-head attention's cache that latent attention does without."""
        return 1 - self.cache[0] / self.cache[1]


def plan(config: Config, world_size: int) -> Plan:
    """Works out a run on `world_size` ranks. Raises UserError where the batch does not divide over them."""
    check_layout(config, world_size)
    timeline = config.full_timeline
    steps = list(stretches(timeline, config.train))
    flops = sum(
        training_flops_per_token(config.model, seq_len)
        * sum(stretch.end - stretch.tokens for stretch in steps if stretch.seq_len == seq_len)
        for seq_len in {stretch.seq_len for stretch in steps}
    )
    parallel = config.parallel
    return Plan(
        name=config.run.name,
        counts=count_parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, config.train.seq_len),
        flops=flops,
        cache=cache_values_per_token(config.model),
        layout=Layout(world_size, parallel.pp, parallel.ep, parallel.cp),
        micro_batch_size=config.train.micro_batch_size,
        milestones=tuple(_milestones(timeline, steps)),
        num_steps=steps[-1].step + steps[-1].num_steps,
        num_tokens=steps[-1].end,
        memory=_memory(config, world_size, config.train.micro_batch_size),
    )


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


def _milestones(timeline: Timeline, steps: list[Stretch]) -> Iterator[Milestone]:
    """The first step, and the first step of each new piece of the timeline."""
    yield Milestone(0, 0, timeline.at(0))
    for before, after in pairwise(steps):
        if any(before.tokens < boundary <= after.tokens for boundary in timeline.boundaries()):
            yield Milestone(after.step, after.tokens, timeline.at(after.tokens))


def _memory(config: Config, data_ranks: int, micro_batch_size: int) -> Memory:
    timeline = config.timeline
    lengths = [piece.value for piece in timeline.seq_len] if isinstance(timeline.seq_len, tuple) else []
    return rank_memory(
        config.model,
        dtype=torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32,
        data_ranks=data_ranks,
        micro_batch_size=micro_batch_size,
        seq_len=round(max([config.train.seq_len, *lengths])),
        masked_documents=not config.data.cross_document_attention,
    )


def check_memory(config: Config, planned: Plan, device_memory_gib: float) -> None:
    """Raises UserError, with the largest part and what would help, where a rank needs more than a device has."""
    needed = planned.memory.peak + DEVICE_OVERHEAD
    if needed <= device_memory_gib * GIB:
        return
    parts = (*planned.memory.held, *planned.memory.micro_batch, *planned.memory.step)
    largest = max(parts, key=lambda part: part.bytes)
    raise UserError(
        f"a rank needs {needed / GIB:.1f} GiB, more than --device-memory {device_memory_gib:g}; the largest part is "
        f"{largest.name}, {largest.bytes / GIB:.1f} GiB; "
        + _remedy(config, planned.layout.dp, device_memory_gib * GIB - DEVICE_OVERHEAD)
    )


def _remedy(config: Config, data_ranks: int, limit: float) -> str:
    """The first of smaller micro-batches and more ranks that makes it fit."""
    train = config.train
    for size in range(train.micro_batch_size - 1, 0, -1):
        if train.micro_batch_size % size == 0 and _memory(config, data_ranks, size).peak <= limit:
            return f"train.micro_batch_size = {size} would fit"
    smallest = replace(config, train=replace(train, micro_batch_size=1))
    most_ranks = config.full_timeline.at(0).batch_size
    for ranks in range(data_ranks + 1, most_ranks + 1):
        if _divides(smallest, ranks) and _memory(config, ranks, 1).peak <= limit:
            return f"{ranks} ranks with train.micro_batch_size = 1 would fit"
    needed = _memory(config, most_ranks, 1).peak + DEVICE_OVERHEAD
    return (
        f"even {most_ranks} ranks with train.micro_batch_size = 1 would need {needed / GIB:.1f} GiB each; use devices "
        "with more memory, shorter sequences or a smaller model"
    )


def _divides(config: Config, world_size: int) -> bool:
    try:
        check_layout(config, world_size)
    except UserError:
        return False
    return True


def plan_command(config: Config, world_size: int, device_memory_gib: float | None) -> None:
    """Prints a plan. Raises UserError if the batch does not divide, or a rank needs more than `device_memory_gib`."""
    from rich.console import Console

    from pretrain.plan_tables import render

    planned = plan(config, world_size)
    render(planned, Console(highlight=False))
    if device_memory_gib is not None:
        check_memory(config, planned, device_memory_gib)
