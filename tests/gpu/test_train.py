"""The same command on a GPU: bf16 over NCCL, fused AdamW, resume bit for bit in deterministic mode."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROJECT, WIDE, finish, read_metrics, start_training, write_run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import flash
from model.attention import attention_kernel
from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder
from pretrain.config import load_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    config = write_run(tmp_path, **WIDE)
    for dtype in ("fp32", "bf16"):
        # A learning rate at which rounding does not send the two runs to different places.
        finish(start_training(config, f"run.name={dtype}", f"precision.dtype={dtype}", "timeline.learning_rate=1e-3"))
    for exact, rounded in zip(read_metrics(tmp_path / "fp32"), read_metrics(tmp_path / "bf16"), strict=True):
        assert rounded["lm_loss"] == pytest.approx(exact["lm_loss"], rel=5e-3), exact["step"]
        assert rounded["max_memory_gib"] > 0


def test_resume_is_exact_in_deterministic_mode(tmp_path: Path) -> None:
    config = write_run(tmp_path, **WIDE)
    exact = ("precision.dtype=bf16", "run.deterministic=true")
    finish(start_training(config, "run.name=straight", *exact))
    finish(start_training(config, "run.name=broken", "train.steps=5", *exact))
    finish(start_training(config, "run.name=broken", *exact))
    straight, broken = (CheckpointReader(step_folder(tmp_path / name, 12)) for name in ("straight", "broken"))
    for kind in ("param", "exp_avg", "exp_avg_sq", "buffer", "rng"):
        assert straight.keys(kind)
        for name in straight.keys(kind):
            assert torch.equal(straight.tensor(f"{kind}/{name}"), broken.tensor(f"{kind}/{name}")), name


@pytest.mark.parametrize("name", ["small", "dsv3_2b", "dsv3_16b", "dsv3_671b"])
def test_which_kernel_attends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """FlashAttention 4 where it is installed, else torch with cuDNN."""
    model, device = load_config(PROJECT / f"configs/{name}.toml").model, torch.device("cuda")

    def kernel() -> str:
        return attention_kernel(model, 4096, device=device, dtype=torch.bfloat16)

    assert kernel() == ("FlashAttention 4" if flash.is_installed() else "cudnn")
    monkeypatch.setattr(flash, "is_installed", lambda: False)
    assert kernel() == "cudnn"
    heads = (torch.randn(1, 8, 4096, size, device=device, dtype=torch.bfloat16) for size in (192, 192, 128))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        torch.cuda.synchronize()
    assert any("cudnn" in event.key for event in profile.key_averages()), [e.key for e in profile.key_averages()]


@pytest.mark.parametrize("repeats", [False, True])
def test_flash_attention(repeats: bool) -> None:
    """Values that are not cut out of a whole tensor but lie beside keys, as in the model; to the bit where it must."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 1000, 4, 192, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    both = torch.randn(2, 1000, 4, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(2, 1000, 4, 128, device="cuda", dtype=torch.bfloat16)
    scale = 192**-0.5
    if not flash.can_attend(q, both[..., 128:]):
        pytest.skip("FlashAttention 4 is not installed")

    def passes(attend: Any) -> list[Tensor]:
        out = attend(q, k, both[..., 128:])
        return [out, *torch.autograd.grad(out, (q, k, both), grad.to(out.dtype))]

    def exactly(*tensors: Tensor) -> Tensor:
        heads = (tensor.double().transpose(1, 2) for tensor in tensors)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale).transpose(1, 2)

    torch.use_deterministic_algorithms(repeats)
    try:
        first, again = (passes(lambda *tensors: flash.attend(*tensors, scale)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not repeats or all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ours, right in zip(first, passes(exactly), strict=True):
        assert (ours - right).norm() < 1e-2 * right.norm()
