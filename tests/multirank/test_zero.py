"""ZeRO-1 against plain torch: norm, loss and parameters after clipped AdamW steps, on 1, 2 and 4 ranks."""

import itertools
from pathlib import Path

import pytest
import torch
from support import run_ranks, small_model
from torch import Tensor, nn

from model.init import initialize
from model.transformer import Transformer
from parallel.zero import OptimizerConfig, ZeroOptimizer, load_deepspeed

STEPS, BATCH, MICRO = 3, 8, 1
LEARNING_RATE = 1e-2


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (BATCH, 18), generator=generator) for _ in range(STEPS)]


def total_loss(model: Transformer, tokens: Tensor) -> Tensor:
    losses = model(tokens)
    return losses.lm_loss + 0.3 * losses.mtp_loss + 1e-2 * losses.balance_loss


def make_model(dtype: torch.dtype) -> Transformer:
    model = Transformer(small_model())
    initialize(model, small_model(), seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def train_plainly(dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """The reference: one process, fp32 AdamW with torch's own clipping; bf16 weights are rounded from fp32 ones."""
    model, masters = make_model(dtype), make_model(torch.float32)
    masters.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    groups = [
        {"params": [p for p in masters.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in masters.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for batch in batches():
        for tokens in batch.split(MICRO):
            (total_loss(model, tokens) * MICRO / BATCH).backward()
            for parameter, master in zip(model.parameters(), masters.parameters(), strict=True):
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None
        norms.append(float(nn.utils.clip_grad_norm_(masters.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        for parameter, master in zip(model.parameters(), masters.parameters(), strict=True):
            parameter.data.copy_(master.data)
    return norms, {name: value.detach() for name, value in masters.named_parameters()}


def train_under_zero(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    model = make_model(dtype)
    zero = ZeroOptimizer(model, config=OptimizerConfig(), dtype=dtype, micro_batch_size=MICRO)
    share = BATCH // world_size
    norms = []
    for batch in batches():
        for tokens in batch[rank * share : (rank + 1) * share].split(MICRO):
            (total_loss(model, tokens) * MICRO / share).backward()
            zero.end_micro_batch()
        norm, updated = zero.step(LEARNING_RATE)
        assert updated
        norms.append(norm)
    return norms, {f"{shard.name}@{shard.start}": shard.tensors["param"].clone().numpy() for shard in zero.shards()}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_plain_torch(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    load_deepspeed()
    norms, parameters = train_plainly(dtype)
    # In bf16 ranks add the same rounded gradients in another order, so the bound is fp32's for the first step and
    # grows where weights are rounded differently afterwards.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    covered = {name: torch.zeros_like(value).flatten() for name, value in parameters.items()}
    for rank_norms, shards in run_ranks(world_size, train_under_zero, world_size, dtype, folder=tmp_path):
        assert rank_norms[0] == pytest.approx(norms[0], rel=1e-5)
        assert rank_norms == pytest.approx(norms, rel=tolerance)
        for key, value in shards.items():
            name, _, start = key.rpartition("@")
            covered[name][int(start) : int(start) + len(value)] += torch.from_numpy(value)
    for name, value in parameters.items():
        assert (covered[name] - value.flatten()).norm() < tolerance * value.norm(), name


def test_forgotten_micro_batches_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: bf16 gradients of only the first micro-batch of a step reach their fp32 sums."""
    load_deepspeed()
    norms, _ = train_plainly(torch.bfloat16)
    add, calls = ZeroOptimizer.end_micro_batch, itertools.count()
    monkeypatch.setattr(ZeroOptimizer, "end_micro_batch", lambda self: next(calls) % BATCH or add(self))
    ((faulty, _),) = run_ranks(1, train_under_zero, 1, torch.bfloat16, folder=tmp_path)
    assert faulty[0] != pytest.approx(norms[0], rel=1e-2)
