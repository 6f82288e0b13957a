"""Which layouts of a number of ranks divide and fit, which of them is fastest, and which is nearest to a given one.

Varied are `pp`, `ep`, `cp`, the schedule, the ZeRO stage, what is recomputed, whether experts take rows in rounds, and
the size of micro-batches; everything else stays as it is configured. Layouts are predicted in the order of a bound on
their speed, the time that their busiest rank works, until no other can be among the best.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from parallel.schedule import ScheduleName, num_stages
from pretrain.config import Config, check_layout
from pretrain.errors import UserError
from pretrain.planning.footprint import held_by_all, memories_of
from pretrain.planning.forecast import predictor
from pretrain.planning.hardware import Hardware
from pretrain.planning.memory import Memory
from pretrain.planning.prediction import Predictor, StepPrediction

_SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev")
_RECOMPUTED: tuple[tuple[str, ...], ...] = (
    (),
    ("norms", "mla_up", "swiglu"),
    ("norms", "mla_up", "swiglu", "expert_rows"),
    ("block",),
)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_LEAST_TOKENS = 4096
"""Fewer tokens of a sequence are not worth a rank of their own."""
_MAX_DOUBLINGS = 12


@dataclass(frozen=True)
class Found:
    """A layout that divides and fits, with the memory of its rank that needs most and its last step."""

    config: Config
    memory: Memory
    step: StepPrediction
    mfu: float
    tokens_per_s: float


def layouts(config: Config, world_size: int) -> Iterator[Config]:
    """The configuration at every layout of the ranks, as far as ranks, layers, experts, heads and batches divide."""
    model, longest = config.model, _longest(config)
    for pp in _divisors(world_size):
        for cp, ep in product(_divisors(world_size // pp), repeat=2):
            if cp > 1 and (longest % cp or longest // cp < _LEAST_TOKENS or model.num_attention_heads % cp):
                continue
            if pp <= model.num_hidden_layers + 1 and model.n_routed_experts % ep == 0:
                yield from _of_axes(config, world_size, pp=pp, cp=cp, ep=ep)


def _of_axes(config: Config, world_size: int, *, pp: int, cp: int, ep: int) -> Iterator[Config]:
    given = config.parallel
    recomputed = dict.fromkeys((*_RECOMPUTED, given.recompute))
    rounds = dict.fromkeys((0, given.max_expert_rows)) if ep > 1 else (0,)
    for schedule, size in product(_SCHEDULES if pp > 1 else ("1f1b", "dualpipev"), _MICRO_BATCHES):
        sized = replace(config, train=replace(config.train, micro_batch_size=size))
        share = size * world_size // (pp * cp)
        if num_stages(schedule, pp) > config.model.num_hidden_layers + 1 or (schedule == "dualpipe" and pp % 2):
            continue
        if not _batches_divide(sized, share * (2 if schedule == "dualpipe" else 1)):
            continue
        for stage, recompute, rows in product((0, 1, 2, 3) if pp == 1 else (0, 1), recomputed, rounds):
            try:
                parallel = replace(
                    given,
                    pp=pp,
                    ep=ep,
                    cp=cp,
                    schedule=schedule,
                    zero_stage=stage,
                    recompute=recompute,
                    max_expert_rows=rows,
                    fp8_dispatch=given.fp8_dispatch and ep > 1,
                )
            except ValueError:
                continue
            yield replace(sized, parallel=parallel)


def _batches_divide(config: Config, multiple: int) -> bool:
    """Whether every batch of the timeline is a multiple of so many sequences."""
    batch = config.timeline.batch_size
    ramps = isinstance(batch, tuple) and any(piece.shape != "constant" for piece in batch)
    sizes = [config.full_timeline.at(tokens).batch_size for tokens in (0, *config.full_timeline.boundaries())]
    return not any(size % multiple for size in [*sizes, *([config.timeline.batch_size_multiple] if ramps else [])])


def search(
    config: Config,
    world_size: int,
    hardware: Hardware,
    *,
    limit: float,
    count: int = 10,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """The fastest layouts of whose ranks none needs more than `limit` bytes of a device, best first. `tick` hears how
    many of how many layouts have been looked at."""
    if config.precision.dtype != "bf16":
        raise UserError('plan --search predicts speed, which it can in bf16 only; set precision.dtype = "bf16"')
    candidates, room = list(layouts(config, world_size)), _Room(world_size, limit)
    bounds = _Bounds(config, world_size, hardware)
    # Of each, by what is known: a bound of all that share its work, a bound of its own, its prediction.
    queue = [(-bounds.of(candidate), 0, number) for number, candidate in enumerate(candidates)]
    heapq.heapify(queue)
    exact: dict[int, Found] = {}
    best: list[Found] = []
    looked_at = 0
    while queue and len(best) < count:
        _, known, number = heapq.heappop(queue)
        candidate = candidates[number]
        if known == 2:
            best.append(exact[number])
        elif known == 1:
            exact[number] = found = _predict(candidate, world_size, hardware)
            heapq.heappush(queue, (-found.tokens_per_s, 2, number))
        else:
            looked_at += 1
            tick(looked_at, len(candidates))
            if room.has(candidate) and _divides(candidate, world_size):
                predicted, num_micro_batches = _last_step(candidate, world_size, hardware)
                seconds = predicted.least_seconds(num_micro_batches)
                bound = predicted.tokens(num_micro_batches) / seconds / world_size
                heapq.heappush(queue, (-bound, 1, number))
    return best


class _Room:
    """Whether layouts of so many ranks fit into `limit` bytes each. One that does not with micro-batches of one
    sequence does not with larger ones."""

    def __init__(self, world_size: int, limit: float) -> None:
        self._world_size, self._limit = world_size, limit
        self._held: dict[Any, bool] = {}
        self._smallest: dict[Any, bool] = {}

    def has(self, config: Config) -> bool:
        """For a layout."""
        if math.isinf(self._limit):
            return True
        parallel = config.parallel
        key = (parallel.pp, parallel.ep, parallel.cp, parallel.schedule, parallel.zero_stage)
        if key not in self._held:
            self._held[key] = held_by_all(config, self._world_size) <= self._limit
        if not self._held[key]:
            return False
        if parallel not in self._smallest:
            one = replace(config, train=replace(config.train, micro_batch_size=1))
            self._smallest[parallel] = self._fits(one)
        is_one = config.train.micro_batch_size == 1
        return self._smallest[parallel] and (is_one or self._fits(config))

    def _fits(self, config: Config) -> bool:
        return max(memory.on_device for memory in memories_of(config, self._world_size)) <= self._limit


class _Bounds:
    """Tokens a second and GPU that no layout exceeds: were all stages equally long, and nobody waited."""

    def __init__(self, config: Config, world_size: int, hardware: Hardware) -> None:
        self._world_size, self._hardware = world_size, hardware
        self._seconds: dict[Any, tuple[float, float]] = {}

    def of(self, config: Config) -> float:
        """Of a layout."""
        parallel = config.parallel
        key = (parallel.ep, parallel.cp, parallel.recompute, parallel.max_expert_rows, config.train.micro_batch_size)
        predicted, _ = _last_step(config, self._world_size, self._hardware)
        if key not in self._seconds:
            self._seconds[key] = predicted.whole_seconds()
        busy, exchange = self._seconds[key]
        if parallel.schedule in ("dualpipe", "dualpipev"):
            seconds = max(busy + (1 - self._hardware.efficiency.overlapped) * exchange, exchange)
        else:
            seconds = busy + exchange
        ranks = parallel.pp * parallel.cp
        return config.train.micro_batch_size * predicted.sizes.seq_len / seconds / ranks * parallel.pp


def _last_step(config: Config, world_size: int, hardware: Hardware) -> tuple[Predictor, int]:
    """What predicts the last step of a run, and its number of micro-batches."""
    end = config.full_timeline.at(max(config.full_timeline.boundaries(), default=0))
    share = config.parallel.mesh_shape(world_size).dp * config.train.micro_batch_size
    return predictor(config, end.seq_len, world_size, hardware), end.batch_size // share


def _predict(config: Config, world_size: int, hardware: Hardware) -> Found:
    predicted, num_micro_batches = _last_step(config, world_size, hardware)
    step = predicted.step(num_micro_batches)
    memory = max(memories_of(config, world_size), key=lambda memory: memory.peak)
    return Found(config, memory, step, predicted.mfu(step), step.tokens / step.seconds / world_size)


def nearest(config: Config, world_size: int, limit: float) -> tuple[Config, int] | None:
    """The layout, and its number of ranks, that is nearest to a configuration's among those that divide and of which no
    rank needs more than `limit` bytes: on as few ranks more as there must be, then with the least change of all else.
    None if there is none."""
    for ranks in _numbers_of_ranks(world_size):
        room = _Room(ranks, limit)
        for candidate in sorted(layouts(config, ranks), key=lambda candidate: _distance(config, candidate)):
            if room.has(candidate) and _divides(candidate, ranks):
                return candidate, ranks
    return None


def _numbers_of_ranks(world_size: int) -> Iterator[int]:
    yield world_size
    power = 1 << (world_size - 1).bit_length()
    if power != world_size:
        yield power
    for doubling in range(1, _MAX_DOUBLINGS + 1):
        yield power << doubling


def _distance(one: Config, other: Config) -> float:
    here, there = one.parallel, other.parallel
    axes = sum(abs(math.log2(getattr(there, name) / getattr(here, name))) for name in ("pp", "ep", "cp"))
    sizes = abs(math.log2(other.train.micro_batch_size / one.train.micro_batch_size))
    others = sum(
        getattr(here, name) != getattr(there, name)
        for name in ("schedule", "zero_stage", "recompute", "max_expert_rows")
    )
    return 2 * axes + sizes + 1.1 * others


def _divides(config: Config, world_size: int) -> bool:
    try:
        check_layout(config, world_size)
    except UserError:
        return False
    return True


def describe_change(before: Config, after: Config, ranks: int, *, world_size: int) -> str:
    """What differs, as arguments of the command line."""
    words = [f"--world-size {ranks}"] if ranks != world_size else []
    if before.train.micro_batch_size != after.train.micro_batch_size:
        words.append(f"--set train.micro_batch_size={after.train.micro_batch_size}")
    for name in (item.name for item in fields(after.parallel)):
        value = getattr(after.parallel, name)
        if getattr(before.parallel, name) != value:
            words.append(f"--set parallel.{name}={_as_argument(value)}")
    return " ".join(words)


def _as_argument(value: Any) -> str:
    if isinstance(value, tuple):
        return "'[" + ", ".join(f'"{item}"' for item in value) + "]'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _longest(config: Config) -> int:
    pieces = config.timeline.seq_len if isinstance(config.timeline.seq_len, tuple) else ()
    return round(max([config.train.seq_len, *(piece.value for piece in pieces)]))


def _divisors(number: int) -> Sequence[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


class Clock:
    """Shows a bar on a terminal once the work has taken longer than `after` seconds."""

    def __init__(self, console: Any, *, after: float = 2.0) -> None:
        self._console, self._after, self._began = console, after, time.monotonic()
        self._progress: Any = None

    def tick(self, done: int, total: int) -> None:
        """So much is done."""
        if self._progress is None and time.monotonic() - self._began > self._after:
            from rich.progress import Progress

            self._progress = Progress(console=self._console, transient=True)
            self._task = self._progress.add_task("layouts", total=total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
