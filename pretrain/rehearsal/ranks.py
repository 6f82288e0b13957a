"""The ranks of a rehearsal: forked processes of this machine that train one stretch, and never outlive their parent.

They find each other as ranks that srun starts do. Each is the leader of a session of its own, so that Ctrl-C reaches
the parent alone, which ends them; and each waits for the end of a pipe that only the parent holds open, which comes
however the parent ends.
"""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from parallel.launch import Place, join_processes, leave_processes
from parallel.zero import load_deepspeed
from pretrain.config import Config
from pretrain.loop import train

_TICK_S = 0.25
# What the others may still have to say when one has failed.
_LAST_WORDS_S = 2.0


class RankError(Exception):
    """A rank that did not train its stretch to the end; the message says which and why."""


def load() -> None:
    """Imports once what each rank would take seconds to import for itself: optimizers need the compiler. GPUs are
    hidden, from DeepSpeed too."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    load_deepspeed()
    import_module("torch._inductor.compile_fx")
    import_module("torch.utils.tensorboard")


def train_on_ranks(config: Config, world_size: int, output: Path, tick: Callable[[], None]) -> None:
    """Trains with one process a rank until the configuration's end. What they print goes to the file `output`; `tick`
    is called a few times a second. Raises RankError; all processes have ended when this returns or raises."""
    context = get_context("fork")
    alive, held = context.Pipe(duplex=False)
    port = _free_port()
    ranks: dict[Connection, ForkProcess] = {}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            others = (held, ours, *ranks)
            process = context.Process(
                target=_rank_main, args=(config, rank, world_size, port, output, theirs, alive, others)
            )
            process.start()
            theirs.close()
            ranks[ours] = process
        _wait(ranks, tick)
    finally:
        for process in ranks.values():
            process.kill()
        for ours, process in ranks.items():
            process.join()
            ours.close()
        held.close()
        alive.close()


def _wait(ranks: dict[Connection, ForkProcess], tick: Callable[[], None]) -> None:
    waiting = {ours: rank for rank, ours in enumerate(ranks)}
    failures: list[str] = []
    deadline = float("inf")
    while waiting and time.monotonic() < deadline:
        for ours in connection.wait(list(waiting), _TICK_S):
            assert isinstance(ours, Connection)
            rank = waiting.pop(ours)
            said = _answer(ours, ranks[ours])
            if said:
                failures.append(f"rank {rank}: {said}")
                deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
        tick()
    if failures:
        raise RankError(failures[0])


def _answer(ours: Connection, process: ForkProcess) -> str:
    """What a rank said went wrong; nothing if all went well."""
    try:
        return str(ours.recv())
    except (EOFError, ConnectionError):
        process.join()
        return f"died with exit status {process.exitcode}, most likely for lack of memory"


def _rank_main(
    config: Config,
    rank: int,
    world_size: int,
    port: int,
    output: Path,
    sender: Connection,
    alive: Connection,
    others: tuple[Connection, ...],
) -> None:
    # Without this, the first parallel region of a forked process can wait for threads that only its parent has.
    torch.set_num_threads(1)
    os.setsid()
    for other in others:
        other.close()
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    _print_to(output)
    said = ""
    try:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        place = Place(rank, world_size, rank, torch.device("cpu"), world_size)
        join_processes(place)
        said = "" if train(config, place) else "was asked to stop"
        leave_processes()
    except BaseException as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        with suppress(OSError):
            sender.send(said)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Skips the parent's exit handlers, which are not this process's to run.
        os._exit(0 if not said else 1)


def _end_with_parent(alive: Connection) -> None:
    with suppress(OSError, EOFError):
        alive.poll(None)
    os._exit(1)


def _print_to(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
