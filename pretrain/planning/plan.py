"""What a configuration amounts to, before anything is allocated: sizes, layout, timeline in steps, memory of a rank."""

import math
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.counts import ParameterCounts, cache_values_per_token, count_parameters, training_flops_per_token
from parallel.config import ParallelConfig
from parallel.schedule import make_schedule, num_stages
from parallel.simulate import UNIT, simulate
from parallel.simulate import Timeline as PipelineTimeline
from parallel.stages import split_layers
from pretrain.config import Config, check_layout
from pretrain.errors import UserError
from pretrain.planning.footprint import memories_of
from pretrain.planning.forecast import Forecast, forecasts
from pretrain.planning.hardware import Hardware, find_hardware
from pretrain.planning.memory import GIB, Memory
from pretrain.planning.search import describe_change, nearest
from pretrain.planning.steps import Milestone, find_milestones, stretches


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
    is `model.counts.cache_values_per_token`; `forecasts` are for the `hardware`, if there is one to predict for."""

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
    hardware: Hardware | None = None
    forecasts: tuple[Forecast, ...] = ()

    @property
    def memory(self) -> Memory:
        """That of the rank which needs most; `memories` has a rank of each place in the pipeline."""
        return max(self.memories, key=lambda memory: memory.peak)

    @property
    def num_micro_batches(self) -> tuple[int, ...]:
        """In a step of each pipeline, ascending, as the batch grows."""
        share = self.layout.dp * self.micro_batch_size
        return tuple(sorted({milestone.values.batch_size // share for milestone in self.milestones}))

    def pipeline(self, which: int = 0) -> PipelineTimeline | None:
        """A step of one of the `num_micro_batches`, in units of a forward pass; nothing where there is no pipeline to
        speak of."""
        return pipeline_timeline(self.layout.parallel, self.num_micro_batches[which])

    @property
    def cache_saving(self) -> float:
        """Share of a multi-head attention's cache that latent attention does without."""
        return 1 - self.cache[0] / self.cache[1]


def plan(config: Config, world_size: int, hardware: Hardware | None = None) -> Plan:
    """Works out a run on `world_size` ranks, with a forecast if they have `hardware`. Raises UserError where the batch
    does not divide over them."""
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
        milestones=tuple(find_milestones(timeline, steps)),
        num_steps=steps[-1].step + steps[-1].num_steps,
        num_tokens=steps[-1].end,
        memories=memories_of(config, world_size),
        hardware=hardware,
        forecasts=forecasts(config, steps, world_size, hardware) if hardware is not None else (),
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


def check_memory(config: Config, planned: Plan, device_memory_gib: float) -> None:
    """Raises UserError, with the largest part and the nearest layout that fits, where a rank needs more than a device
    has."""
    limit, needed = device_memory_gib * GIB, planned.memory.on_device
    if needed <= limit:
        return
    largest = max(planned.memory.parts, key=lambda part: part.bytes)
    raise UserError(
        f"a rank needs {needed / GIB:.1f} GiB, more than --device-memory {device_memory_gib:g}; the largest part is "
        f"{largest.name}, {largest.bytes / GIB:.1f} GiB; {_remedy(config, planned.layout.world_size, limit)}"
    )


def _remedy(config: Config, world_size: int, limit: float) -> str:
    found = nearest(config, world_size, limit)
    if found is None:
        return (
            "no layout of any number of ranks fits; use devices with more memory, shorter sequences or a smaller model"
        )
    return f"the nearest layout that fits: {describe_change(config, *found, world_size=world_size)}"


def plan_command(
    config: Config, world_size: int, device_memory_gib: float | None, hardware: Path | None, *, searches: bool
) -> None:
    """Prints a plan, or the fastest layouts. Raises UserError, with the nearest layout that works, if the batch does
    not divide, or a rank needs more than `device_memory_gib`."""
    from rich.console import Console

    from pretrain.planning.tables import render, render_search

    console, machine = Console(highlight=False), find_hardware(hardware)
    if searches:
        render_search(config, world_size, machine, device_memory_gib, console)
        return
    try:
        planned = plan(config, world_size, machine)
    except UserError as error:
        raise _with_nearest(error, config, world_size, device_memory_gib) from None
    render(planned, console)
    if device_memory_gib is not None:
        check_memory(config, planned, device_memory_gib)


def _with_nearest(error: UserError, config: Config, world_size: int, device_memory_gib: float | None) -> UserError:
    found = nearest(config, world_size, math.inf if device_memory_gib is None else device_memory_gib * GIB)
    if found is None:
        return error
    works = "divides" if device_memory_gib is None else "divides and fits"
    change = describe_change(config, *found, world_size=world_size)
    return UserError(f"{error}; the nearest layout that {works}: {change}")
