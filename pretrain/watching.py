"""What a step shows beside its losses, as metrics: how experts are used, and what each rank did.

All of it travels in the one sum over ranks that a step makes anyway: what only one rank knows is zero on the others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.chunk import Outcome
from pretrain.assemble import Assembly
from pretrain.config import Config
from pretrain.fp8 import monitors_fp8
from pretrain.logging_config import is_due


@dataclass(frozen=True, kw_only=True)
class Watches:
    """What to look at in a step, alike on all ranks: the use of `experts`, how long `ranks` computed, the sizes of
    `parts` of the network, and what is rounded to `fp8`."""

    experts: bool = False
    ranks: bool = False
    parts: bool = False
    fp8: bool = False


NOTHING = Watches()


def watches_of(config: Config, step: int) -> Watches:
    """What the configuration wants of a step."""
    logging = config.logging
    return Watches(
        experts=is_due(step, logging.expert_load_every),
        ranks=is_due(step, logging.ranks_every),
        parts=is_due(step, logging.parts_every),
        fp8=monitors_fp8(config, step),
    )


def own_numbers(run: Assembly, outcome: Outcome, watches: Watches) -> dict[str, Tensor]:
    """What this rank adds to the sum, in fp64."""
    numbers = {}
    if watches.experts:
        numbers["rows"], numbers["rounds"] = _at_own_place(run, outcome.rows), _at_own_place(run, outcome.rounds)
        numbers["biases"] = _bias_ranges(run)
    if watches.ranks:
        numbers["busy"] = _at_own_place(run, run.executor.clock.late.busy())
    return numbers


def _at_own_place(run: Assembly, value: float) -> Tensor:
    """A number in a vector with a place for each rank."""
    place = run.place
    numbers = torch.zeros(place.world_size, dtype=torch.float64)
    numbers[place.rank] = value
    return numbers.to(place.device, non_blocking=True)


def _bias_ranges(run: Assembly) -> Tensor:
    """Smallest and largest bias of each layer's experts, flattened, from the one rank that counts for the layer."""
    layers = run.config.model.moe_layers
    ranges = torch.zeros(len(layers), 2, dtype=torch.float64, device=run.place.device)
    if any(ranks[0] == run.place.rank for ranks in run.mesh.shape.replicas()):
        for layer, bias in run.model.expert_biases().items():
            ranges[layers.index(layer)] = torch.stack(torch.aminmax(bias)).double()
    return ranges.flatten()


def seen_metrics(sums: Mapping[str, Tensor], load: Tensor, layers: tuple[int, ...]) -> dict[str, Any]:
    """Metrics from the sums over ranks of `own_numbers` and of the load [MoE layers, E]. Biases are those that the step
    was routed with."""
    metrics: dict[str, Any] = {}
    if "rows" in sums:
        metrics["moe"] = _moe(load.double(), sums["biases"].view(-1, 2), layers)
        metrics["received_rows"] = {"max": int(sums["rows"].max()), "mean": float(sums["rows"].mean())}
        metrics["rounds_max"] = int(sums["rounds"].max())
    if "busy" in sums and float(sums["busy"].max()) > 0:
        metrics["ranks"] = {"busy_s": sums["busy"].tolist()}
    return metrics


def _moe(load: Tensor, biases: Tensor, layers: tuple[int, ...]) -> dict[str, dict[str, float]]:
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    most = math.log(load.shape[-1]) or 1.0
    columns = {
        "max_violation": (load.amax(-1) / load.mean(-1).clamp(min=1e-300) - 1).tolist(),
        "dead_experts": (load == 0).sum(-1).tolist(),
        "entropy": (torch.special.entr(share).sum(-1) / most).tolist(),
        "bias_min": biases[:, 0].tolist(),
        "bias_max": biases[:, 1].tolist(),
    }
    return {str(layer): {name: values[place] for name, values in columns.items()} for place, layer in enumerate(layers)}
