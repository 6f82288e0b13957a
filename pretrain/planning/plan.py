"""What a configuration amounts to, before anything is allocated: sizes, layout, timeline in steps, memory of a rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from model.config import ModelConfig
from model.counts import ParameterCounts, cache_values_per_token, count_parameters, training_flops_per_token
from parallel.config import ParallelConfig
from parallel.schedule import make_schedule, num_stages
from parallel.simulate import UNIT, simulate
from parallel.simulate import Timeline as PipelineTimeline
from parallel.stages import split_layers
from pretrain.config import Config, TrainConfig, check_layout
from pretrain.errors import UserError
from pretrain.fp8 import fp8_config
from pretrain.planning.activations import Activations
from pretrain.planning.memory import DEVICE_OVERHEAD, GIB, Memory, rank_memories
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
    """How the ranks are used. `stages` are the main layers of each stage of the pipeline."""

    world_size: int
    parallel: ParallelConfig
    stages: tuple[tuple[int, ...], ...]

    @property
    def dp(self) -> int:
        """Data ranks."""
        return self.world_size // (self.parallel.pp * self.parallel.cp)


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
    memories: tuple[Memory, ...]

    @property
    def memory(self) -> Memory:
        """That of the rank which needs most; `memories` has a rank of each place in the pipeline."""
        return max(self.memories, key=lambda memory: memory.peak)

    @property
    def num_micro_batches(self) -> tuple[int, ...]:
        """In a step of each pipeline, ascending, as the batch grows."""
        share = self.layout.dp * self.micro_batch_size
        return tuple(sorted({milestone.values.batch_size // share for milestone in self.milestones}))

    def pipeline(self) -> PipelineTimeline | None:
        """A step of the first batch size, in units of a forward pass; nothing where there is no pipeline to speak
        of."""
        return pipeline_timeline(self.layout.parallel, self.num_micro_batches[0])

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
        layout=Layout(world_size, parallel, _stages(config.model, parallel)),
        micro_batch_size=config.train.micro_batch_size,
        milestones=tuple(_milestones(timeline, steps)),
        num_steps=steps[-1].step + steps[-1].num_steps,
        num_tokens=steps[-1].end,
        memories=_memories(config, world_size),
    )


def pipeline_timeline(parallel: ParallelConfig, num_micro_batches: int) -> PipelineTimeline | None:
    """A step of a pipeline whose backward passes take twice as long as the forward ones, half of it for weights. None
    where a rank has nobody to pass on to. Raises ValueError where the schedule does not exist for these numbers."""
    if num_stages(parallel.schedule, parallel.pp) == 1:
        return None
    schedule = make_schedule(parallel.schedule, num_ranks=parallel.pp, num_micro_batches=num_micro_batches)
    return simulate(schedule, UNIT)


def _stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, ...], ...]:
    return tuple(split_layers(model, num_stages(parallel.schedule, parallel.pp)))


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


def _memories(config: Config, world_size: int) -> tuple[Memory, ...]:
    """Of a rank at each place of the pipeline, with the longest sequences and the largest batch of the run."""
    timeline, train, parallel = config.timeline, config.train, config.parallel
    lengths = [piece.value for piece in timeline.seq_len] if isinstance(timeline.seq_len, tuple) else []
    sizes = [config.full_timeline.at(tokens).batch_size for tokens in (0, *config.full_timeline.boundaries())]
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    activations = Activations(
        model=config.model,
        parallel=parallel,
        num_bytes=dtype.itemsize,
        micro_batch_size=train.micro_batch_size,
        seq_len=round(max([train.seq_len, *lengths])),
        masked_documents=not config.data.cross_document_attention,
    )
    data_ranks = parallel.mesh_shape(world_size).dp
    return rank_memories(
        activations,
        dtype=dtype,
        optimizer=config.optimizer,
        world_size=world_size,
        num_micro_batches=max(sizes) // (data_ranks * train.micro_batch_size),
        fp8=fp8_config(config, "cuda"),
    )


def check_memory(config: Config, planned: Plan, device_memory_gib: float) -> None:
    """Raises UserError, with the largest part and what would help, where a rank needs more than a device has."""
    needed = planned.memory.peak + DEVICE_OVERHEAD
    if needed <= device_memory_gib * GIB:
        return
    largest = max(planned.memory.parts, key=lambda part: part.bytes)
    raise UserError(
        f"a rank needs {needed / GIB:.1f} GiB, more than --device-memory {device_memory_gib:g}; the largest part is "
        f"{largest.name}, {largest.bytes / GIB:.1f} GiB; "
        + _remedy(config, planned.layout.world_size, device_memory_gib * GIB - DEVICE_OVERHEAD)
    )


def _remedy(config: Config, world_size: int, limit: float) -> str:
    """The first of smaller micro-batches, recomputation and more ranks that makes it fit."""
    train, parallel = config.train, config.parallel
    for size in range(train.micro_batch_size - 1, 0, -1):
        smaller = replace(config, train=replace(train, micro_batch_size=size))
        if train.micro_batch_size % size == 0 and _fits(smaller, world_size, limit):
            return f"train.micro_batch_size = {size} would fit"
    frugal = replace(
        config,
        train=replace(train, micro_batch_size=1),
        parallel=replace(parallel, recompute=(*parallel.recompute, "block")),
    )
    if _fits(frugal, world_size, limit):
        also = "" if train.micro_batch_size == 1 else " with train.micro_batch_size = 1"
        return f'parallel.recompute = ["block"]{also} would fit'
    ranks, most, peak = world_size, world_size, _peak(frugal, world_size)
    while (ranks := 2 * ranks) <= world_size * config.full_timeline.at(0).batch_size:
        if not _divides(frugal, ranks):
            continue
        most, peak = ranks, _peak(frugal, ranks)
        if peak <= limit:
            return f'{ranks} ranks with train.micro_batch_size = 1 and parallel.recompute = ["block"] would fit'
    return (
        f'even {most} ranks with train.micro_batch_size = 1 and parallel.recompute = ["block"] would need '
        f"{(peak + DEVICE_OVERHEAD) / GIB:.1f} GiB each; divide the model further by parallel.pp and parallel.ep, or "
        "use devices with more memory, shorter sequences or a smaller model"
    )


def _fits(config: Config, world_size: int, limit: float) -> bool:
    return _divides(config, world_size) and _peak(config, world_size) <= limit


def _peak(config: Config, world_size: int) -> int:
    return max(memory.peak for memory in _memories(config, world_size))


def _divides(config: Config, world_size: int) -> bool:
    try:
        check_layout(config, world_size)
    except UserError:
        return False
    return True


def plan_command(config: Config, world_size: int, device_memory_gib: float | None) -> None:
    """Prints a plan. Raises UserError if the batch does not divide, or a rank needs more than `device_memory_gib`."""
    from rich.console import Console

    from pretrain.planning.tables import render

    planned = plan(config, world_size)
    render(planned, Console(highlight=False))
    if device_memory_gib is not None:
        check_memory(config, planned, device_memory_gib)
