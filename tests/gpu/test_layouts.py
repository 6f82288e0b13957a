"""Layouts over NCCL on two GPUs against one: the same losses and norms."""

from pathlib import Path

import pytest
import torch
from support import WIDE, finish, read_metrics, start_training, write_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

DEEP = {**WIDE, "num_hidden_layers": 4}
LAYOUTS = {
    "dp2": (),
    "ep2": ("parallel.ep=2",),
    "ep2 overlapped": ("parallel.ep=2", "parallel.schedule=dualpipev"),
    "cp2": ("parallel.cp=2",),
    "pp2 1f1b": ("parallel.pp=2",),
    "pp2 zbv": ("parallel.pp=2", "parallel.schedule=zbv"),
    "pp2 dualpipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "pp2 dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "pp2 dualpipev, computed again": (
        "parallel.pp=2", "parallel.schedule=dualpipev", 'parallel.recompute=["norms", "mla_up", "swiglu"]',
    ),
}  # fmt: skip
COMMON = ("train.steps=6", "train.micro_batch_size=1", "timeline.learning_rate=1e-3", "checkpoint.every=0")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with what one GPU gives in fp32 and in bf16."""
    config = write_run(tmp_path_factory.mktemp("layouts"), **DEEP)
    for dtype in ("fp32", "bf16"):
        finish(start_training(config, f"run.name={dtype}", f"precision.dtype={dtype}", *COMMON))
    return config


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_same_as_one_gpu(config: Path, name: str, dtype: str) -> None:
    run = f"{dtype}-{name.replace(' ', '-').replace(',', '')}"
    settings = (f"run.name={run}", f"precision.dtype={dtype}", *COMMON, *LAYOUTS[name])
    finish(start_training(config, *settings, processes=2))
    ours, one, exact = (read_metrics(config.parent / folder) for folder in (run, dtype, "fp32"))
    for key in ("loss", "lm_loss", "grad_norm"):
        gap = max(abs(a[key] / b[key] - 1) for a, b in zip(one, exact, strict=True))
        for mine, other in zip(ours, exact, strict=True):
            assert mine[key] == pytest.approx(other[key], rel=max(1e-5, 2 * gap)), (key, mine["step"])
