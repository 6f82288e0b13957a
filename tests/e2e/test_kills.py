"""A run that is killed again and again, at any moment and in the middle of saves, ends as the one that never was.

Two forked ranks train; one of them, or both at once, get SIGKILL: after a random number of steps, or as soon as a save
has begun. As a launcher does, the test ends what is left and starts the same command again. EVA_KILLS sets how often
the run is killed (default: 20).
"""

import contextlib
import multiprocessing
import os
import random
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from support import TIMINGS, read_metrics, write_run

from parallel.launch import Place, join_processes
from parallel.zero import load_deepspeed
from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder
from pretrain.config import load_config
from pretrain.loop import train

KILLS = int(os.environ.get("EVA_KILLS", "20"))
MOST_STEPS_EACH = 2
STEPS = 5 * max(KILLS, 5)


def rank_main(rank: int, port: int, config_file: Path, overrides: list[str], output: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place = Place(rank, 2, rank, torch.device("cpu"))
    join_processes(place)
    # The parent's exit handlers are not this process's to run.
    os._exit(0 if train(load_config(config_file, overrides), place) else 75)


def start(config_file: Path, *overrides: str) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    outputs = [config_file.with_name(f"rank{rank}.out") for rank in range(2)]
    everything = [f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=2", "logging.tensorboard=false"]
    ranks: list[BaseProcess] = [
        context.Process(target=rank_main, args=(rank, port, config_file, [*everything, *overrides], output))
        for rank, output in enumerate(outputs)
    ]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        process.kill()
        process.join()


def wait_to_the_end(ranks: list[BaseProcess], folder: Path) -> None:
    for process in ranks:
        process.join(240)
    said = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("rank*.out")))
    statuses = [process.exitcode for process in ranks]
    end(ranks)
    assert statuses == [0, 0], said


def wait_for_steps(ranks: list[BaseProcess], metrics: Path, count: int) -> None:
    """Until so many steps are recorded, or the ranks have ended."""
    size, deadline = -1, time.monotonic() + 120
    while count >= 0 and any(process.is_alive() for process in ranks):
        assert time.monotonic() < deadline
        found = metrics.stat().st_size if metrics.exists() else 0
        if found != size:
            size, count = found, count - 1
        time.sleep(0.001)


def partial_folders(run: Path) -> set[int]:
    """Those that saves have begun, by what tells them from earlier ones of the same name."""
    found = set()
    for path in (run / "checkpoints").glob("*.partial"):
        # It may have been completed in between.
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_mtime_ns)
    return found


def kill_somewhere(ranks: list[BaseProcess], run: Path, number: int, choose: random.Random) -> bool:
    """Returns whether a save had begun and not ended."""
    left = partial_folders(run)
    wait_for_steps(ranks, run / "metrics.jsonl", choose.randint(0, MOST_STEPS_EACH))
    if number % 2:
        deadline = time.monotonic() + 60
        while partial_folders(run) <= left and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(choose.random() * 0.004)
    else:
        time.sleep(choose.random() * 0.1)
    if number % 4 < 2:
        choose.choice(ranks).kill()
        # Until the launcher has noticed.
        time.sleep(choose.random() * 0.1)
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()
    return not partial_folders(run) <= left


def without_timings(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(run)]


@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tmp_path: Path) -> None:
    load_deepspeed()
    config_file = write_run(tmp_path)
    wait_to_the_end(start(config_file, "run.name=straight"), tmp_path)
    straight, killed, choose = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    inside = 0
    for number in range(KILLS):
        in_background = str(number % 3 == 0).lower()
        ranks = start(config_file, "run.name=killed", f"checkpoint.async={in_background}")
        try:
            inside += kill_somewhere(ranks, killed, number, choose)
        finally:
            end(ranks)
    assert not step_folder(killed, STEPS).exists(), "the run ended before it was killed often enough"
    assert inside >= KILLS // 5
    wait_to_the_end(start(config_file, "run.name=killed"), tmp_path)

    assert without_timings(killed) == without_timings(straight)
    assert [line["step"] for line in read_metrics(killed)] == list(range(1, STEPS + 1))
    one, other = (CheckpointReader(step_folder(run, STEPS)) for run in (straight, killed))
    assert one.manifest.state == other.manifest.state
    for kind in ("param", "exp_avg", "exp_avg_sq", "buffer", "rng"):
        assert one.keys(kind) == other.keys(kind) != []
        for name in one.keys(kind):
            assert torch.equal(one.tensor(f"{kind}/{name}"), other.tensor(f"{kind}/{name}")), f"{kind}/{name}"
    assert not list((killed / "checkpoints").glob("*.damaged*"))
    print(f"killed {KILLS} times, {inside} of them inside a save; {STEPS} steps bit for bit")
