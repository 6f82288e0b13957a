"""What a rehearsal makes smaller, and what it keeps: from one configuration another, both as values.

Kept are the layers, the stages and their schedule, experts, groups and how many a token takes, the values of the
timeline in their order, the precision's dtype, what is recomputed, how checkpoints are written. Smaller are all widths,
the sequences, the batches by one factor, the tokens by `pretrain.rehearsal.axis`, and the data ranks.
"""

import math
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import gcd, lcm

from model.config import ModelConfig
from parallel.config import ParallelConfig
from pretrain.config import Config, TrainConfig
from pretrain.errors import UserError
from pretrain.rehearsal.axis import Axis, boundaries, end_of, make_axis, piecewise
from pretrain.timeline import Piece, Pieces, TimelineConfig, value_at

_WIDTHS = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 8, "num_attention_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
_SEQ_LEN = 32
_LONGEST = 1024
_MOST_PARTS = 64
MOST_STEPS = 1000


@dataclass(frozen=True)
class Rehearsal:
    """A run and its rehearsal. `config` is that of the last stretch, which ends where the run does; a sequence has
    `length` of the run's tokens for one of its own, a batch `batch` of the run's sequences."""

    original: Config
    config: Config
    axis: Axis
    world_size: int
    length: float
    batch: float

    @property
    def multiple(self) -> int:
        """What sequences a step come in."""
        timeline = self.config.timeline
        return timeline.batch_size_multiple if timeline.batch_size is not None else 1

    def stretch(self, number: int) -> Config:
        """The configuration that trains up to the end of a stretch, from wherever it is."""
        tokens = math.ceil(self.axis.rehearsed[number + 1])
        return replace(self.config, train=replace(self.config.train, tokens=tokens))

    def starts(self) -> list[int]:
        """The tokens after which each step begins."""
        timeline, train, tokens = self.config.full_timeline, self.config.train, 0
        starts: list[int] = []
        while not train.is_end(len(starts), tokens) and len(starts) <= MOST_STEPS:
            starts.append(tokens)
            values = timeline.at(tokens)
            tokens += values.batch_size * values.seq_len
        return starts

    def steps_of_stretches(self) -> list[int]:
        """How many steps begin in each stretch."""
        starts, knots = self.starts(), self.axis.rehearsed
        return [sum(a <= tokens < b for tokens in starts) for a, b in pairwise(knots)]


def make_rehearsal(config: Config, *, vocab_size: int, processes: int, steps: int) -> Rehearsal:
    """The rehearsal of a run on up to `processes` ranks with at least `steps` steps before and after each boundary. The
    datasets are to be put in. Raises UserError for runs that cannot be rehearsed so."""
    parallel, world_size = _parallel(config.parallel, processes)
    data_ranks = world_size // parallel.pp // parallel.cp
    unit = data_ranks * (2 if parallel.schedule == "dualpipe" else 1)
    batch = _batch_factor(config, unit, max(parallel.pp, 2) * data_ranks)
    length = _length_factor(config, parallel.cp)
    parallel = _with_fewer_rows(parallel, config, length)
    ends = boundaries(config)

    def scaled(axis: Axis) -> Rehearsal:
        small = replace(
            config,
            run=replace(config.run, name=f"rehearse-{config.run.name}", init_from=None),
            model=_model(config.model, parallel.cp, vocab_size, length),
            train=_train(config, axis, batch=batch, length=length),
            timeline=_timeline(config.timeline, axis, batch=batch, length=length, multiple=unit),
            parallel=parallel,
            precision=replace(config.precision, fp8="off", fp8_power_of_two=True),
            checkpoint=replace(config.checkpoint, every=0, keep_every=0),
            logging=replace(config.logging, every=1, fp8_every=0),
            guards=replace(config.guards, lost_after=max(config.guards.lost_after, 60.0)),
        )
        return Rehearsal(config, small, axis, world_size, length, batch)

    least = [steps * size for size in _step_sizes(config, ends, batch, length)]
    while True:
        rehearsal = scaled(make_axis(config, ends, least))
        if len(rehearsal.starts()) > MOST_STEPS:
            raise UserError(
                f"[timeline] has boundaries so close together within a ramp or decay that {steps} steps between them "
                f"would need more than {MOST_STEPS:,} of the whole; rehearse a timeline without some of them"
            )
        found = rehearsal.steps_of_stretches()
        if min(found) >= steps:
            return rehearsal
        least = [wanted * (1.1 if count < steps else 1) for wanted, count in zip(least, found, strict=True)]


