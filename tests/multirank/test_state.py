"""Saving and resuming inside one process group, where a step can be made to fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, write_run

from data.loader import BatchLoader
from parallel.launch import Place
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.config import load_config
from pretrain.loop import plan_batches
from pretrain.state import TrainState, first_state, resume, save
from pretrain.step import train_step


def take_steps(run: Assembly, state: TrainState, count: int, *, poisoned: int | None = None) -> TrainState:
    """Takes steps; the gradient of the one numbered `poisoned` is not a number."""
    specs = plan_batches(run.timeline, run.stream, state, run.config.train)
    with BatchLoader(run.stream, specs, dp_rank=run.place.rank, dp_size=run.place.world_size) as batches:
        for _ in range(count):
            batch = next(batches)
            hook = run.model.norm.weight.register_hook(
                lambda gradient, broken=state.step + 1 == poisoned: gradient * torch.nan if broken else gradient
            )
            result = train_step(run, batch, run.timeline.at(state.tokens), stop_requested=False)
            hook.remove()
            assert result.skipped == (state.step + 1 == poisoned)
            state = state.after(batch.spec.batch_size, skipped=result.skipped)
    return state


def skip_then_resume(rank: int, world_size: int, config_file: Path, dtype: str) -> tuple[Any, Any]:
    config = load_config(config_file, [f"precision.dtype={dtype}"])
    place = Place(rank, world_size, rank, torch.device("cpu"))
    straight = assemble(config, place, open_data(config))
    state = take_steps(straight, first_state(straight), 4, poisoned=2)
    assert (state.step, state.skipped) == (4, 1)
    save(straight, state)
    take_steps(straight, state, 2)

    resumed = assemble(config, place, open_data(config))
    again = resume(resumed)
    assert again == state
    take_steps(resumed, again, 2)
    return tuple([p.float().detach().numpy() for p in run.model.parameters()] for run in (straight, resumed))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_after_a_skipped_step(tmp_path: Path, dtype: str) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    for straight, resumed in run_ranks(2, skip_then_resume, 2, config_file, dtype, folder=tmp_path):
        for one, other in zip(straight, resumed, strict=True):
            assert (one == other).all()
