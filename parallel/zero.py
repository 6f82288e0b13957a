"""DeepSpeed, in one file: ZeRO owns the end of the step and nothing else.

Micro-batches run with plain autograd on the module, never through DeepSpeed's engine; then one `step` reduces the
gradients over the replicas, takes the global norm, clips, runs AdamW on this rank's share and gathers the weights
(unmanaged gradient accumulation, where a step is the accumulation boundary). Which of DeepSpeed's wrappers does it
depends on the dtype: fp32 weights take ZeRO's own, bf16 weights the one that accumulates gradients in fp32.

DeepSpeed learns the layout from four things made here: an `mpu` that answers from the mesh; the groups of experts,
filled in by hand; marks on expert parameters; and a root module that looks as if it had one of its MoE layers. It takes
norms group by group with collectives over the model, so the root also has a dummy parameter for each group that a rank
would otherwise lack.

Every state is offered as ranges of one flat logical tensor a parameter (`OptimizerShard`), so that a checkpoint need
not know how ZeRO cut it.
"""

import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.mpu import Mpu, settings
from parallel.optimizer import (
    Accepts,
    AdamW,
    Optimizer,
    OptimizerConfig,
    OptimizerShard,
    ZeroConfig,
    agreed_norm,
    clipping,
    forget_gradient,
    global_place,
    gradient_sum,
    is_expert,
    sum_in_fp32,
    sum_over_ends,
)
from parallel.replicated import ReplicatedOptimizer

BUCKET_ELEMENTS = 50_000_000


def make_optimizer(
    module: nn.Module,
    *,
    mesh: Mesh,
    config: OptimizerConfig,
    zero: ZeroConfig,
    dtype: torch.dtype,
    micro_batch_size: int,
    shared: Mapping[str, bool],
) -> Optimizer:
    """The optimizer of this rank's part of the network, whose parameters have their names in the whole and become
    `dtype`. Parameters that contain `.mlp.experts.` in their name are this rank's experts, stacked.

    `shared` are names of parameters that the first and last rank of a pipeline both hold, and whether they count on
    this one. `load_deepspeed` must have been called, and then processes joined, before. Raises ValueError, naming the
    keys, for what cannot be combined.
    """
    if zero.stage > 1 and mesh.shape.pp > 1:
        raise ValueError(
            f"parallel.zero_stage = {zero.stage} needs parallel.pp = 1, not {mesh.shape.pp}: with a pipeline, "
            "gradients and weights are needed whole until the step ends; use parallel.zero_stage = 1"
        )
    if zero.stage == 0:
        if zero.offload != "none":
            raise ValueError(
                "parallel.optimizer_offload needs parallel.zero_stage = 1 or more, not 0; change one of them"
            )
        return ReplicatedOptimizer(module, mesh=mesh, config=config, dtype=dtype, shared=shared)
    cls = _DividedWeightsOptimizer if zero.stage == 3 else ZeroOptimizer
    if zero.stage == 1 and zero.offload == "none" and dtype == torch.bfloat16:
        cls = _OnePassOptimizer
    return cls(
        module, mesh=mesh, config=config, zero=zero, dtype=dtype, micro_batch_size=micro_batch_size, shared=shared
    )


