"""One optimizer step: the pipeline over micro-batches, one sum over ranks, ZeRO's step, the experts' bias."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from model.router import update_bias
from parallel.chunk import LossWeights, MicroBatch, Outcome
from parallel.faults import Fault, GradientWatch, gather_faults
from parallel.launch import sum_over_processes
from parallel.optimizer import clipping
from parallel.parts import PartsWatch
from parallel.precision import end_fp8_step, fp8_metrics
from pretrain.assemble import Assembly
from pretrain.timeline import TimelineValues
from pretrain.watching import NOTHING, Watches, own_numbers, seen_metrics


@dataclass(frozen=True)
class StepResult:
    """What a step showed, over the whole global batch and alike on every rank.

    `loss` is lm_loss + mtp_weight · mtp_loss + aux_loss_alpha · balance_loss; `load` [MoE layers, E] counts tokens;
    `skipped` says that nothing was changed, because loss or gradient were not finite or not accepted; `faults` are the
    ranks where something was not finite first; `stop_requested` says that a rank was asked to stop; `seen` are the
    metrics of what was watched.
    """

    loss: float
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    load: Tensor
    skipped: bool
    stop_requested: bool
    faults: tuple[Fault, ...] = ()
    seen: Mapping[str, Any] = field(default_factory=dict)


def are_finite(loss: float, norm: float) -> bool:
    """Whether a step can be applied at all."""
    return math.isfinite(loss) and math.isfinite(norm)


def train_step(
    run: Assembly,
    batch: Batch,
    values: TimelineValues,
    *,
    stop_requested: bool,
    watches: Watches = NOTHING,
    accepts: Callable[[float, float], bool] = are_finite,
    watches_gradients: bool = False,
) -> StepResult:
    """Runs one step over this rank's part of a batch. It changes weights only if `accepts`, asked with the loss and the
    gradient norm, the same on every rank, says yes. `watches` is what to look at beside; with `watches_gradients`,
    looks for faults in this rank's own gradients too, not only in its losses."""
    monitor, clock = run.model.execution.fp8.monitor, run.executor.clock
    monitor.active = watches.fp8
    with GradientWatch(run.model, active=watches_gradients) as watch:
        outcome, numbers = _accumulate_gradients(run, batch, values)
    seen: dict[str, Any] = {}
    if watches.fp8:
        seen |= fp8_metrics(run.model.execution.fp8, run.mesh, run.place.device)
    numbers |= {"stops": numbers["losses"].new_tensor([stop_requested]), **own_numbers(run, outcome, watches)}
    totals = _sum_all(numbers)
    clock.align()
    lm_loss, mtp_loss, balance_loss = totals["losses"].tolist()
    load = totals["load"].view(len(run.config.model.moe_layers), -1)
    loss = lm_loss + values.mtp_weight * mtp_loss + run.config.model.aux_loss_alpha * balance_loss

    parts = PartsWatch(run.optimizer, run.config.model, run.place.device, active=watches.parts)
    with parts.watching():
        grad_norm, updated = run.optimizer.step(values.learning_rate, lambda norm: accepts(loss, norm))
    end_fp8_step(run.model, run.mesh, updated=updated)
    if updated:
        for layer, bias in run.model.expert_biases().items():
            layer_load = load[run.config.model.moe_layers.index(layer)]
            update_bias(bias, layer_load.to(bias.device), values.bias_update_speed)
    clock.switch("other")
    seen |= seen_metrics(totals, load, run.config.model.moe_layers)
    if watches.parts and updated:
        seen["parts"] = parts.metrics(clipping(grad_norm, run.config.optimizer.clip))
    faulty = not updated and not are_finite(loss, grad_norm)
    return StepResult(
        loss=loss,
        lm_loss=lm_loss,
        mtp_loss=mtp_loss,
        balance_loss=balance_loss,
        grad_norm=grad_norm if math.isfinite(grad_norm) else math.nan,
        load=load.to(torch.int64),
        skipped=not updated,
        stop_requested=bool(totals["stops"] > 0),
        faults=tuple(gather_faults(run.place.rank, numbers["losses"], watch)) if faulty else (),
        seen=seen,
    )


def _sum_all(numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sum over ranks of each of some fp64 vectors, on the host, in one collective."""
    sums = sum_over_processes(torch.cat(list(numbers.values()))).cpu()
    return dict(zip(numbers, sums.split([len(vector) for vector in numbers.values()]), strict=True))


def _accumulate_gradients(run: Assembly, batch: Batch, values: TimelineValues) -> tuple[Outcome, dict[str, Tensor]]:
    """Adds up the gradient of the mean loss over the micro-batches of this rank's pipeline. Returns what the passes
    left behind and, in fp64, this rank's share of the global mean `losses` [3] and the `load`, the tokens that it sent
    to experts, [MoE layers · E]."""
    clock = run.executor.clock
    clock.switch("data")
    micro_batches = _micro_batches(run, batch)
    clock.switch("other")
    model, shape = run.config.model, run.mesh.shape
    # In both directions of a bidirectional pipeline half of them pass, and optimizers take the mean over directions.
    each = (2 if shape.bidirectional else 1) / len(micro_batches)
    weights = LossWeights(each, each * values.mtp_weight, each * model.aux_loss_alpha)
    # A rank's loss is the mean over its positions, of which there are fewer where they are divided.
    run.model.execution.fp8.gradient_unit = each * shape.cp
    with run.optimizer.accumulating():
        outcome = run.executor.train(micro_batches, weights)
        clock.switch("optimizer")
    load = torch.zeros(len(model.moe_layers), model.n_routed_experts, dtype=torch.int64, device=run.place.device)
    for layer, counts in outcome.load.items():
        load[model.moe_layers.index(layer)] = counts
    losses = outcome.losses / (len(micro_batches) * shape.batch_ranks)
    return outcome, {"losses": losses, "load": load.flatten().to(losses.dtype)}


def _micro_batches(run: Assembly, batch: Batch) -> list[MicroBatch]:
    size, device = run.config.train.micro_batch_size, run.place.device
    # Tokens are widened where they are used, so that as few bytes as possible are moved.
    tokens = [part.to(device, non_blocking=True).long() for part in batch.tokens.split(size)]
    if batch.documents is None:
        return [MicroBatch(part) for part in tokens]
    documents = [part.to(device, non_blocking=True) for part in batch.documents.split(size)]
    return [MicroBatch(*pair) for pair in zip(tokens, documents, strict=True)]
