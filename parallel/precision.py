"""What the ranks of a run must agree on in FP8: the scales of the next step, and what a monitor saw."""

import torch
from torch import Tensor
from torch import distributed as dist

from model.fp8 import KINDS, Fp8, Quantizer, quantizers
from model.transformer import Transformer
from parallel.mesh import Mesh


def end_fp8_step(model: Transformer, mesh: Mesh, *, updated: bool) -> None:
    """Moves the largest magnitudes of a step into the histories of delayed scales, the maximum over all ranks that
    hold the same weights. Of a step that `updated` nothing they are forgotten: they may be what was wrong with it."""
    if model.execution.fp8.config.recipe != "delayed":
        return
    found = list(quantizers(model).values())
    if not updated:
        for quantizer in found:
            quantizer.amax.zero_()
        return
    for of_experts, group in ((False, mesh.replicas), (True, mesh.expert_replicas)):
        members = [quantizer for quantizer in found if quantizer.of_experts == of_experts]
        if members:
            _maximum(members, group)
    for quantizer in found:
        quantizer.end_step()


def _maximum(members: list[Quantizer], group: dist.ProcessGroup) -> None:
    flat = torch.cat([member.amax.flatten() for member in members])
    dist.all_reduce(flat, dist.ReduceOp.MAX, group=group)
    for member, part in zip(members, flat.split([member.amax.numel() for member in members]), strict=True):
        member.amax.copy_(part.view_as(member.amax))


def fp8_metrics(fp8: Fp8, mesh: Mesh, device: torch.device) -> dict[str, float]:
    """Of the values of a step that were not zero, over all ranks: the largest magnitude by kind of tensor (of a
    gradient, that of the loss of one micro-batch), which share became zero (`underflow`) and which was cut off
    (`overflow`). Empties the monitor. A collective of all ranks."""
    sums = fp8.monitor.sums
    if sums is None:
        sums = torch.zeros(2, len(KINDS), 4, dtype=torch.float64, device=device)
    fp8.monitor.sums = None
    largest, counts = sums[..., 0].amax(0), _once(sums[..., 1:], mesh).sum(0)
    largest[KINDS.index("gradient")] /= fp8.gradient_unit
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    dist.all_reduce(counts)
    metrics: dict[str, float] = {}
    for kind, amax, (nonzero, zeroed, clipped) in zip(KINDS, largest.tolist(), counts.tolist(), strict=True):
        metrics[f"fp8_amax_{kind}"] = amax
        metrics[f"fp8_underflow_{kind}"] = zeroed / nonzero if nonzero else 0.0
        metrics[f"fp8_overflow_{kind}"] = clipped / nonzero if nonzero else 0.0
    return metrics


def _once(counts: Tensor, mesh: Mesh) -> Tensor:
    """Counts [2, 3, 3] in which a weight that several ranks hold counts for a part on each."""
    counts = counts.clone()
    weight = KINDS.index("weight")
    for of_experts, group in enumerate((mesh.replicas, mesh.expert_replicas)):
        counts[of_experts, weight] /= dist.get_world_size(group)
    return counts
