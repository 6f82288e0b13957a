"""A device without a GPU for `parallel.peer_copies`: streams are threads, and memory that ranks share is a file."""

import ctypes
import mmap
import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist

from parallel import peer_copies

WAIT_S, MOST_LATE_S = 10.0, 0.002


class Stream:
    """Does what it is given in order, each a little late; `cuda_stream` is itself, for the driver."""

    def __init__(self, *_: object, **__: object) -> None:
        self.cuda_stream = self
        self._work = queue.Queue[Callable[[], object]]()
        self._chance = random.Random(id(self))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            time.sleep(self._chance.random() * MOST_LATE_S)
            work()

    def give(self, work: Callable[[], object]) -> tuple[int]:
        self._work.put(work)
        return (0,)

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.give(event.set)
        return event

    def wait_event(self, event: threading.Event) -> None:
        self.give(lambda: wait_until(event.is_set))

    def wait_stream(self, other: "Stream | Computing") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        wait_until(self.record_event().is_set)


class Computing:
    """The stream of a CPU, whose work is done when it has been launched."""

    def record_event(self) -> threading.Event:
        event = threading.Event()
        event.set()
        return event

    def wait_event(self, event: threading.Event) -> None:
        wait_until(event.is_set)


class Driver:
    """The operations that are used, on addresses of this process."""

    @staticmethod
    def cuStreamWriteValue32(stream: Stream, address: int, value: int, _: int) -> tuple[int]:
        return stream.give(lambda: setattr(ctypes.c_uint32.from_address(address), "value", value))

    @staticmethod
    def cuStreamWaitValue32(stream: Stream, address: int, value: int, _: int) -> tuple[int]:
        def is_there() -> bool:
            return ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value >= 0

        return stream.give(lambda: wait_until(is_there))

    @staticmethod
    def cuMemcpyDtoDAsync(to: int, source: int, num_bytes: int, stream: Stream) -> tuple[int]:
        return stream.give(partial(ctypes.memmove, to, source, num_bytes))


class Shared:
    """As `PeerMemory`, in files of `folder`."""

    folder: Path
    numbers = count()

    def __init__(self, num_bytes: int, group: dist.ProcessGroup) -> None:
        self.num_bytes, number = num_bytes, next(self.numbers)
        self._group = group
        (self.folder / f"{number}-{dist.get_rank()}").write_bytes(bytes(num_bytes))
        dist.barrier(group)
        self._maps = [self._map(number, rank) for rank in dist.get_process_group_ranks(group)]
        self.addresses = [int(np.frombuffer(each, np.uint8).ctypes.data) for each in self._maps]

    def close(self) -> None:
        self.addresses = []
        self._maps = []
        dist.barrier(self._group)

    def _map(self, number: int, rank: int) -> mmap.mmap:
        with open(self.folder / f"{number}-{rank}", "r+b") as file:
            return mmap.mmap(file.fileno(), self.num_bytes)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "a stream waits in vain"
        time.sleep(0.0001)


def use_in_this_process(folder: Path) -> None:
    """Lets `PeerCopies` run here without a GPU; `folder` is the same on all ranks."""
    Shared.folder = folder
    computing = Computing()
    torch.cuda.Stream, torch.cuda.current_stream = Stream, lambda *_: computing  # type: ignore[misc,assignment]
    peer_copies.PeerMemory, peer_copies.driver = Shared, lambda: Driver  # type: ignore[misc,assignment]
