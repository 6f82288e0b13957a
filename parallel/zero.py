"""DeepSpeed, in one file: ZeRO owns the end of the step and nothing else.

Micro-batches run with plain autograd on the module, never through DeepSpeed's engine; then one `step` reduces the
gradients over the data ranks, takes the global norm, clips, runs AdamW on this rank's share and gathers the weights
(unmanaged gradient accumulation, where a step is the accumulation boundary). Which of DeepSpeed's wrappers does it
depends on the dtype: fp32 weights take ZeRO's own, bf16 weights the one that accumulates gradients in fp32.

Every state is offered as ranges of one flat logical tensor a parameter (`OptimizerShard`), so that a checkpoint need
not know how ZeRO cut it.
"""

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and clipping (report, section 4.2). Norm weights are not decayed. `clip` bounds the global gradient norm;
    0 leaves it alone."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value} must lie in [0, 1); the report uses 0.9 and 0.95")
        for name in ("eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's part of one parameter: elements [start, start + numel) of it flattened, as fp32 master weights and
    Adam's two moments. The tensors are live: writing to them changes the optimizer."""

    name: str
    start: int
    tensors: dict[Literal["param", "exp_avg", "exp_avg_sq"], Tensor]


class ZeroOptimizer:
    """A module under DeepSpeed ZeRO-1. `load_deepspeed` must have been called, and then processes joined, before."""

    def __init__(
        self, module: nn.Module, *, config: OptimizerConfig, dtype: torch.dtype, micro_batch_size: int
    ) -> None:
        deepspeed = load_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)
        self.module = module
        groups = _parameter_groups(module, config.weight_decay)
        on_cuda = next(module.parameters()).is_cuda
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=on_cuda)
        # Its bf16 optimizer prints memory figures that nobody asked for.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=_deepspeed_config(config, dtype, micro_batch_size),
                dist_init_required=False,
            )
        self._zero = self._engine.optimizer
        self._accumulates_in_fp32_buffers = hasattr(self._zero, "update_hp_grads")
        self._start_moments_at_zero()

    def end_micro_batch(self) -> None:
        """To be called after each micro-batch's backward pass: adds bf16 gradients to their fp32 sums."""
        if self._accumulates_in_fp32_buffers:
            self._zero.update_hp_grads(clear_lp_grads=True)

    def step(self, learning_rate: float) -> tuple[float, bool]:
        """Ends the step; returns the norm of the mean gradient before clipping, and whether weights were updated (they
        are not when the norm is not finite)."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        if not self._accumulates_in_fp32_buffers:
            self._zero.setup_buckets()
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), not self._zero.overflow

    def shards(self) -> Iterator[OptimizerShard]:
        """This rank's share of all parameters, in the order of their names in the module."""
        for name, parameter in self.module.named_parameters():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                yield OptimizerShard(
                    name,
                    mapping.lp_fragment_address.start,
                    {
                        "param": mapping.get_hp_fragment().detach(),
                        "exp_avg": mapping.get_hp_fragment("exp_avg"),
                        "exp_avg_sq": mapping.get_hp_fragment("exp_avg_sq"),
                    },
                )

    def refresh_weights(self, updates: int) -> None:
        """After writing to the shards: makes the module's weights those of the masters, and sets Adam's count of
        updates, which skipped steps are not."""
        for state in self._zero.optimizer.state.values():
            state["step"] = torch.full_like(state["step"], float(updates))
        self._zero.update_lp_params()

    def _start_moments_at_zero(self) -> None:
        """Makes Adam's state exist before the first step, so that it can be saved and loaded at any time."""
        inner = self._zero.optimizer
        for group in inner.param_groups:
            for flat in group["params"]:
                step = torch.zeros((), dtype=torch.float32, device=flat.device if group.get("fused") else "cpu")
                inner.state[flat] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(flat, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
                }
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _deepspeed_config(config: OptimizerConfig, dtype: torch.dtype, micro_batch_size: int) -> dict[str, Any]:
    is_bf16 = dtype == torch.bfloat16
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip,
        "steps_per_print": None,
        "bf16": {"enabled": is_bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        },
    }


def load_deepspeed() -> Any:
    """Imports DeepSpeed for the devices torch sees, and keeps it from compiling collectives of its own for CPUs, for
    which gloo serves. To be called before processes are joined: once they are, the import alone compiles them."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    importlib.import_module("deepspeed.comm.torch").__dict__["build_shm_op"] = lambda: None
    return deepspeed
