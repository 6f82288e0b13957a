"""Ends a run that makes no progress though all ranks are alive: one waits for data or for a lock, or ranks wait for
each other. The heartbeat finds ranks that are gone; this finds those that are there and do nothing.

As a step needs all ranks, all come to a stop together and each finds it out by itself. Each writes the stacks of its
threads, then ends.
"""

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.heartbeat import Silence, end_process
from parallel.launch import Place

# For others, who may have begun the step later, to write their stacks.
GRACE_S = 5.0


def stacks_file(folder: Path, rank: int) -> Path:
    """Where the stacks of a rank are written."""
    return folder / f"stacks-{rank:05d}.txt"


def write_stacks(folder: Path, rank: int, why: str) -> None:
    """Appends what all threads of this process are doing to the rank's file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(stacks_file(folder, rank), "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}: {why}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
    except OSError as error:
        print(f"pretrain: rank {rank}: its stacks cannot be written: {error}", file=sys.stderr, flush=True)


class Progress:
    """Counts what the main thread has got done."""

    def __init__(self) -> None:
        self.count = 0

    def made(self) -> None:
        """Something is done; the time begins anew."""
        self.count += 1


@contextmanager
def watch_progress(place: Place, folder: Path, timeout: float, *, grace: float = GRACE_S) -> Iterator[Progress]:
    """While the block runs, `timeout` seconds without progress end the process with LOST_RANK_STATUS, its stacks in
    `folder`. Time in which the process was suspended does not count."""
    progress, fired, ended = Progress(), threading.Event(), threading.Event()

    def watch() -> None:
        interval = min(1.0, timeout / 10)
        silence = Silence(2 * interval)
        while not ended.wait(interval):
            if silence.look(progress.count) >= timeout:
                fired.set()
                why = f"no progress for {timeout:g} s (guards.timeout)"
                write_stacks(folder, place.rank, why)
                if not ended.wait(grace):
                    where = f"what its threads did is in {stacks_file(folder, place.rank)}"
                    end_process(f"{why}; {where}; the same command resumes from the newest checkpoint", place.rank)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield progress
    except BaseException:
        # Another rank ended first, which the collective took for a lost one. The thread has more to say.
        if fired.is_set():
            thread.join()
        raise
    finally:
        ended.set()