class ZeroOptimizer:
    """A module under DeepSpeed ZeRO."""

    _norm_method = "scaled_global_norm"

    def __init__(
        self,
        module: nn.Module,
        *,
        mesh: Mesh,
        config: OptimizerConfig,
        zero: ZeroConfig,
        dtype: torch.dtype,
        micro_batch_size: int,
        shared: Mapping[str, bool],
    ) -> None:
        deepspeed = load_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        self.module, self._mesh, self._config, self._shared = module, mesh, config, dict(shared)
        self.defers_weight_gradients = zero.stage == 1
        for name, owned in shared.items():
            module.get_parameter(name).ds_pipe_replicated = not owned  # type: ignore[attr-defined]
        root, groups = _root_and_groups(deepspeed, module, mesh, config, zero)
        self.adam = AdamW(groups, config)
        # Its bf16 optimizer prints memory figures that nobody asked for.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=root,
                optimizer=self.adam,
                mpu=Mpu(mesh),
                config=settings(config, zero, dtype, micro_batch_size, BUCKET_ELEMENTS),
                dist_init_required=False,
            )
        self._zero = self._engine.optimizer
        self._comm, self._utils = deepspeed.comm, importlib.import_module("deepspeed.runtime.utils")
        self._gradients = _gradients(self._zero, list(root.parameters()), zero, dtype)
        self._start_moments()
        if hasattr(self._zero, self._norm_method):
            self._judge_norms()

    def accumulating(self) -> AbstractContextManager[None]:
        """Is to surround all backward passes of a step."""
        return self._gradients.accumulating()

    def step(self, learning_rate: float, accepts: Accepts = math.isfinite) -> tuple[float, bool]:
        """Ends the step; returns the norm of the mean gradient before clipping, and whether weights were updated."""
        self._accepts, self._last_norm = accepts, math.inf
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        sum_over_ends(self.module, self._shared, self._mesh)
        self._gradients.hand_over()
        self._engine.step()
        self._gradients.forget()
        return self._last_norm, not self._zero.overflow

    def shards(self) -> Iterator[OptimizerShard]:
        """This rank's share of all parameters, in the order of their names in the module."""
        for name, parameter in self.module.named_parameters():
            fragment = self._fragment(parameter)
            if fragment is not None:
                start, shape = global_place(name, self._shape(parameter), self._mesh)
                start += fragment.start
                yield OptimizerShard(name, start, shape, self._shared.get(name, True), fragment.tensors)

    def refresh_weights(self, updates: int) -> None:
        """After writing to the shards: makes the weights those of the masters and sets Adam's count of updates."""
        self._zero.optimizer.set_updates(updates)
        self._write_weights()

    def _judge_norms(self) -> None:
        """DeepSpeed drops a step whose norm is not finite, so that of one that is not accepted becomes infinite."""
        compute = getattr(self._zero, self._norm_method)

        def judged() -> Any:
            norms = compute()
            found = self._utils.combine_grad_norm_groups(norms if isinstance(norms, list) else [norms])
            self._last_norm = norm = agreed_norm(found, next(self.module.parameters()).device)
            if not math.isfinite(norm) or self._accepts(norm):
                return norms
            return [math.inf] if isinstance(norms, list) else math.inf

        setattr(self._zero, self._norm_method, judged)

    def _start_moments(self) -> None:
        self._zero.optimizer.start()
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        """Of the parameter on this rank."""
        return tuple(parameter.shape)

    def _fragment(self, parameter: Any) -> "_Fragment | None":
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return _Fragment(
            mapping.lp_fragment_address.start,
            {
                "param": mapping.get_hp_fragment().detach(),
                "exp_avg": mapping.get_hp_fragment("exp_avg"),
                "exp_avg_sq": mapping.get_hp_fragment("exp_avg_sq"),
            },
        )

    def _write_weights(self) -> None:
        self._zero.update_lp_params()


