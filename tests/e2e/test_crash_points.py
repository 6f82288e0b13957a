"""A save that is cut off at any of its operations on files: what is there afterwards is the state before or after it.

Each rank forks a child that saves and ends at its n-th operation as if it had been killed, in the middle of what it
writes; the child of the other rank is killed a moment later. The ranks then resume, and every tensor is compared, bit
for bit. EVA_CRASH_POINTS sets how many points are tried for each way to save (default: 30; 0: all).
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, write_run
from torch import Tensor
from torch import distributed as dist

from data.loader import BatchLoader
from parallel.launch import Place, gather_texts
from parallel.zero import load_deepspeed
from pretrain import state
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.checkpoints import saving
from pretrain.checkpoints.checkpoint import step_folder
from pretrain.config import load_config
from pretrain.loop import plan_batches
from pretrain.state import TrainState, first_state, resume, save, tensors_to_save
from pretrain.step import train_step

OPERATIONS = ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir")
POINTS = int(os.environ.get("EVA_CRASH_POINTS", "30"))
KILLED = 137


@dataclass(frozen=True)
class Way:
    """How is saved: on how many ranks, which of them crashes, in the background or not, over one of the same step."""

    name: str
    world_size: int
    crashing: int = 0
    in_background: bool = False
    again: bool = False


WAYS = (
    Way("one rank", 1),
    Way("over one of the same step", 1, again=True, in_background=True),
    Way("first of two", 2),
    Way("second of two", 2, crashing=1, in_background=True),
)


def take_steps(run: Assembly, state: TrainState, count: int) -> TrainState:
    specs = plan_batches(run.timeline, run.stream, state, run.config.train)
    with BatchLoader(run.stream, specs, dp_rank=run.place.rank, dp_size=run.place.world_size) as batches:
        for _ in range(count):
            batch = next(batches)
            train_step(run, batch, run.timeline.at(state.tokens), stop_requested=False)
            state = state.after(batch.spec.batch_size, skipped=False)
    return state


def copies(run: Assembly) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors_to_save(run).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def crash_at(point: int, log: Path) -> None:
    """From now on operations on files are counted, and the process ends at the one numbered `point`. At 0 it goes on,
    and `log` gets their names."""
    seen: list[str] = []

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **words: Any) -> Any:
            seen.append(name)
            if len(seen) == point:
                if name == "write":
                    operation(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(KILLED)
            if not point:
                log.write_text(" ".join(seen))
            return operation(*arguments, **words)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))


def save_in_child(run: Assembly, at: TrainState, way: Way, point: int, meeting: Path) -> int:
    """Forks a process that saves, and returns how it ended: by itself, or killed with the one that crashed."""
    child = os.fork()
    if not child:
        try:
            # The threads of a process group do not live on in a fork; a file serves.
            store, calls = dist.FileStore(str(meeting / "store"), way.world_size), [0]

            def gather(text: str) -> list[str]:
                calls[0] += 1
                store.set(f"{calls[0]}/{run.place.rank}", text)
                return [store.get(f"{calls[0]}/{rank}").decode() for rank in range(way.world_size)]

            saving.gather_texts = state.gather_texts = gather
            if run.place.rank == way.crashing:
                crash_at(point, meeting / "operations")
            save(run, at)
        except BaseException:
            os._exit(1)
        os._exit(0)
    crashed, deadline = meeting / "crashed", time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if crashed.exists() or time.monotonic() > deadline:
            time.sleep(random.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return KILLED
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status == KILLED:
        crashed.touch()
    return status


def chosen(operations: list[str], count: int) -> list[int]:
    """Numbers of operations: of the writes of tensors, which are most, only some; all others if `count` allows."""
    numbers = list(range(1, len(operations) + 1))
    if not count or count >= len(numbers):
        return numbers
    plain = [n for n in numbers if operations[n - 1] != "write" or "fsync" in operations[n - 1 : n + 2]]
    picked = set(plain[:: max(1, -(-len(plain) // count))])
    rest = [n for n in numbers if n not in picked]
    return sorted(picked | set(rest[:: max(1, len(rest) // max(1, count - len(picked)))]))


def crash_everywhere(rank: int, way: Way, config_file: Path, folder: Path) -> tuple[int, int, int]:
    """Returns how many points were tried, and after how many of them there was the state before and after the save."""
    overrides = ["checkpoint.keep=1", f"checkpoint.async={str(way.in_background).lower()}"]
    config = load_config(config_file, overrides)
    run = assemble(config, Place(rank, way.world_size, rank, torch.device("cpu")), open_data(config))
    first = take_steps(run, first_state(run), 1)
    before = copies(run)
    save(run, first)
    second = take_steps(run, first, 1)
    after = copies(run)
    if way.again:
        # A save of the same step, and beside it what two killed saves left.
        save(run, second)
        before, first = after, second
    end = take_steps(run, second, 2)
    final = copies(run)
    template = folder / "template"
    if rank == 0:
        if way.again:
            shutil.copytree(step_folder(run.folder, 2), step_folder(run.folder, 2).with_suffix(".partial"))
            shutil.copytree(step_folder(run.folder, 2), step_folder(run.folder, 2).with_suffix(".replaced.partial"))
        shutil.copytree(run.folder, template)
    counts, points, tried = [0, 0], [0], 0
    while points:
        point = points.pop()
        meeting = folder / f"{way.name}-{tried}"
        dist.barrier()
        if rank == 0:
            shutil.rmtree(run.folder)
            shutil.copytree(template, run.folder)
            meeting.mkdir()
        dist.barrier()
        # The child saves what this process holds.
        for key, tensor in tensors_to_save(run).items():
            tensor.copy_(after[key])
        status = save_in_child(run, second, way, point, meeting)
        assert status == (KILLED if point else 0), f"operation {point} ended with {status}"
        found = resume(run)
        assert found in (first, second)
        assert same(copies(run), before if found == first else after), f"operation {point}"
        if not point:
            assert found == second
            points = chosen((meeting / "operations").read_text().split(), POINTS)
        else:
            counts[found == second] += 1
        if tried % 10 == 0:
            assert take_steps(run, found, end.step - found.step) == end
            assert same(copies(run), final), f"operation {point}, two steps later"
            save(run, end)
            assert resume(run) == end
        tried += 1
        gather_texts("")
    return tried - 1, counts[0], counts[1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name.replace(" ", "-"))
def test_a_save_cut_off_anywhere(tmp_path: Path, way: Way, record_property: Callable[[str, object], None]) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    results = run_ranks(way.world_size, crash_everywhere, way, config_file, tmp_path, folder=tmp_path)
    points, before, after = results[0]
    assert results == [results[0]] * way.world_size
    assert points >= min(POINTS, 25) if POINTS else points > 100
    assert before + after == points
    # A rank other than the first does nothing after its part is there, without which nothing is.
    assert (before > 0, after > 0) == (not way.again, not way.crashing)
    record_property("crash points", points)
    print(f"{way.name}: {points} points, {before} with the state before the save, {after} with the state after it")
