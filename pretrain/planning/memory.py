"""What the ranks of a run hold in memory, by part: exactly for weights and optimizer, estimated for activations.

Weights and optimizer follow `parallel.zero`. N parameters take 4N bytes in fp32 and as much again for their gradients;
in bf16 2N, and 4N for the fp32 sums of gradients. Masters and moments are another 12N (8N with moments in bf16). ZeRO
divides over R replicas from stage 1 on masters and moments, from 2 on gradients, and from 3 on weights; R is smaller
for experts, of which each lives on fewer ranks.

Activations are those of `pretrain.planning.activations`, of as many micro-batches as the schedule has alive at once.
They are gone when the step ends and its own buffers appear, so a rank's peak is what it always holds and the larger of
the two.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

import torch

from model.config import ModelConfig
from model.fp8 import Fp8Config
from model.linear import Linear
from model.transformer import ModelPart, Transformer, whole_model
from parallel.config import ParallelConfig
from parallel.mesh import MeshShape
from parallel.optimizer import OptimizerConfig, is_expert
from parallel.schedule import Schedule, ScheduleName, make_schedule
from parallel.simulate import UNIT, simulate
from parallel.stages import part_of_rank, split_layers
from parallel.zero import BUCKET_ELEMENTS
from pretrain.planning.activations import Activations, Live, Sizes, heaviest, live_moments
from pretrain.planning.pairs import most_beside, side_by_side, turns

GIB = 1 << 30
DRIVER = GIB
"""What a GPU's driver, libraries and channels of collectives take beside tensors."""
FRAGMENTATION = 0.03
"""Of the peak, what an allocator holds in gaps: allowed for, not measured."""

Device = Literal["cuda", "cpu"]

_FP32 = 4
_ALIGNMENT = 2
_WHAT = {
    "states": "between layers",
    "norms": "what they give",
    "attention": "latents, queries, keys, values",
    "routing": "affinities, choices, permutations",
    "routed experts": "rows there and back, SwiGLU; mean load",
    "other MLPs": "of dense layers, shared experts",
    "deferred": "of weight gradients that wait",
    "loss": "gradients of states and head",
}


