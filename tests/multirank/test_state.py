"""Saving and resuming inside one process group, where a step can be made to fail."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, write_run

from data.loader import BatchLoader
from parallel.launch import Place
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.checkpoints.checkpoint import MANIFEST, step_folder
from pretrain.config import load_config
from pretrain.errors import SharedError, UserError
from pretrain.loop import plan_batches
from pretrain.state import TrainState, first_state, open_averages, open_saver, resume, save
from pretrain.step import train_step
from pretrain.weights import open_weights


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


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def resume_past_damage(rank: int, config_file: Path) -> tuple[int, int]:
    config = load_config(config_file)
    place = Place(rank, 2, rank, torch.device("cpu"))
    run = assemble(config, place, open_data(config))
    state = first_state(run)
    for _ in range(4):
        state = take_steps(run, state, 1)
        save(run, state)
    torch.distributed.barrier()
    if rank == 0:
        # One that the other rank reads, one whose manifest is gone, one that says it is another.
        damage(step_folder(run.folder, 4) / "rank-00001.safetensors")
        (step_folder(run.folder, 3) / MANIFEST).unlink()
        shutil.copytree(step_folder(run.folder, 1), step_folder(run.folder, 2), dirs_exist_ok=True)
    torch.distributed.barrier()
    found = resume(run)
    assert found is not None
    torch.distributed.barrier()
    if rank == 0:
        (step_folder(run.folder, 1) / "config.toml").unlink()
    torch.distributed.barrier()
    for _ in range(2):
        with pytest.raises(
            SharedError, match=r"no checkpoint of .* is good; .*step-00000004\.damaged: put a good copy"
        ):
            resume(run)
    return found.step, found.tokens


def test_the_newest_good_one_is_used(tmp_path: Path) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    one, other = run_ranks(2, resume_past_damage, config_file, folder=tmp_path)
    assert one == other
    assert one[0] == 1
    log = (tmp_path / "small" / "log.txt").read_text().splitlines()
    assert len(log) == 4
    assert re.search(r"step-00000004 is damaged: rank-00001\.safetensors is damaged in \S+@\d+, which does not", log[0])
    assert re.search(r"step-00000003: manifest\.json is missing; it is now step-00000003\.damaged", log[1])
    assert re.search(r"step-00000002 is damaged: manifest\.json is that of step 1; it is now", log[2])
    assert re.search(r"step-00000001 is damaged: config\.toml is missing; it is now step-00000001\.damaged", log[3])


def lose_the_disk(rank: int, config_file: Path, broken_rank: int, in_background: bool) -> list[Any]:
    config = load_config(config_file, [f"checkpoint.async={str(in_background).lower()}"])
    place = Place(rank, 2, rank, torch.device("cpu"))
    run = assemble(config, place, open_data(config))
    saver, seen = open_saver(run), []
    state = take_steps(run, first_state(run), 1)
    save(run, state, saver)
    state = take_steps(run, state, 1)
    write = os.write

    def full(descriptor: int, content: Any) -> int:
        # The disk takes the header and a little more.
        if os.lseek(descriptor, 0, os.SEEK_CUR) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content)

    if rank == broken_rank:
        os.write = full
    save(run, state, saver)
    with pytest.raises(SharedError, match=f"checkpoint of step 2 could not be saved: .*rank {broken_rank}: .*No space"):
        saver.finish()
    os.write = write
    torch.distributed.barrier()
    seen.append((saver.failed, sorted(path.name for path in (run.folder / "checkpoints").iterdir())))
    state = take_steps(run, state, 1)
    save(run, state, saver)
    saver.finish()
    torch.distributed.barrier()
    seen.append((saver.failed, sorted(path.name for path in (run.folder / "checkpoints").iterdir())))
    told = saver.news()
    lines = [news.line for news in told]
    if rank == 0:
        assert [(news.step, news.is_failure) for news in told] == [(1, False), (2, True), (3, False)]
        assert [re.sub(r" in [\d.]+ s.*", "", line) for line in lines if "could not" not in line] == [
            "saved step 1",
            "saved step 3",
        ]
        assert sum("step 2 could not be saved" in line and "older ones stay" in line for line in lines) == 1
    again = resume(run)
    assert again == state
    return seen


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("broken_rank", [0, 1])
def test_a_full_disk_costs_one_checkpoint(tmp_path: Path, broken_rank: int, in_background: bool) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    expected = [(1, ["step-00000001"]), (1, ["step-00000001", "step-00000003"])]
    for seen in run_ranks(2, lose_the_disk, config_file, broken_rank, in_background, folder=tmp_path):
        assert seen == expected


def average_weights(rank: int, config_file: Path, zero_stage: int) -> dict[str, Any]:
    """Four steps, the second skipped and a resume after the third; returns what rank 0 averages as it should be."""
    config = load_config(
        config_file, ["checkpoint.ema=0.75", "checkpoint.async=true", f"parallel.zero_stage={zero_stage}"]
    )
    place = Place(rank, 2, rank, torch.device("cpu"))
    run = assemble(config, place, open_data(config))
    state = first_state(run)
    averages = open_averages(run, state)
    assert averages is not None

    def masters() -> dict[str, torch.Tensor]:
        return {
            f"{shard.name}@{shard.start}": shard.tensors["param"].clone()
            for shard in run.optimizer.shards()
            if shard.owned
        }

    expected = masters()
    for step in range(1, 5):
        skipped = state.skipped
        state = take_steps(run, state, 1, poisoned=2)
        if state.skipped == skipped:
            averages.update()
            expected = {key: 0.75 * expected[key] + 0.25 * master for key, master in masters().items()}
        if step == 3:
            save(run, state, averages=averages)
            run = assemble(config, place, open_data(config))
            assert resume(run) == state
            averages = open_averages(run, state)
            assert averages is not None
    save(run, state, averages=averages)
    found = averages.tensors()
    assert found.keys() == expected.keys()
    for key, average in expected.items():
        torch.testing.assert_close(found[key], average, rtol=1e-6, atol=1e-7)
    return {key: average.numpy() for key, average in found.items()}


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_averages_of_the_weights_are_saved_and_go_on(tmp_path: Path, zero_stage: int) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    ranks = run_ranks(2, average_weights, config_file, zero_stage, folder=tmp_path)
    averaged = dict(open_weights(tmp_path / "small", averaged=True).tensors())
    newest = dict(open_weights(tmp_path / "small").tensors())
    assert averaged.keys() == newest.keys()
    differing = [name for name in averaged if not torch.equal(averaged[name], newest[name])]
    assert len(differing) > len(averaged) // 2
    pieces = {key: values for rank in ranks for key, values in rank.items()}
    for key, values in pieces.items():
        name, _, start = key.rpartition("@")
        whole = averaged[name].flatten()[int(start) : int(start) + len(values)]
        assert torch.equal(whole, torch.from_numpy(values)), key
    (tmp_path / "small").rename(tmp_path / "other")
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    run_ranks(1, save_plainly, config_file, folder=meeting)
    with pytest.raises(UserError, match="holds no averages of the weights"):
        open_weights(tmp_path / "small", averaged=True)


def save_plainly(rank: int, config_file: Path) -> None:
    config = load_config(config_file)
    run = assemble(config, Place(rank, 1, rank, torch.device("cpu")), open_data(config))
    save(run, take_steps(run, first_state(run), 1))
