"""One optimizer step: micro-batches with plain autograd, one sum over ranks, ZeRO's step, the experts' bias."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.loader import Batch
from model.router import update_bias
from parallel.launch import sum_over_processes
from pretrain.assemble import Assembly
from pretrain.timeline import TimelineValues


@dataclass(frozen=True)
class StepResult:
    """What a step showed, over the whole global batch and alike on every rank.

    `loss` is lm_loss + mtp_weight · mtp_loss + aux_loss_alpha · balance_loss; `load` [MoE layers, E] counts tokens;
    `skipped` says that the gradient was not finite and nothing was changed; `stop_requested` that a rank was asked to
    stop.
    """

    loss: float
    lm_loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    load: Tensor
    skipped: bool
    stop_requested: bool


def train_step(run: Assembly, batch: Batch, values: TimelineValues, *, stop_requested: bool) -> StepResult:
    """Runs one step over this rank's part of a batch."""
    sums, load = _accumulate_gradients(run, batch, values)
    ranks = run.place.world_size
    totals = torch.cat((sums / ranks, sums.new_tensor([stop_requested]), load.flatten().to(sums.dtype)))
    totals = sum_over_processes(totals).cpu()
    lm_loss, mtp_loss, balance_loss, stops = totals[:4].tolist()
    total_load = totals[4:].view(load.shape)

    grad_norm, updated = run.optimizer.step(values.learning_rate)
    if updated:
        for bias, layer_load in zip(run.model.expert_biases().values(), total_load, strict=True):
            update_bias(bias, layer_load.to(bias.device), values.bias_update_speed)
    return StepResult(
        loss=lm_loss + values.mtp_weight * mtp_loss + run.config.model.aux_loss_alpha * balance_loss,
        lm_loss=lm_loss,
        mtp_loss=mtp_loss,
        balance_loss=balance_loss,
        grad_norm=grad_norm if updated else math.nan,
        load=total_load.to(torch.int64),
        skipped=not updated,
        stop_requested=stops > 0,
    )


def _accumulate_gradients(run: Assembly, batch: Batch, values: TimelineValues) -> tuple[Tensor, Tensor]:
    """Adds up the gradient of the rank's mean loss; returns its mean losses [3] in fp64 and the summed load."""
    micro_batches = _micro_batches(run, batch)
    alpha = run.config.model.aux_loss_alpha
    sums = torch.zeros(3, dtype=torch.float64, device=run.place.device)
    load: Tensor | None = None
    for tokens, documents in micro_batches:
        losses = run.model(tokens, documents)
        loss = losses.lm_loss + values.mtp_weight * losses.mtp_loss + alpha * losses.balance_loss
        (loss / len(micro_batches)).backward()
        run.optimizer.end_micro_batch()
        sums += torch.stack((losses.lm_loss, losses.mtp_loss, losses.balance_loss)).detach() / len(micro_batches)
        load = losses.load if load is None else load + losses.load
    assert load is not None
    return sums, load


def _micro_batches(run: Assembly, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    size, device = run.config.train.micro_batch_size, run.place.device
    tokens = [part.to(device, non_blocking=True).long() for part in batch.tokens.split(size)]
    if batch.documents is None:
        return [(part, None) for part in tokens]
    documents = [part.to(device, non_blocking=True) for part in batch.documents.split(size)]
    return list(zip(tokens, documents, strict=True))