@dataclass(frozen=True)
class Part:
    """A part of the memory in bytes, and what it is."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True)
class Memory:
    """The memory of one rank: `held` all the time, `activations` until backward passes end, while `live` micro-batches
    at most are alive (counted once a stage), `step` at the end; `on_host` bytes are in the CPU's memory, and `outboxes`
    are not of the allocator."""

    held: tuple[Part, ...]
    activations: tuple[Part, ...]
    step: tuple[Part, ...]
    live: int = 1
    on_host: int = 0
    outboxes: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of the device's."""
        return self.held + self.activations + self.step

    @property
    def peak(self) -> int:
        """Bytes of all tensors at once."""
        return total(self.held) + max(total(self.activations), total(self.step))

    @property
    def allowance(self) -> tuple[Part, ...]:
        """What a device needs beside tensors."""
        gaps = round(FRAGMENTATION * self.peak)
        outboxes = Part("outboxes", self.outboxes, "from which copy engines of others take rows")
        return (
            Part("driver and libraries", DRIVER, "with the channels of collectives"),
            *((outboxes,) if self.outboxes else ()),
            Part("fragmentation", gaps, f"allowed for, {100 * FRAGMENTATION:g} % of the peak"),
        )

    @property
    def on_device(self) -> int:
        """Bytes of a device that are needed."""
        return self.peak + total(self.allowance)


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of the parameters of one rank: those of the optimizer's groups (`experts` apart only where they are
    divided over ranks), and of the largest one."""

    matrices: int
    vectors: int
    experts: int
    largest: int

    @property
    def all(self) -> int:
        """Every trained parameter."""
        return self.matrices + self.vectors + self.experts


@dataclass(frozen=True, kw_only=True)
class Division:
    """How what belongs to the optimizer is kept and divided, over `replicas` ranks, and `expert_replicas` for
    experts."""

    dtype: torch.dtype
    moments: str
    stage: int
    offload: bool
    replicas: int
    expert_replicas: int


def total(parts: tuple[Part, ...]) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


def rank_memories(
    activations: Activations,
    *,
    dtype: torch.dtype,
    optimizer: OptimizerConfig,
    world_size: int,
    num_micro_batches: int,
    fp8: Fp8Config | None = None,
    device: Device = "cuda",
) -> tuple[Memory, ...]:
    """The memory of a rank at each place of the pipeline, all micro-batches of which are `num_micro_batches`. Where the
    device is a CPU, what our kernels do in one pass leaves tensors on the way."""
    parallel, model = activations.parallel, activations.model
    shape = parallel.mesh_shape(world_size)
    division = _division(parallel, dtype, optimizer, shape)
    # More micro-batches do not lie on top of one another.
    pipeline = _pipeline(parallel.schedule, parallel.pp, min(num_micro_batches, 4 * parallel.pp))
    memories = []
    for place in range(parallel.pp):
        part = part_of_rank(model, shape, pipeline.schedule, place * shape.batch_ranks)
        sizes = parameter_sizes(model, part)
        live = _activations(activations, pipeline, place, defers=parallel.zero_stage < 2)
        logits, gradient = (activations.logits(device) if part.head else 0), dtype.itemsize * sizes.largest
        # What the losses kept is gone before layers run again; the logits are, before anything else is made.
        loss = activations.loss() if part.head else 0
        backward = max(logits, gradient, activations.working(part.layers, gradient) - loss)
        memories.append(
            Memory(
                held=_held(sizes, division),
                activations=(
                    *live,
                    *_rounded(model, part, fp8),
                    Part("backward pass", backward, "gradients on their way, what it computes again"),
                ),
                step=_step_buffers(sizes, division, device),
                live=pipeline.peaks[place],
                on_host=_optimizer_bytes(sizes, division) if division.offload else 0,
                outboxes=activations.outboxes,
            )
        )
    return tuple(memories)


def least_held(
    model: ModelConfig, parallel: ParallelConfig, *, dtype: torch.dtype, optimizer: OptimizerConfig, world_size: int
) -> int:
    """Bytes that the rank with most parameters always holds."""
    shape = parallel.mesh_shape(world_size)
    schedule = _pipeline(parallel.schedule, parallel.pp, 2 * parallel.pp).schedule
    parts = [part_of_rank(model, shape, schedule, place * shape.batch_ranks) for place in range(parallel.pp)]
    division = _division(parallel, dtype, optimizer, shape)
    return max(total(_held(parameter_sizes(model, part), division)) for part in dict.fromkeys(parts))


def _division(parallel: ParallelConfig, dtype: torch.dtype, optimizer: OptimizerConfig, shape: MeshShape) -> Division:
    replicas = shape.batch_ranks * (2 if shape.bidirectional else 1)
    return Division(
        dtype=dtype,
        moments=optimizer.moments,
        stage=parallel.zero_stage,
        offload=parallel.optimizer_offload,
        replicas=replicas,
        expert_replicas=replicas // parallel.ep,
    )


@dataclass(frozen=True)
class _Pipeline:
    """A schedule with how many micro-batches each rank has alive at most, and the moments when it may have most."""

    schedule: Schedule
    peaks: tuple[int, ...]
    moments: tuple[tuple[Live, ...], ...]


@cache
def _pipeline(name: ScheduleName, num_ranks: int, num_micro_batches: int) -> _Pipeline:
    schedule = make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    peaks = simulate(schedule, UNIT).peak_activations
    return _Pipeline(schedule, peaks, tuple(map(live_moments, schedule.steps)))


@cache
def parameter_sizes(model: ModelConfig, part: ModelPart | None = None) -> ParameterSizes:
    """Counts on the meta device."""
    part = whole_model(model) if part is None else part
    kinds = [_layer_kind(model, index) for index in part.layers]
    counts = [_part_sizes(model, replace(part, layers=(index,), embedding=False, head=False)) for index in kinds]
    counts.append(_part_sizes(model, replace(part, layers=())))
    return ParameterSizes(
        matrices=sum(count.matrices for count in counts),
        vectors=sum(count.vectors for count in counts),
        experts=sum(count.experts for count in counts),
        largest=max(count.largest for count in counts),
    )


def _layer_kind(model: ModelConfig, index: int) -> int:
    """The first layer that has the same parameters as one."""
    firsts = (0, model.first_k_dense_replace, model.num_hidden_layers)
    return max(first for first in firsts if first <= index)


@cache
def _part_sizes(model: ModelConfig, part: ModelPart) -> ParameterSizes:
    with torch.device("meta"):
        parameters = dict(Transformer(model, part).named_parameters())
    is_apart = part.num_local_experts < model.n_routed_experts
    experts = sum(p.numel() for name, p in parameters.items() if is_apart and is_expert(name))
    return ParameterSizes(
        matrices=sum(p.numel() for p in parameters.values() if p.dim() > 1) - experts,
        vectors=sum(p.numel() for p in parameters.values() if p.dim() == 1),
        experts=experts,
        largest=max((p.numel() for p in parameters.values()), default=0),
    )


def _rounded(model: ModelConfig, part: ModelPart, fp8: Fp8Config | None) -> tuple[Part, ...]:
    size = rounded_weights(model, part, fp8) if fp8 is not None and fp8.keeps_weights else 0
    return (Part("weights in FP8", size, "rounded once a step, as they are and transposed"),) if size else ()


@cache
def rounded_weights(model: ModelConfig, part: ModelPart, fp8: Fp8Config) -> int:
    """Bytes of the weights of a part of the network in FP8, twice, without the few of their scales."""
    with torch.device("meta"):
        modules = list(Transformer(model, part, fp8=fp8).modules())
    layers = [module for module in modules if isinstance(module, Linear) and module.quantizer is not None]
    return 2 * sum(layer.weight.numel() for layer in layers)


def _activations(activations: Activations, pipeline: _Pipeline, place: int, *, defers: bool) -> tuple[Part, ...]:
    """Those of all live micro-batches at a place of the pipeline."""
    schedule = pipeline.schedule
    layers, last = split_layers(activations.model, schedule.num_stages), schedule.num_stages - 1
    stages = schedule.stages_of(place)
    of_stages = {stage: turns(activations, layers[stage], is_last=stage == last) for stage in stages}
    pairs = product(stages, stages)
    sizes = heaviest(
        pipeline.moments[place],
        {
            "kept": {(stage,): activations.stage(layers[stage], is_last=stage == last) for stage in stages},
            "deferred": {
                (stage,): activations.deferred(layers[stage], is_last=stage == last) if defers else Sizes()
                for stage in stages
            },
            "pair": {
                (one, other): most_beside(*side_by_side(of_stages[one], of_stages[other])) for one, other in pairs
            },
        },
    )
    return tuple(Part(name, sizes[name], what) for name, what in _WHAT.items() if sizes[name])


def _held(sizes: ParameterSizes, division: Division) -> tuple[Part, ...]:
    width, name = division.dtype.itemsize, "fp32" if division.dtype == torch.float32 else "bf16"
    whole, shares = _padded(sizes, division), _shares(sizes, division)
    is_divided = division.stage == 3
    place = "shared out over replicas" if is_divided else "whole on every rank"
    parts = [Part("weights", width * (shares if is_divided else whole), f"{name}, {place}")]
    if division.stage >= 2:
        parts.append(Part("gradient sums", _FP32 * shares, "fp32, shared out over replicas"))
        bucket = (_FP32 if is_divided else width) * max(BUCKET_ELEMENTS, sizes.largest)
        parts.append(Part("gradients", bucket, "a bucket, until they are reduced"))
    elif width < _FP32:
        parts.append(Part("gradient sums", _FP32 * whole, "fp32, whole on every rank"))
    else:
        parts.append(Part("gradients", _FP32 * sizes.all, "fp32, summed in place"))
    if not division.offload:
        parts.append(Part("masters and moments", _optimizer_bytes(sizes, division), _optimizer_share(sizes, division)))
    return tuple(parts)


def _optimizer_bytes(sizes: ParameterSizes, division: Division) -> int:
    """Of a rank's masters and moments; without ZeRO, fp32 weights are their own masters."""
    moments = 2 * (_FP32 if division.moments == "fp32" else 2)
    if division.stage == 0:
        return (moments + (_FP32 if division.dtype != torch.float32 else 0)) * sizes.all
    return (moments + _FP32) * _shares(sizes, division)


