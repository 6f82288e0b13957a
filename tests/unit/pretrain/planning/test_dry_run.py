"""A dry run beside a real one: the same bytes at the peak, the same sends; and what it must find."""

import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from run_config import RUN
from support import PROJECT, run_ranks
from torch import Tensor, distributed

from data.loader import Batch
from model import flash
from model.router import Gate, Route
from parallel.chunk import Chunk
from parallel.executor import _Run
from parallel.launch import Place
from parallel.zero import load_deepspeed
from pretrain.assemble import assemble
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.planning.dry_run import DryRun, default_ranks, dry_run, even_choices
from pretrain.planning.fakes import Ledger
from pretrain.planning.plan import plan
from pretrain.step import train_step

RANKS = 4


def config_of(folder: Path, *overrides: str) -> Config:
    (folder / "run.toml").write_text(RUN, encoding="utf-8")
    layout = ["parallel.pp=2", "parallel.ep=2", "train.micro_batch_size=1", "model.num_hidden_layers=4"]
    return load_config(folder / "run.toml", [*layout, *overrides])


def dry(config: Config, rank: int, *, on_gpu: bool = False) -> DryRun:
    memories = plan(config, RANKS).memories
    return dry_run(config, RANKS, rank, planned=memories[rank * config.parallel.pp // RANKS], on_gpu=on_gpu)


def real(rank: int, config: Config) -> tuple[int, list[tuple[int, ...]]]:
    """Peak and sends of the same step with real tensors, every gate choosing as in the dry run."""
    sent: list[tuple[int, ...]] = []
    outgoing = _Run._outgoing

    def watched(run: Any, op: Any) -> Tensor:
        tensor = outgoing(run, op)
        sent.append(tuple(tensor.shape))
        return tensor

    cast(Any, _Run)._outgoing = watched
    with Ledger() as ledger:
        run = assemble(config, Place(rank, RANKS, rank, torch.device("cpu"), RANKS), cast(Any, None))

        def choose(_gate: object, _inputs: object, route: Route) -> Route:
            return route._replace(experts=even_choices(config.model, len(route.experts)))

        for module in run.model.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(choose)
        tokens = torch.zeros(4, config.train.seq_len + 1, dtype=torch.int32)
        ledger.restart()
        train_step(run, Batch(cast(Any, None), tokens, None), config.full_timeline.at(0), stop_requested=False)
        return ledger.peak, sent


@pytest.mark.parametrize(
    ("schedule", "overrides"),
    [
        ("1f1b", ["precision.dtype=bf16"]),
        ("zb1p", ["parallel.zero_stage=0"]),
        ("zbv", ['parallel.recompute=["norms", "mla_up", "swiglu"]', "parallel.zero_stage=0"]),
        ("dualpipe", ['parallel.recompute=["block"]', "parallel.max_expert_rows=48", "precision.dtype=bf16"]),
        ("dualpipev", ["parallel.zero_stage=0"]),
    ],
)
def test_the_peak_and_the_sends_of_a_real_run(schedule: str, overrides: list[str], tmp_path: Path) -> None:
    config = config_of(tmp_path, f"parallel.schedule={schedule}", "train.batch_size=8", *overrides)
    load_deepspeed()
    (tmp_path / "meeting").mkdir()
    peaks = run_ranks(RANKS, real, config, folder=tmp_path / "meeting")
    for rank in (0, RANKS - 1):
        result = dry(config, rank)
        peak, sent = peaks[rank]
        assert abs(result.peak / peak - 1) < 0.05, (result.peak, peak)
        assert list(result.sent) == sent
        assert sent


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_paths_of_a_gpu_run_and_leave_nothing_changed(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kernels of others know no tensors without memory, so they must not be asked where they are installed.
    monkeypatch.setattr(flash, "_is_importable", lambda: True)
    attend = torch.nn.functional.scaled_dot_product_attention
    config = config_of(tmp_path, "parallel.schedule=dualpipe", "parallel.zero_stage=1", f"precision.dtype={dtype}")
    result = dry(config, 1, on_gpu=True)
    assert result.held < result.peak
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert not distributed.is_initialized()


def test_a_stage_that_gives_a_wrong_shape_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first stage passes on all positions but one."""
    forward = Chunk.forward

    def shorter(self: Chunk, *arguments: Any) -> Any:
        out = yield from forward(self, *arguments)
        return out[:, 1:].detach().requires_grad_() if self.is_first else out

    monkeypatch.setattr(Chunk, "forward", shorter)
    with pytest.raises(UserError, match=r"rank 0 and rank 2 pass on \[1, 63, 32\]|a step on rank 0 of 4 fails"):
        dry(config_of(tmp_path, "parallel.zero_stage=0"), 0)


def test_fp8_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "precision.dtype=bf16")
    with pytest.raises(UserError, match=r'--dry-run cannot run precision\.fp8 = "block"'):
        dry(replace(config, precision=replace(config.precision, fp8="block")), 0)


def test_an_estimate_that_is_wrong_shows(tmp_path: Path) -> None:
    """Planted: an estimate of which a part is 10 % of the whole too small."""
    result = dry(config_of(tmp_path, "parallel.zero_stage=0"), 0)
    first, *others = result.planned.held
    smaller = replace(first, bytes=first.bytes - result.planned.peak // 10)
    wrong = replace(result, planned=replace(result.planned, held=(smaller, *others)))
    assert wrong.difference - result.difference > 0.05


def test_the_ranks_that_are_looked_at() -> None:
    config = load_config(PROJECT / "configs" / "dsv3_671b.toml", [])
    assert default_ranks(config, 2048) == (0, 1024, 2047)


def test_a_rank_of_the_whole_model_on_2048_ranks() -> None:
    config = load_config(PROJECT / "configs" / "dsv3_671b.toml", [])
    planned = plan(config, 2048).memories[15]
    before = time.process_time()
    result = dry_run(config, 2048, 2047, planned=planned)
    assert abs(result.difference) < 0.05
    assert len(result.sent) == len(result.received) == 32
    assert time.process_time() - before < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 < 8 << 30