def _parallel(parallel: ParallelConfig, processes: int) -> tuple[ParallelConfig, int]:
    """All stages, and of the ranks of each as many as fit, for positions first, then for experts; and how many ranks
    that makes. Two of them if nothing needs more, so that gradients are summed."""
    room = processes // parallel.pp
    if not room:
        raise UserError(
            f"parallel.pp = {parallel.pp} needs as many processes to rehearse all stages, but --processes {processes} "
            f"allows fewer; give --processes {parallel.pp}"
        )
    cp = max(size for size in _divisors(parallel.cp) if size <= room)
    ep = max(size for size in _divisors(parallel.ep) if lcm(size, cp) <= room)
    ranks = max(lcm(cp, ep), min(2, room))
    bound = parallel.max_expert_rows if ep > 1 else 0
    small = replace(parallel, cp=cp, ep=ep, fp8_dispatch=False, max_expert_rows=bound)
    return small, parallel.pp * ranks


def _with_fewer_rows(parallel: ParallelConfig, config: Config, length: float) -> ParallelConfig:
    """With a bound of rows at the experts that is met as often as in the run."""
    if not parallel.max_expert_rows:
        return parallel
    rows = parallel.max_expert_rows / length / config.train.micro_batch_size * parallel.ep / config.parallel.ep
    return replace(parallel, max_expert_rows=max(round(rows), parallel.ep + 1))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _batch_factor(config: Config, unit: int, enough: int) -> float:
    """By how much batches are divided, so that each that the timeline names is whole units, and the largest is `enough`
    sequences if that is possible."""
    pieces = config.timeline.batch_size
    values = [config.full_timeline.at(0).batch_size] if pieces is None else _named(pieces)
    common = reduce(gcd, map(int, values))
    parts = int(max(values)) // common
    if parts > _MOST_PARTS:
        listed = ", ".join(f"{value:g}" for value in values)
        raise UserError(
            f"timeline.batch_size has the values {listed}, the largest {parts} times what divides them all; a "
            f"rehearsal, whose batches are smaller by one factor, takes up to {_MOST_PARTS}: round them to multiples "
            "of a larger number"
        )
    multiples = min(math.ceil(enough / (unit * parts)), common // unit)
    return common / (unit * max(1, multiples))


def _named(pieces: Pieces) -> list[float]:
    """The values that stand in a timeline."""
    if not isinstance(pieces, tuple):
        return [pieces]
    return [value for piece in pieces for value in (piece.start, piece.value) if value is not None]


def _length_factor(config: Config, cp: int) -> float:
    """By how much sequences are shorter."""
    lengths = [config.train.seq_len, *_named(config.timeline.seq_len or config.train.seq_len)]
    shortest = lcm(_SEQ_LEN, cp)
    factor = max(min(lengths) / shortest, 1.0)
    for length in lengths:
        if length / factor > _LONGEST or not (length / factor / cp).is_integer():
            raise UserError(
                f"timeline.seq_len has the values {min(lengths):g} and {length:g}; a rehearsal, whose sequences are "
                f"shorter by one factor, needs multiples of the shortest, up to {_LONGEST // shortest} times as long"
            )
    return factor


def _step_sizes(config: Config, ends: tuple[float, ...], batch: float, length: float) -> list[float]:
    """The tokens of a step of the rehearsal in each stretch, on average."""
    timeline, sizes = config.full_timeline, []
    for start, end in zip((0.0, *ends), ends, strict=False):
        edges = [timeline.at(int(tokens)) for tokens in (math.ceil(start), math.ceil(end) - 1)]
        sizes.append(sum(values.batch_size * values.seq_len for values in edges) / 2 / batch / length)
    return sizes


def _model(model: ModelConfig, cp: int, vocab_size: int, length: float) -> ModelConfig:
    widths = {name: width for name, width in _WIDTHS.items() if (getattr(model, name) or 0) > width}
    heads = min(model.num_attention_heads, lcm(_WIDTHS["num_attention_heads"], cp))
    scaling = model.rope_scaling
    if scaling is not None:
        before = max(1, round(scaling.original_max_position_embeddings / length))
        scaling = replace(scaling, original_max_position_embeddings=before)
    widths["num_attention_heads"] = heads
    return replace(model, vocab_size=vocab_size, rope_scaling=scaling, **widths)  # type: ignore[arg-type]


def _train(config: Config, axis: Axis, *, batch: float, length: float) -> TrainConfig:
    train = config.train
    return replace(
        train,
        seq_len=round(train.seq_len / length),
        micro_batch_size=1,
        batch_size=None if train.batch_size is None else round(train.batch_size / batch),
        steps=None,
        tokens=math.ceil(axis.rehearsed[-1]),
        validate_every=min(train.validate_every, 1),
        validation_samples=min(train.validation_samples, 8),
    )


def _timeline(timeline: TimelineConfig, axis: Axis, *, batch: float, length: float, multiple: int) -> TimelineConfig:
    factors = {"batch_size": batch, "seq_len": length}

    def bent(piece: Piece, factor: float) -> Piece:
        until = None if piece.until is None else axis.to_rehearsed(piece.until)
        start = None if piece.start is None else piece.start / factor
        return replace(piece, value=piece.value / factor, start=start, until=until)

    changes: dict[str, Pieces] = {
        name: tuple(bent(piece, factors.get(name, 1.0)) for piece in pieces) for name, pieces in piecewise(timeline)
    }
    for name, factor in factors.items():
        value = getattr(timeline, name)
        if isinstance(value, int | float):
            changes[name] = value / factor
    has_batch = timeline.batch_size is not None
    return replace(timeline, **changes, batch_size_multiple=multiple if has_batch else 1)


def values_of_run(rehearsal: Rehearsal, tokens: int) -> dict[str, float]:
    """What the run's own timeline gives where the rehearsal is after `tokens`; batches, not rounded, and lengths in the
    rehearsal's sizes."""
    config, there = rehearsal.original, rehearsal.axis.to_original(tokens)
    timeline = config.timeline
    batch = timeline.batch_size if timeline.batch_size is not None else config.train.batch_size
    length = timeline.seq_len if timeline.seq_len is not None else config.train.seq_len
    assert batch is not None
    return {
        "lr": value_at(timeline.learning_rate, there),
        "bias_update_speed": value_at(timeline.bias_update_speed, there),
        "mtp_weight": value_at(timeline.mtp_weight, there),
        "batch_size": value_at(batch, there) / rehearsal.batch,
        "seq_len": value_at(length, there) / rehearsal.length,
    }


def describe(rehearsal: Rehearsal) -> tuple[list[str], list[str]]:
    """What is smaller than in the run, and what a rehearsal does not show."""
    large, small = rehearsal.original, rehearsal.config
    scaled = [
        f"{name} {getattr(large.model, name)} → {getattr(small.model, name)}"
        for name in ("vocab_size", *_WIDTHS)
        if getattr(large.model, name) != getattr(small.model, name)
    ]
    factors = {"batches": rehearsal.batch, "sequences": rehearsal.length}
    scaled += [f"{name} ÷ {factor:g}" for name, factor in factors.items() if factor != 1]
    if large.train.micro_batch_size > 1:
        scaled.append(f"micro_batch_size {large.train.micro_batch_size} → 1")
    scaled.append(f"tokens {end_of(large):,.0f} → {small.train.tokens:,}, stretch by stretch")
    missing = ["GPUs, NCCL, nodes, and the speed and memory of anything"]
    for axis in ("ep", "cp"):
        sizes = getattr(large.parallel, axis), getattr(small.parallel, axis)
        if sizes[0] != sizes[1]:
            missing.append(f"{axis} = {sizes[0]}: " + (f"only {sizes[1]}" if sizes[1] > 1 else "all in one process"))
    if large.run.init_from is not None:
        missing.append(f"the weights of {large.run.init_from}: it begins with new ones")
    if large.precision.fp8 != "off":
        missing.append(f'fp8 = "{large.precision.fp8}": the widths are too small for its tiles')
    return scaled, missing