def _optimizer_share(sizes: ParameterSizes, division: Division) -> str:
    kept = "fp32" if division.moments == "fp32" else "fp32 and bf16"
    if division.stage == 0 or division.replicas == 1:
        return f"{kept}, all of them"
    experts = f", 1/{division.expert_replicas} of experts'" if sizes.experts else " of them"
    return f"{kept}, 1/{division.replicas}{experts}"


def _groups(sizes: ParameterSizes, division: Division) -> tuple[tuple[int, int], ...]:
    """The optimizer's groups: elements, and over how many ranks they are divided."""
    return (
        (sizes.matrices, division.replicas),
        (sizes.vectors, division.replicas),
        (sizes.experts, division.expert_replicas),
    )


def _padded(sizes: ParameterSizes, division: Division) -> int:
    """Elements of the flat groups of ZeRO, which are a multiple of the ranks."""
    if division.stage == 0:
        return sizes.all
    return sum(-(-numel // (_ALIGNMENT * ranks)) * _ALIGNMENT * ranks for numel, ranks in _groups(sizes, division))


def _shares(sizes: ParameterSizes, division: Division) -> int:
    """Elements of a rank's shares of the groups."""
    return sum(-(-numel // (_ALIGNMENT * ranks)) * _ALIGNMENT for numel, ranks in _groups(sizes, division))


def _step_buffers(sizes: ParameterSizes, division: Division, device: Device) -> tuple[Part, ...]:
    """Without ZeRO, and for bf16 weights in stage 1, all happens where gradients and weights are; those whose masters
    are elsewhere, and those of fp32 in stage 1, pass through a bucket before anything else is made."""
    shares = [-(-numel // ranks) for numel, ranks in _groups(sizes, division)]
    is_fp32 = division.dtype == torch.float32
    bucket = Part("reduction", _FP32 * BUCKET_ELEMENTS, "a bucket of gradients in fp32")
    if division.stage == 1 and not is_fp32 and division.offload:
        return (bucket,)
    parts = []
    if division.stage > 1 or (division.stage == 1 and is_fp32):
        parts.append(Part("own gradients", _FP32 * max(shares), "this rank's share, flat"))
    if device == "cpu" and not division.offload:
        updated = max(shares) if division.stage else sizes.largest
        parts.append(Part("update", 2 * _FP32 * updated, "what AdamW computes on the way"))
    passes_bucket = division.stage == 1 and is_fp32
    return (bucket,) if passes_bucket and bucket.bytes > total(tuple(parts)) else tuple(parts)
