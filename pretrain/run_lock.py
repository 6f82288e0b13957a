"""One run in a folder at a time: two that wrote the same metrics and checkpoints would spoil both."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from parallel.launch import Place
from pretrain.assemble import failing_together
from pretrain.errors import UserError

LOCK = "lock"
PATIENCE_S = 30.0


@contextmanager
def holding_together(folder: Path, place: Place) -> Iterator[None]:
    """The first process holds a run's folder for all. Raises SharedError, on all ranks, where it cannot."""
    with ExitStack() as held:
        with failing_together():
            if place.is_first:
                held.enter_context(holding(folder))
        yield


@contextmanager
def holding(folder: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Holds a run's folder. The system lets it go when this process ends, however it ends. Raises UserError where
    another process has it after `patience_s`, which those take that were killed a moment ago."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        _lock(file, folder, patience_s)
        yield


def _lock(file: IO[str], folder: Path, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise UserError(
                    f"{folder} is in use by {holder}; wait for that run or stop it, or give this one another run.name"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            print(f"pretrain: {folder} is not locked against a second run: {error}", file=sys.stderr)
            return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
