"""What the ways to end an optimizer step have in common: their interface, AdamW, and how gradients are summed in fp32.

Gradients are added up over micro-batches by whoever runs the backward passes, in any order: autograd adds to the `grad`
of fp32 parameters, and to the fp32 sum `main_grad` of others (`sum_in_fp32`). At the end of the step

    g = (1 / R) Σ over replicas of their sums        R = ranks with the same layers
    AdamW with g · min(1, clip / (‖g‖ + 1e-6))       ‖g‖ over all parameters of the model, each counted once

Both factors of g are numbers of the host, which waits for the norm anyway to see whether there is an update. AdamW gets
them beside the sums, and no pass over memory is made to multiply or to zero: the first gradient of the next step takes
the place of an old sum.

Routed experts have replicas only on the ranks with the same experts. They are divided by R nevertheless, because an
expert sees the tokens of all R ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.linear import add_gradient
from parallel.mesh import Mesh

EXPERTS = ".mlp.experts."
Accepts = Callable[[float], bool]
ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and clipping (report, section 4.2). Norm weights are not decayed. `clip` bounds the global gradient norm;
    0 leaves it alone. `moments` is how Adam's two moments are kept; the report keeps them in bf16 (section 3.3.3)."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    moments: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value} must lie in [0, 1); the report uses 0.9 and 0.95")
        for name in ("eps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """What is divided over the replicas: nothing (0), optimizer (1), gradients too (2), weights too (3). `offload` puts
    masters and moments into the CPU's memory."""

    stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "cpu"] = "none"


@dataclass(frozen=True)
class OptimizerShard:
    """This rank's part of one parameter of the whole model, which has `shape`: elements [start, start + numel) of it
    flattened, as fp32 master weights and Adam's two moments. The tensors are live: writing to them changes the
    optimizer. Of equal shards on several ranks, one is `owned`."""

    name: str
    start: int
    shape: tuple[int, ...]
    owned: bool
    tensors: dict[Literal["param", "exp_avg", "exp_avg_sq"], Tensor]


class Optimizer(Protocol):
    """Ends steps. `defers_weight_gradients` says whether weight gradients may come after the rest of their backward
    pass; `adam` is what updates the shards."""

    defers_weight_gradients: bool
    adam: "AdamW"

    def accumulating(self) -> AbstractContextManager[None]:
        """Is to surround all backward passes of a step."""

    def step(self, learning_rate: float, accepts: Accepts = math.isfinite) -> tuple[float, bool]:
        """Ends the step; returns the norm of the mean gradient before clipping, and whether weights were updated. They
        are not, nor is any other state, when the norm is not finite or when `accepts`, asked with it before anything is
        changed, says no; it must say the same on every rank."""

    def shards(self) -> Iterator[OptimizerShard]:
        """This rank's share of all parameters, in the order of their names in the module."""

    def refresh_weights(self, updates: int) -> None:
        """After writing to the shards: makes the module's weights those of the masters, and sets Adam's count of
        updates, which skipped steps are not."""


class Coefficients(NamedTuple):
    """The numbers of AdamW's t-th update (arXiv 1711.05101), in the order of the fields:

    m += a (g - m)    v += b (g² - v)    w = c w - d m / (√(e v) + ε)
    a = 1 - β₁    b = 1 - β₂    c = 1 - λη    d = η / (1 - β₁ᵗ)    e = 1 / (1 - β₂ᵗ)
    """

    mean_share: float
    square_share: float
    kept: float
    rate: float
    square_scale: float
    eps: float