class _OnePassOptimizer(ZeroOptimizer):
    """Stage 1 with bf16 weights. DeepSpeed's own step reads or writes every gradient and weight several times more than
    it has to: it copies sums to where they are already, multiplies them to clip, reads masters again to round them, and
    zeroes twice. Here its parts are called in its order, and AdamW does all of that in its one pass."""

    @torch.no_grad()
    def step(self, learning_rate: float, accepts: Accepts = math.isfinite) -> tuple[float, bool]:
        """Ends the step; returns the norm of the mean gradient before clipping, and whether weights were updated."""
        wrapper, num_replicas = self._zero, self._mesh.replicas.size()
        self._gradients.hand_over()
        sum_over_ends(self.module, self._shared, self._mesh)
        for sums, group in zip(wrapper.fp32_groups_gradients_flat, wrapper.real_dp_process_group, strict=True):
            if group.size() > 1:
                self._comm.all_reduce(sums, group=group)
        norm = self._norm() / num_replicas
        if updated := math.isfinite(norm) and accepts(norm):
            for group in wrapper.param_groups:
                group["lr"] = learning_rate
            self._update(clipping(norm, self._config.clip) / num_replicas)
        self._gradients.forget()
        return norm, updated

    def _update(self, scale: float) -> None:
        wrapper, rounded = self._zero, {}
        masters, sums = wrapper.fp32_groups_flat_partition, wrapper.fp32_groups_gradient_flat_partition
        for place, group in enumerate(wrapper.real_dp_process_group):
            masters[place].grad = sums[place]
            rounded[masters[place]] = wrapper.bf16_partitioned_groups[place][group.rank()]
        wrapper.optimizer.step_scaled(scale, rounded)
        self._utils.all_gather_dp_groups(
            groups_flat=wrapper.bf16_groups_flat,
            partitioned_param_groups=wrapper.bf16_partitioned_groups,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )

    def _norm(self) -> float:
        """Of the sums over replicas, each parameter of the model counted once."""
        wrapper, utils = self._zero, self._utils
        dense, experts = wrapper.get_grads_for_norm()
        norm = utils.get_global_norm_of_tensors(dense, mpu=wrapper.mpu)
        if wrapper.has_moe_layers:
            norm = utils.get_norm_with_moe_layers(norm, mpu=wrapper.mpu, expert_tensors=experts)
        return agreed_norm(norm, wrapper.fp32_groups_flat_partition[0].device)


class _DividedWeightsOptimizer(ZeroOptimizer):
    """Stage 3, where a parameter is gathered while its module runs and is a fragment otherwise."""

    _norm_method = "_get_norm_groups"

    def _start_moments(self) -> None:
        # Its flat parts are in the groups only while they are updated.
        self._zero._set_fp32_optimizer_param_groups()
        self._zero.optimizer.start()
        self._zero._clear_fp32_optimizer_param_groups()

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def _fragment(self, parameter: Any) -> "_Fragment | None":
        group, place, numel = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = numel * torch.distributed.get_rank(parameter.ds_process_group)
        numel = min(numel, parameter.ds_numel - start)
        if numel <= 0:
            return None
        flat = self._zero.fp32_partitioned_groups_flat[group]
        tensors = {"param": flat.detach(), **self._zero.optimizer.state[flat]}
        return _Fragment(
            start, {kind: tensors[kind].narrow(0, place, numel) for kind in ("param", "exp_avg", "exp_avg_sq")}
        )

    def _write_weights(self) -> None:
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


class _Fragment(NamedTuple):
    """Elements of a parameter on this rank, from `start` on."""

    start: int
    tensors: dict[Literal["param", "exp_avg", "exp_avg_sq"], Tensor]


class _WholeGradients:
    """Gradients that stay whole until the step ends (stage 1), fp32 ones in `grad`."""

    def __init__(self, wrapper: Any, parameters: list[nn.Parameter]) -> None:
        self._wrapper, self._parameters = wrapper, parameters
        # DeepSpeed's own hooks only count here.
        for hook in getattr(wrapper, "_grad_acc_hooks", []):
            hook.remove()

    def accumulating(self) -> AbstractContextManager[None]:
        """Is to surround all backward passes of a step."""
        return contextlib.nullcontext()

    def hand_over(self) -> None:
        """Puts the sums where DeepSpeed looks for them. Ranks must agree on what there is, though some may have had no
        token for an expert."""
        for parameter in self._parameters:
            gradient_sum(parameter)
        self._wrapper.setup_buckets()

    def forget(self) -> None:
        """After the step: a skipped one would leave its sums behind where the optimizer is in the CPU's memory."""
        sums = getattr(self._wrapper, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))


