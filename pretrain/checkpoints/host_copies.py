"""Copies of tensors in memory of the host that is kept from one time to the next, pinned for those of a GPU.

Memory that is new has to be found page by page, and pinned: seconds for every 10 GB. Threads do that, as early as
`prepare` is called. One pins what others find, segment by segment, because meanwhile the driver launches no kernel.
"""

import ctypes
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

_ALIGNMENT = 64
_PAGE = 4096
_SEGMENT = 2**28
_FINDERS = 4


class HostCopies:
    """Room for one copy of each of some tensors."""

    def __init__(self) -> None:
        self._room: _Room | None = None
        self._copied: torch.cuda.Event | None = None

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Has a thread take the room for copies of tensors of such sizes, unless it is there."""
        self._lay_out(tensors)

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """Where the copy of each begins, in a room that is large enough for all."""
        places, size = {}, 0
        for key, tensor in tensors.items():
            places[key] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._room is None or size > self._room.size:
            # The old room first, or there would be both for a moment.
            self._room = None
            self._room = _Room(size, next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None))
        return places

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, which are there after `wait`, of the tensors as the device's work so far leaves them. Those of the
        time before are gone. Raises what went wrong when the room was taken."""
        places = self._lay_out(tensors)
        assert self._room is not None
        try:
            room = self._room.wait()
        except Exception:
            self._room = None
            raise
        copies = {}
        for key, tensor in tensors.items():
            _copy(tensor, room, places[key])
            copies[key] = room[places[key] : places[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return copies

    def wait(self) -> None:
        """Until the copies are there. Any thread may wait."""
        if self._copied is not None:
            self._copied.synchronize()


@dataclass
class _Taken:
    """What a thread has taken so far: memory, of which some segments are `pinned`, or an error; until `given_up`."""

    room: Tensor | None = None
    pinned: list[int] = field(default_factory=list)
    error: Exception | None = None
    given_up: bool = False


class _Room:
    """So many bytes that a thread takes, pinned for a GPU if one is given. A segment that cannot be pinned stays as it
    is: copies to it are slower."""

    def __init__(self, size: int, gpu: torch.device | None) -> None:
        self.size, self._taken = size, _Taken()
        self._thread = threading.Thread(target=_take, args=(size, gpu, self._taken), daemon=True)
        self._thread.start()
        weakref.finalize(self, _give_up, self._thread, self._taken)
        weakref.finalize(self, _give_back, self._thread, self._taken).atexit = False

    def wait(self) -> Tensor:
        """All of it. Raises what kept the thread from taking it."""
        self._thread.join()
        if self._taken.error is not None:
            raise self._taken.error
        assert self._taken.room is not None
        return self._taken.room


def _copy(tensor: Tensor, room: Tensor, begin: int) -> None:
    """Launches the copy of a tensor to a room's bytes from `begin` on. Each part of it lies in one segment, as what is
    pinned in two pieces is not copied in one."""
    source = tensor.detach().reshape(-1).view(torch.uint8)
    end = begin + len(source)
    edges = [begin, *range(begin - begin % _SEGMENT + _SEGMENT, end, _SEGMENT), end]
    for first, last in pairwise(edges):
        room[first:last].copy_(source[first - begin : last - begin], non_blocking=True)


def _take(size: int, gpu: torch.device | None, taken: _Taken) -> None:
    try:
        memory = torch.empty(size + _PAGE, dtype=torch.uint8)
        begin = -memory.data_ptr() % _PAGE
        room = memory[begin : begin + size]
        if gpu is not None:
            torch.cuda.set_device(gpu)
        with closing(_found(room.split(_SEGMENT), taken)) as segments:
            for segment in segments:
                if gpu is not None and _pin(segment):
                    taken.pinned.append(segment.data_ptr())
        if taken.given_up:
            return
        taken.room = room
    except Exception as error:
        taken.error = error


def _found(segments: Sequence[Tensor], taken: _Taken) -> Generator[Tensor, None, None]:
    """Segments in order, once threads have had all their pages found; until it is given up, and no thread works on."""
    events = [threading.Event() for _ in segments]

    def find(first: int) -> None:
        for segment, found in zip(segments[first::_FINDERS], events[first::_FINDERS], strict=True):
            try:
                if not taken.given_up:
                    # torch would do it in threads of its own.
                    ctypes.memset(segment.data_ptr(), 0, len(segment))
            finally:
                found.set()

    finders = []
    try:
        for first in range(_FINDERS):
            finder = threading.Thread(target=find, args=(first,), daemon=True)
            finder.start()
            finders.append(finder)
        for segment, found in zip(segments, events, strict=True):
            found.wait()
            if not taken.given_up:
                yield segment
    finally:
        # Whatever went wrong, no thread works on when it is known.
        taken.given_up |= not all(found.is_set() for found in events)
        for finder in finders:
            finder.join()


def _pin(segment: Tensor) -> bool:
    return int(torch.cuda.cudart().cudaHostRegister(segment.data_ptr(), len(segment), 0)) == 0


def _give_up(thread: threading.Thread, taken: _Taken) -> None:
    """At the end of the process, too, which a thread in the middle of its work may abort."""
    taken.given_up = True
    thread.join()


def _give_back(thread: threading.Thread, taken: _Taken) -> None:
    _give_up(thread, taken)
    for pointer in taken.pinned:
        torch.cuda.cudart().cudaHostUnregister(pointer)
