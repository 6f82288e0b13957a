"""All-to-alls of rows within a node by the copy engines of its GPUs.

NCCL carries rows with kernels: they wait for multiprocessors that products hold, then keep them from products. Here a
rank lays out what leaves in its outbox, memory that the others of its group can read, and each takes what is for it.
Copies run on copy engines. What ranks tell one another is a number, which one writes into the memory of another and a
stream there waits for. So no kernel runs, and the host waits for nothing.

    when n − 2 is taken by all: my outbox ← rows; to all others: n is ready
    for each of the others: when its n is ready: rows ← its outbox; to it: n is taken

for transfer n: an outbox has two parts, used in turn. All ranks launch the same transfers in the same order, as for
NCCL. Outboxes grow, on all ranks together, when one is too small.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from platform import node
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.tape import Flight
from parallel.transfer import Traffic

NUM_PARTS = 2
ALIGNMENT, GRANULE = 1 << 8, 1 << 21
"""Bytes: what lies in an outbox begins at a multiple of the one, and one of its parts is a multiple of the other."""
HEADROOM = 1.125
"""As counts differ a little from one transfer to the next, an outbox that grows gets more than it needs by this."""
READY, TAKEN = 0, 1


class PeerCopies:
    """Carries rows among the ranks of a group whose GPUs reach one another (`can_copy`)."""

    needs_multiprocessors = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._size, self._place = dist.get_world_size(group), dist.get_rank(group)
        # Not all take from the same one at once.
        self._others = [(self._place + turn) % self._size for turn in range(1, self._size)]
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._signals = _Shared(2 * self._size * 4, group, device)
        self._outboxes = _Shared(NUM_PARTS * GRANULE, group, device)
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """What this takes of the device's memory; torch's allocator does not count it."""
        return self._outboxes.num_bytes

    def launch(self, traffic: Traffic, tensors: Sequence[Tensor]) -> Flight:
        """Launches the transfer of tensors [rows, ...], all of as many rows."""
        sent = [tensor.contiguous() for tensor in tensors]
        widths = [tensor.element_size() * prod(tensor.shape[1:]) for tensor in sent]
        num_arriving = sum(rows[self._place] for rows in traffic.rows)
        arrived = tuple(tensor.new_empty(num_arriving, *tensor.shape[1:]) for tensor in sent)
        layouts = [_lay_out(sum(traffic.leaving(member)[1:]), widths) for member in range(self._size)]
        self._make_room(max(end for *_, end in layouts))
        self._number += 1
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._give(traffic, sent, widths, layouts[self._place])
        own = traffic.rows[self._place][self._place]
        for tensor, out, width in zip(sent, arrived, widths, strict=True):
            self._copy(out.data_ptr(), tensor.data_ptr(), own * width)
        for member in self._others:
            self._take(traffic, member, arrived, widths, layouts[member])
        return _InCopies(sent, arrived, self._stream.record_event())

    def _give(self, traffic: Traffic, sent: Sequence[Tensor], widths: Sequence[int], layout: Sequence[int]) -> None:
        """Lays out what leaves."""
        for member in self._others:
            self._wait(TAKEN, member, self._number - NUM_PARTS)
        own, *leaving = traffic.leaving(self._place)
        for tensor, width, begin in zip(sent, widths, layout, strict=False):
            self._copy(self._part_of(self._place) + begin, tensor.data_ptr() + own * width, sum(leaving) * width)
        for member in self._others:
            self._tell(READY, member)

    def _take(
        self, traffic: Traffic, member: int, arrived: Sequence[Tensor], widths: Sequence[int], layout: Sequence[int]
    ) -> None:
        """Takes what a member has laid out for this one."""
        self._wait(READY, member, self._number)
        num_rows, before = traffic.rows[member][self._place], _rows_before(traffic, member, self._place)
        way_back = traffic.reversed()
        here = way_back.rows[self._place][self._place] + _rows_before(way_back, self._place, member)
        for out, width, begin in zip(arrived, widths, layout, strict=False):
            there = self._part_of(member) + begin + before * width
            self._copy(out.data_ptr() + here * width, there, num_rows * width)
        self._tell(TAKEN, member)

    def _part_of(self, member: int) -> int:
        """The address of the part of a member's outbox that is in turn."""
        size = self._outboxes.num_bytes // NUM_PARTS
        return self._outboxes.addresses[member] + self._number % NUM_PARTS * size

    def _make_room(self, num_bytes: int) -> None:
        """Sees that each part of an outbox has so many bytes, which are the same on all ranks."""
        if NUM_PARTS * num_bytes > self._outboxes.num_bytes:
            # What others still take from the outbox here lives until they let go of it as well.
            self._stream.synchronize()
            size = -(-round(HEADROOM * num_bytes) // GRANULE) * GRANULE
            self._outboxes = _Shared(NUM_PARTS * size, self._group, self._device)

    def _tell(self, what: int, member: int) -> None:
        address = self._signals.addresses[member] + 4 * (what * self._size + self._place)
        _done(_driver().cuStreamWriteValue32(self._stream.cuda_stream, address, self._number & 0xFFFFFFFF, 0))

    def _wait(self, what: int, member: int, number: int) -> None:
        """Until a member has told the number or a later one, which the driver compares as integers that wrap round."""
        address = self._signals.addresses[self._place] + 4 * (what * self._size + member)
        _done(_driver().cuStreamWaitValue32(self._stream.cuda_stream, address, max(number, 0) & 0xFFFFFFFF, 0))

    def _copy(self, to: int, source: int, num_bytes: int) -> None:
        if num_bytes:
            _done(_driver().cuMemcpyDtoDAsync(to, source, num_bytes, self._stream.cuda_stream))


@dataclass(frozen=True)
class _InCopies:
    """Copies under way, until an event."""

    sent: list[Tensor]
    arrived: tuple[Tensor, ...]
    end: torch.cuda.Event

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived, in the order of what was sent, for the current stream, which waits for it."""
        torch.cuda.current_stream().wait_event(self.end)
        self.sent.clear()
        return self.arrived


class _Shared:
    """Zeros in the memory of each rank of a group, which all of them can read and write: those of each at one of the
    `addresses`. All ranks must make it."""

    def __init__(self, num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        self.num_bytes = num_bytes
        self._memory = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)
        self._handle = symmetric_memory.rendezvous(self._memory, group)
        self.addresses: list[int] = list(self._handle.buffer_ptrs)


def can_copy(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group are on one machine, each with a GPU that reaches the memory of the others'. All of
    them must ask, and learn the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = f"{node()} {boot.read_text() if boot.exists() else ''}", device.type, device.index
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, here, group=group)
    # Ranks that each see one GPU alone all call it the first; torch refuses that, unless it is told otherwise.
    distinct = len(set(places)) == len(places) or os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    reached = device.type == "cuda" and len({place[:2] for place in places}) == 1 and distinct
    reached = reached and all(
        torch.cuda.can_device_access_peer(device.index, index) for *_, index in places if index != device.index
    )
    answers: list[Any] = [None] * len(places)
    dist.all_gather_object(answers, reached, group=group)
    return all(answers)


def _lay_out(num_rows: int, widths: Sequence[int]) -> list[int]:
    """Where tensors of so many rows of `widths` bytes begin in an outbox, and where the last ends."""
    begins = [0]
    for width in widths:
        begins.append(-(-(begins[-1] + num_rows * width) // ALIGNMENT) * ALIGNMENT)
    return begins


def _rows_before(traffic: Traffic, member: int, to: int) -> int:
    """How many rows leave a member for others than itself before those to `to`."""
    rows = traffic.rows[member]
    return sum(rows[:to]) - (rows[member] if member < to else 0)


def _driver() -> Any:
    """CUDA's driver, whose operations on a stream's memory torch does not offer; torch for CUDA brings it."""
    from cuda.bindings import driver

    return driver


def _done(result: tuple[Any, ...]) -> None:
    if result[0] != 0:
        raise RuntimeError(f"CUDA's driver gives {result[0].name} where rows are copied between GPUs")