class _OwnSums(_WholeGradients):
    """bf16 weights whose wrapper takes fp32 sums from us."""

    def __init__(self, wrapper: Any, parameters: list[nn.Parameter]) -> None:
        super().__init__(wrapper, parameters)
        for parameter in parameters:
            sum_in_fp32(parameter, torch.zeros_like(parameter, dtype=torch.float32))

    def hand_over(self) -> None:
        super().hand_over()
        for parameter in self._parameters:
            # Another tensor on the same memory, because DeepSpeed moves what it finds into its buckets.
            parameter.grad_accum = gradient_sum(parameter).detach()  # type: ignore[attr-defined]

    def forget(self) -> None:
        super().forget()
        for parameter in self._parameters:
            forget_gradient(parameter)


class _DeepSpeedSums(_WholeGradients):
    """bf16 weights whose wrapper has fp32 sums of its own. It hears once that all of them are there."""

    def __init__(self, wrapper: Any, parameters: list[nn.Parameter]) -> None:
        super().__init__(wrapper, parameters)
        for group, sums in zip(wrapper.bf16_groups, wrapper.fp32_groups_gradients, strict=True):
            for parameter, total in zip(group, sums, strict=True):
                sum_in_fp32(parameter, total.view(parameter.shape))
        wrapper.fp32_groups_has_gradients = [[True] * len(group) for group in wrapper.bf16_groups]

    def hand_over(self) -> None:
        for parameter in self._parameters:
            gradient_sum(parameter)

    def forget(self) -> None:
        for parameter in self._parameters:
            forget_gradient(parameter)


class _DividedGradients(_WholeGradients):
    """Gradients that are reduced during the step, each rank keeping the fp32 sums of its share (stage 2).

    Replicas must reduce the same gradients at the same time, but experts may get theirs in a different number of parts
    on each. So replicated parameters give the time, at which all gradients there are get reduced: when they are many,
    and before a parameter gets its next, which would be added in the weights' own precision.
    """

    def __init__(self, wrapper: Any, parameters: list[nn.Parameter]) -> None:
        super().__init__(wrapper, parameters)
        for parameter in parameters:
            if getattr(parameter, "allreduce", True):
                parameter.register_hook(partial(self._before, parameter))
                parameter.register_post_accumulate_grad_hook(self._after)
        self._num_waiting = 0

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        self._wrapper.set_gradient_accumulation_boundary(False)
        self._start_at_zero()
        yield
        self._reduce()

    def _start_at_zero(self) -> None:
        """DeepSpeed's first reduction overwrites old sums, but only those that it has gradients for. Told that it is
        not the first, it adds."""
        self._wrapper.micro_step_id = 0  # setup_buckets makes it 1.
        for total in getattr(self._wrapper, "accumulated_grads_in_cpu", {}).values():
            total.zero_()

    def _before(self, parameter: nn.Parameter, _: Tensor) -> None:
        if parameter.grad is not None:
            self._reduce()

    def _after(self, parameter: Tensor) -> None:
        self._num_waiting += parameter.grad.numel() if parameter.grad is not None else 0
        if self._num_waiting > BUCKET_ELEMENTS:
            self._reduce()

    def _reduce(self) -> None:
        self._num_waiting = 0
        self._wrapper.setup_buckets()
        for index, group in enumerate(self._wrapper.bit16_groups):
            for parameter in group:
                if parameter.grad is not None:
                    self._wrapper.reduce_ready_partitions_and_remove_grads(parameter, index)
        self._wrapper.overlapping_partition_gradients_reduce_epilogue()

    def hand_over(self) -> None:
        """All are with DeepSpeed."""


class _DividedWeightsGradients(_DividedGradients):
    """The same for stage 3."""

    def _start_at_zero(self) -> None:
        self._wrapper.micro_step_id = 1
        self._wrapper.grad_partitions_flat_buffer.zero_()

    def _reduce(self) -> None:
        self._num_waiting = 0
        for group in self._wrapper.fp16_groups:
            for parameter in group:
                if parameter.grad is not None:
                    self._wrapper.reduce_ready_partitions_and_remove_grads(parameter)
        self._wrapper.independent_gradient_partition_epilogue()


