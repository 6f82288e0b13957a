"""The end of a step in plain torch, where every replica keeps the whole optimizer state (ZeRO stage 0).

It says in the fewest words what the other stages must come to, and the tests hold them against it.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from parallel.mesh import Mesh
from parallel.optimizer import (
    Accepts,
    AdamW,
    OptimizerConfig,
    OptimizerShard,
    agreed_norm,
    clipping,
    forget_gradient,
    global_place,
    gradient_sum,
    is_expert,
    sum_in_fp32,
    sum_over_ends,
)


class ReplicatedOptimizer:
    """AdamW on fp32 masters of all parameters that live here."""

    defers_weight_gradients = True

    def __init__(
        self, module: nn.Module, *, mesh: Mesh, config: OptimizerConfig, dtype: torch.dtype, shared: Mapping[str, bool]
    ) -> None:
        self.module, self._mesh, self._config, self._shared = module, mesh, config, dict(shared)
        self._parameters = dict(module.named_parameters())
        self._masters: dict[str, nn.Parameter] = {}
        for name, parameter in self._parameters.items():
            parameter.data = parameter.data.to(dtype)
            self._masters[name] = parameter if dtype == torch.float32 else nn.Parameter(parameter.detach().float())
        self._dense_sum = self._sums([name for name in self._parameters if not is_expert(name)])
        self._expert_sum = self._sums([name for name in self._parameters if is_expert(name)])
        matrices = [master for master in self._masters.values() if master.dim() > 1]
        vectors = [master for master in self._masters.values() if master.dim() == 1]
        groups = [(matrices, config.weight_decay), (vectors, 0.0)]
        self.adam = AdamW([{"params": params, "weight_decay": decay} for params, decay in groups], config)
        self.adam.start()
        weights = ((self._masters[name], parameter) for name, parameter in self._parameters.items())
        self._rounded: dict[Tensor, Tensor] = {
            master: parameter for master, parameter in weights if master is not parameter
        }

    def _sums(self, names: list[str]) -> Tensor:
        """One flat tensor of fp32 zeros to which the gradients of the parameters are added."""
        sizes = [self._parameters[name].numel() for name in names]
        flat = torch.zeros(sum(sizes), device=next(self.module.parameters()).device)
        for name, part in zip(names, flat.split(sizes), strict=True):
            parameter, master = self._parameters[name], self._masters[name]
            master.grad = part.view_as(parameter)
            if master is not parameter:
                sum_in_fp32(parameter, master.grad)
        return flat

    def accumulating(self) -> AbstractContextManager[None]:
        """Is to surround all backward passes of a step."""
        return nullcontext()

    @torch.no_grad()
    def step(self, learning_rate: float, accepts: Accepts = math.isfinite) -> tuple[float, bool]:
        """Ends the step; returns the norm of the mean gradient before clipping, and whether weights were updated."""
        for parameter in self._parameters.values():
            gradient_sum(parameter)
        sum_over_ends(self.module, self._shared, self._mesh)
        dist.all_reduce(self._dense_sum, group=self._mesh.replicas)
        dist.all_reduce(self._expert_sum, group=self._mesh.expert_replicas)
        num_replicas = self._mesh.replicas.size()
        norm = agreed_norm(self._norm(), self._dense_sum.device) / num_replicas
        if updated := math.isfinite(norm) and accepts(norm):
            for group in self.adam.param_groups:
                group["lr"] = learning_rate
            self.adam.step_scaled(clipping(norm, self._config.clip) / num_replicas, self._rounded)
        for parameter in self._parameters.values():
            forget_gradient(parameter)
        return norm, updated

    def _norm(self) -> Tensor:
        """Of the sums over the replicas: over the whole model, every parameter counted once."""
        squares = self._expert_sum.norm() ** 2
        dist.all_reduce(squares, group=self._mesh.expert)
        counted = [name for name in self._parameters if not is_expert(name) and self._shared.get(name, True)]
        squares += nn.utils.get_total_norm([gradient_sum(self._parameters[name]) for name in counted]) ** 2
        dist.all_reduce(squares, group=self._mesh.model)
        return squares.sqrt()

    def shards(self) -> Iterator[OptimizerShard]:
        """All parameters that live here; those of the lowest rank among replicas are owned."""
        shape, rank = self._mesh.shape, self._mesh.rank
        for name, master in self._masters.items():
            start, whole = global_place(name, tuple(master.shape), self._mesh)
            partition = shape.expert_replicas() if is_expert(name) else shape.replicas()
            is_lowest = any(min(ranks) == rank for ranks in partition)
            state = self.adam.state[master]
            yield OptimizerShard(
                name,
                start,
                whole,
                is_lowest and self._shared.get(name, True),
                {
                    "param": master.detach().view(-1),
                    "exp_avg": state["exp_avg"].view(-1),
                    "exp_avg_sq": state["exp_avg_sq"].view(-1),
                },
            )

    def refresh_weights(self, updates: int) -> None:
        """After writing to the shards: makes the weights those of the masters and sets Adam's count of updates."""
        self.adam.set_updates(updates)
        self._write_weights()

    @torch.no_grad()
    def _write_weights(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._masters[name])
