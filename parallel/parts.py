"""How large gradients, weights and updates are in each part of the network, the same numbers on every layout.

    grad_norm = ‖g‖      grad_amax = max |g|          g: the mean gradient, before clipping
    weight_norm = ‖w‖    weight_amax = max |w|        w: fp32 weights after the update
    update_ratio = ‖Δw‖ / ‖w‖                         Δw: what the update added to w

AdamW sees each gradient once, just before its update, on whichever rank and in whichever flat tensor ZeRO put it. A
shard's weights are a view of such a tensor, so its gradient is the same view of the tensor's gradient. Δw needs no copy
of the weights from before: with AdamW's coefficients (`parallel.optimizer.Coefficients`)

    w = c w₀ - u,  u = d m / (√(e v) + ε)    so    -Δw = w₀ - w = ((1 - c) w + u) / c

Every element of the model counts once: on the rank that owns it, as in a checkpoint.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from model.config import ModelConfig
from parallel.optimizer import ELEMENTS_AT_ONCE, Optimizer, is_expert

Part = Literal[
    "embedding", "attention", "dense_mlps", "routed_experts", "shared_experts", "gates", "norms", "head", "mtp"
]
PARTS: tuple[Part, ...] = get_args(Part)


def part_of(name: str, config: ModelConfig) -> Part:
    """The part that a parameter belongs to. All of a block of multi-token prediction is `mtp`, all other norms are
    `norms`, those inside attention too."""
    words = name.split(".")
    if words[0] == "layers" and int(words[1]) >= config.num_hidden_layers:
        return "mtp"
    if words[0] == "embed_tokens":
        return "embedding"
    if words[0] == "lm_head":
        return "head"
    if any(word.endswith("norm") for word in words):
        return "norms"
    if "self_attn" in words:
        return "attention"
    if is_expert(name):
        return "routed_experts"
    kinds: dict[str, Part] = {"shared_experts": "shared_experts", "gate": "gates"}
    return next((part for word, part in kinds.items() if word in words), "dense_mlps")


class PartSizes:
    """Of each part, on this rank: squares of gradients, weights and updates, [parts, 3], and the largest gradient and
    weight, [parts, 2], both in fp64."""

    def __init__(self, device: torch.device) -> None:
        self.squares = torch.zeros(len(PARTS), 3, dtype=torch.float64, device=device)
        self.largest = torch.zeros(len(PARTS), 2, dtype=torch.float64, device=device)

    def add(self, part: Part, column: int, tensors: list[Tensor], scale: float = 1.0) -> None:
        """Counts tensors times `scale` in a column."""
        if not tensors:
            return
        row = PARTS.index(part)
        norms = torch.stack(torch._foreach_norm(tensors)).double() * scale
        self.squares[row, column] += norms.square().sum().to(self.squares.device)
        if column < self.largest.shape[1]:
            largest = torch.stack(torch._foreach_norm(tensors, torch.inf)).double().max() * scale
            self.largest[row, column] = torch.maximum(self.largest[row, column], largest.to(self.largest.device))


class PartsWatch:
    """Measures one step of an optimizer, if `active`; used around it."""

    def __init__(self, optimizer: Optimizer, config: ModelConfig, device: torch.device, *, active: bool) -> None:
        self._adam, self._active = optimizer.adam, active
        self._sizes = PartSizes(device)
        self._shards = [
            _Watched(part_of(shard.name, config), shard.tensors)
            for shard in (optimizer.shards() if active else ())
            if shard.owned
        ]
        self._by_storage: defaultdict[int, list[_Watched]] = defaultdict(list)
        for shard in self._shards:
            self._by_storage[_storage(shard.tensors["param"])].append(shard)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The step."""
        self._adam.before_update = self._see_gradients if self._active else None
        try:
            yield
        finally:
            self._adam.before_update = None

    def _see_gradients(self, scale: float) -> None:
        """Counts the gradients of what is about to be updated, which are yet to be multiplied by `scale`."""
        held = [(flat, group) for group in self._adam.param_groups for flat in group["params"] if flat.grad is not None]
        for flat, group in held:
            parts: defaultdict[Part, list[Tensor]] = defaultdict(list)
            for shard in self._by_storage[_storage(flat)]:
                weights = shard.tensors["param"]
                first = weights.storage_offset() - flat.storage_offset()
                if 0 <= first < flat.numel():
                    parts[shard.part].append(flat.grad.view(-1)[first : first + weights.numel()])
                    shard.updated = flat, group
            for part, gradients in parts.items():
                self._sizes.add(part, 0, gradients, scale)

    def metrics(self, clipped: float) -> dict[str, dict[str, float]]:
        """What was measured, over all ranks, by part, without parts that the model lacks; `clipped` is the factor that
        gradients were multiplied by to clip them. Empty where nothing was updated. A collective of all ranks."""
        for part in PARTS:
            shards = [shard for shard in self._shards if shard.part == part]
            self._sizes.add(part, 1, [shard.tensors["param"] for shard in shards])
            for shard in shards:
                self._add_update(shard)
        dist.all_reduce(self._sizes.squares)
        dist.all_reduce(self._sizes.largest, dist.ReduceOp.MAX)
        norms, largest = self._sizes.squares.sqrt().tolist(), self._sizes.largest.tolist()
        return {
            part: {
                "grad_norm": grad / clipped,
                "weight_norm": weight,
                "update_ratio": update / weight if weight else 0.0,
                "grad_amax": grad_amax / clipped,
                "weight_amax": weight_amax,
            }
            for part, (grad, weight, update), (grad_amax, weight_amax) in zip(PARTS, norms, largest, strict=True)
            if weight
        }

    def _add_update(self, shard: "_Watched") -> None:
        if shard.updated is None:
            return
        numbers = self._adam.coefficients(*shard.updated)
        tensors = [shard.tensors[kind].split(ELEMENTS_AT_ONCE) for kind in ("param", "exp_avg", "exp_avg_sq")]
        for weights, mean, square in zip(*tensors, strict=True):
            size = (square.float() * numbers.square_scale).sqrt_().add_(numbers.eps)
            update = mean.float().mul(numbers.rate).div_(size).add_(weights, alpha=1 - numbers.kept)
            self._sizes.add(shard.part, 2, [update], 1 / numbers.kept)


@dataclass
class _Watched:
    """A shard, and of which tensor of which group of AdamW's it was updated with."""

    part: Part
    tensors: Mapping[Literal["param", "exp_avg", "exp_avg_sq"], Tensor]
    updated: tuple[Tensor, dict[str, Any]] | None = None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