def _gradients(wrapper: Any, parameters: list[nn.Parameter], zero: ZeroConfig, dtype: torch.dtype) -> _WholeGradients:
    if zero.stage > 1:
        return (_DividedGradients if zero.stage == 2 else _DividedWeightsGradients)(wrapper, parameters)
    if hasattr(wrapper, "fp32_groups_gradients"):
        return _DeepSpeedSums(wrapper, parameters)
    return (_WholeGradients if dtype == torch.float32 else _OwnSums)(wrapper, parameters)


def _root_and_groups(
    deepspeed: Any, module: nn.Module, mesh: Mesh, config: OptimizerConfig, zero: ZeroConfig
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The module inside what DeepSpeed needs beside it, and the optimizer's groups, the same ones on every rank."""
    root = nn.ModuleDict({"module": module})
    experts_are_apart = mesh.shape.ep > 1
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": []}
    if experts_are_apart:
        root["marker"] = _moe_marker(deepspeed, mesh, zero)
        members[f"ep_size_{mesh.shape.ep}"] = []
    for name, parameter in module.named_parameters():
        kind = "matrices" if parameter.dim() > 1 else "vectors"
        members[f"ep_size_{mesh.shape.ep}" if experts_are_apart and is_expert(name) else kind].append(parameter)
    device = next(module.parameters()).device
    dummies = {kind: nn.Parameter(torch.zeros(2, device=device)) for kind, held in members.items() if not held}
    root["dummies"] = nn.ParameterDict(dummies)
    groups = []
    for kind, parameters in members.items():
        held = parameters or [dummies[kind]]
        decay = 0.0 if kind == "vectors" else config.weight_decay
        groups.append({"name": kind, "params": held, "weight_decay": decay})
        if kind.startswith("ep_size_"):
            groups[-1]["moe"] = True
            for parameter in held:
                marked: Any = parameter
                marked.allreduce, marked.group_name = False, kind
                marked.ds_zero_placement_family, marked.ds_zero_partition_group_name = "autoep_expert", kind
    return root, groups


def _moe_marker(deepspeed: Any, mesh: Mesh, zero: ZeroConfig) -> nn.Module:
    """An empty module by which DeepSpeed knows that there are experts, whose groups are told to it here."""
    name, ranks = f"ep_size_{mesh.shape.ep}", mesh.shape
    known = deepspeed.utils.groups
    known._EXPERT_PARALLEL_GROUP[name] = mesh.expert
    known._EXPERT_PARALLEL_GROUP_RANKS[name] = _ranks_with(mesh.rank, ranks.experts())
    known._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_replicas
    known._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = _ranks_with(mesh.rank, ranks.expert_replicas())
    # Stage 3 takes experts of its own second kind only.
    automatic = importlib.import_module("deepspeed.module_inject.auto_ep_layer").AutoEPMoELayer
    base: Any = automatic if zero.stage == 3 else deepspeed.moe.layer.MoE

    class Marker(base):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts, self.ep_size, self.num_local_experts = mesh.shape.ep, mesh.shape.ep, 1
            self.expert_group_name = self.ep_group_name = name

        def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
            """The groups are there."""

    return Marker()


def _ranks_with(rank: int, partition: list[tuple[int, ...]]) -> list[int]:
    return next(list(ranks) for ranks in partition if rank in ranks)


def load_deepspeed() -> Any:
    """Imports DeepSpeed for the devices torch sees, and keeps it from compiling collectives of its own for CPUs, for
    which gloo serves. To be called before processes are joined: once they are, the import alone compiles them."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(lambda record: "OVERFLOW" not in record.getMessage())  # Ours to tell.
    importlib.import_module("deepspeed.comm.torch").__dict__["build_shm_op"] = lambda: None
    tested = importlib.import_module("deepspeed.runtime.zero.utils").ZERO_SUPPORTED_OPTIMIZERS
    tested += [AdamW] if AdamW not in tested else []
    return deepspeed