class AdamW(torch.optim.AdamW):
    """AdamW whose moments can be kept in bf16. They exist from the start, so that they can be saved and loaded.
    `before_update` is called with what gradients are about to be multiplied by.

    What is on a GPU is updated by a kernel of ours, in one pass over memory; what is on the CPU, by torch.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        self._moments = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.moments]
        # DeepSpeed may move to the CPU what comes from a GPU; torch has a fused kernel there.
        on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
        betas = config.beta1, config.beta2
        super().__init__(groups, lr=0.0, betas=betas, eps=config.eps, fused=on_cuda)
        self.before_update: Callable[[float], None] | None = None

    def start(self) -> None:
        """Sets both moments to zero. To be called when the groups hold the tensors that will be updated."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                    "exp_avg": torch.zeros_like(parameter, dtype=self._moments, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=self._moments, requires_grad=False),
                }

    def set_updates(self, updates: int) -> None:
        """Sets the count that corrects the bias of the moments."""
        for state in self.state.values():
            state["step"] = torch.full_like(state["step"], float(updates))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        self.step_scaled(1.0, {})

    @torch.no_grad()
    def step_scaled(self, scale: float, copies: Mapping[Tensor, Tensor]) -> None:
        """One update from the gradients times `scale`, by which they may be multiplied in place. The tensors that
        `copies` has for parameters then hold their values, rounded."""
        if self.before_update is not None:
            self.before_update(scale)
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if held and held[0][0].is_cuda:
            for parameter, group in held:
                self._step_in_one_pass(parameter, group, scale, copies.get(parameter))
            return
        for parameter, _ in held:
            parameter.grad.mul_(scale)
        if self._moments == torch.float32:
            super().step()
        else:
            for parameter, group in held:
                self._step_with_rounded_moments(parameter, group)
        for parameter, copy in copies.items():
            copy.copy_(parameter)

    def _step_in_one_pass(self, parameter: Tensor, group: dict[str, Any], scale: float, copy: Tensor | None) -> None:
        from parallel.adamw_kernel import update

        state: dict[str, Any] = self.state[parameter]
        tensors: list[Any] = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], copy]
        update(*tensors, scale=scale, coefficients=self._count(state, group))

    def _step_with_rounded_moments(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The arithmetic is fp32; only what is kept is rounded."""
        state = self.state[parameter]
        numbers = self._count(state, group)
        tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        parts = [tensor.view(-1).split(ELEMENTS_AT_ONCE) for tensor in tensors if tensor is not None]
        for weights, gradient, kept_mean, kept_square in zip(*parts, strict=True):
            mean = kept_mean.float().lerp_(gradient, numbers.mean_share)
            square = kept_square.float().lerp_(gradient.square(), numbers.square_share)
            kept_mean.copy_(mean)
            kept_square.copy_(square)
            size = square.mul_(numbers.square_scale).sqrt_().add_(numbers.eps)
            weights.mul_(numbers.kept).addcdiv_(mean, size, value=-numbers.rate)

    def _count(self, state: dict[str, Any], group: dict[str, Any]) -> Coefficients:
        """Counts an update, and what it takes."""
        state["step"] += 1
        return self._coefficients(state, group)

    def coefficients(self, parameter: Tensor, group: dict[str, Any]) -> Coefficients:
        """With which a parameter of a group got its newest update."""
        return self._coefficients(self.state[parameter], group)

    @staticmethod
    def _coefficients(state: dict[str, Any], group: dict[str, Any]) -> Coefficients:
        (beta1, beta2), rate, updates = group["betas"], group["lr"], float(state["step"])
        return Coefficients(
            mean_share=1 - beta1,
            square_share=1 - beta2,
            kept=1 - rate * group["weight_decay"],
            rate=rate / (1 - beta1**updates),
            square_scale=1 / (1 - beta2**updates),
            eps=group["eps"],
        )


def clipping(norm: float, clip: float) -> float:
    """The factor that brings a gradient of this norm down to `clip`, at most 1; 0 stands for no clipping."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def agreed_norm(norm: Tensor | float, device: torch.device) -> float:
    """A norm that every rank has worked out, infinite where it is not finite or DeepSpeed says so with -1. Where ranks
    that added in another order differ in the last bit, it is the largest, so that all of them do the same with it. A
    collective of all ranks, on their devices."""
    found = torch.as_tensor(norm, dtype=torch.float64, device=device)
    found = torch.where(found.isfinite() & (found >= 0), found, math.inf)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def is_expert(name: str) -> bool:
    """Whether a parameter holds routed experts, [E_local, ...] of [E, ...]."""
    return EXPERTS in name


def global_place(name: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, tuple[int, ...]]:
    """Where this rank's part of a parameter begins in the whole one flattened, and the shape of that; `shape` is what
    lives here."""
    numel = torch.Size(shape).numel()
    if not is_expert(name):
        return 0, shape
    return mesh.shape.ep_rank(mesh.rank) * numel, (shape[0] * mesh.shape.ep, *shape[1:])


def sum_in_fp32(parameter: nn.Parameter, total: Tensor) -> None:
    """From now on gradients of `parameter` are added up in `total`, of the same shape, which becomes its
    `main_grad`."""
    marked: Any = parameter
    marked.main_grad, marked.main_grad_is_old = total, True
    parameter.register_post_accumulate_grad_hook(_move_gradient)


def _move_gradient(parameter: Any) -> None:
    # Autograd calls this for a weight whose gradient was put off, too.
    if parameter.grad is not None:
        add_gradient(parameter, parameter.grad)
        parameter.grad = None


def gradient_sum(parameter: nn.Parameter) -> Tensor:
    """The gradient added up so far; zeros where there was none."""
    marked: Any = parameter
    total: Tensor | None = getattr(parameter, "main_grad", None)
    if total is not None:
        if marked.main_grad_is_old:
            total.zero_()
            marked.main_grad_is_old = False
        return total
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def forget_gradient(parameter: nn.Parameter) -> None:
    """Begins a new sum. An old one in fp32 stays where it is until a gradient takes its place."""
    if hasattr(parameter, "main_grad"):
        parameter.main_grad_is_old = True  # type: ignore[attr-defined]
    elif parameter.grad is not None:
        parameter.grad.zero_()


def sum_over_ends(module: nn.Module, names: Iterable[str], mesh: Mesh) -> None:
    """Sums the gradients of parameters that the first and the last pipeline rank both hold and use."""
    for name in sorted(names):
        dist.all_reduce(gradient_sum(module.get_parameter(name)), group=mesh.ends)
