"""All-to-alls of rows within a node by the copy engines of its GPUs.

NCCL carries rows with kernels: they wait for multiprocessors that products hold, then keep them from products. Here a
rank lays out what leaves in its outbox, memory that the others of its group can read, and each takes what is for it.
Copies run on copy engines. What ranks tell one another is a number, which one writes into the memory of another and a
stream there waits for. So no kernel runs, and the host waits for nothing but an outbox that grows.

    one stream:      when all have taken n − 2: outbox ← rows that leave; to all others: n is ready; copy rows that stay
    another stream:  for each of the others: when its n is ready: rows ← its outbox; to it: n is taken

for transfer n: an outbox has two parts, used in turn. All ranks launch the same transfers in the same order, as for
NCCL. Outboxes grow, on all ranks together, when one is too small.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.peer_memory import PeerMemory, done, driver
from parallel.tape import Flight
from parallel.transfer import Traffic

NUM_PARTS = 2
ALIGNMENT = 1 << 8
"""Bytes, of which what lies in an outbox begins at a multiple."""
HEADROOM = 1.125
"""As counts differ a little from one transfer to the next, an outbox that grows gets more than it needs by this."""
READY, TAKEN = 0, 1


class PeerCopies:
    """Carries rows among the ranks of a group whose GPUs reach one another (`find_obstacle`)."""

    name = "copy engines"
    needs_multiprocessors = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._size, self._place = dist.get_world_size(group), dist.get_rank(group)
        # Not all take from the same one at once.
        self._others = [(self._place + turn) % self._size for turn in range(1, self._size)]
        self._giving, self._taking = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._signals = PeerMemory(2 * self._size * 4, group)
        self._outboxes = PeerMemory(NUM_PARTS * ALIGNMENT, group)
        self._number = 0

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, beside tensors."""
        return self._signals.num_bytes + self._outboxes.num_bytes

    def launch(self, traffic: Traffic, tensors: Sequence[Tensor]) -> Flight:
        """Launches the transfer of tensors [rows, ...], all of as many rows."""
        goods = _Goods(traffic, tensors)
        self._make_room(max(goods.ends))
        self._number += 1
        current = torch.cuda.current_stream(self._device)
        for stream in (self._giving, self._taking):
            stream.wait_stream(current)
        self._give(goods)
        for member in self._others:
            self._take(goods, member)
        self._taking.wait_stream(self._giving)
        return _InCopies(goods.sent, goods.arrived, self._taking.record_event())

    def close(self) -> None:
        """Gives all memory back. All ranks must, when what they launched has arrived."""
        self._taking.synchronize()
        for memory in (self._signals, self._outboxes):
            memory.close()

    def _give(self, goods: "_Goods") -> None:
        """Lays out what leaves; then copies what stays, while others take."""
        for member in self._others:
            self._wait(TAKEN, member, self._number - NUM_PARTS, self._giving)
        own, *leaving = goods.traffic.leaving(self._place)
        begin = self._part_of(self._place)
        for tensor, width, offset in zip(goods.sent, goods.widths, goods.begins[self._place], strict=True):
            _copy(begin + offset, tensor.data_ptr() + own * width, sum(leaving) * width, self._giving)
        for member in self._others:
            self._tell(READY, member, self._giving)
        for tensor, arrived, width in zip(goods.sent, goods.arrived, goods.widths, strict=True):
            _copy(arrived.data_ptr(), tensor.data_ptr(), own * width, self._giving)

    def _take(self, goods: "_Goods", member: int) -> None:
        """Takes what a member has laid out for this one."""
        self._wait(READY, member, self._number, self._taking)
        num_rows = goods.traffic.rows[member][self._place]
        before, here = goods.rows_before(member)
        begin = self._part_of(member)
        for arrived, width, offset in zip(goods.arrived, goods.widths, goods.begins[member], strict=True):
            _copy(arrived.data_ptr() + here * width, begin + offset + before * width, num_rows * width, self._taking)
        self._tell(TAKEN, member, self._taking)

    def _part_of(self, member: int) -> int:
        """The address of the part of a member's outbox that is in turn."""
        size = self._outboxes.num_bytes // NUM_PARTS
        return self._outboxes.addresses[member] + self._number % NUM_PARTS * size

    def _make_room(self, num_bytes: int) -> None:
        """Sees that each part of an outbox has so many bytes, which are the same on all ranks."""
        if NUM_PARTS * num_bytes > self._outboxes.num_bytes:
            self._taking.synchronize()
            self._outboxes.close()
            # The new ones are not of torch's allocator, which does not make room for them by itself.
            torch.cuda.empty_cache()
            self._outboxes = PeerMemory(round(NUM_PARTS * HEADROOM * num_bytes), self._group)

    def _tell(self, what: int, member: int, stream: torch.cuda.Stream) -> None:
        address = self._signals.addresses[member] + 4 * (what * self._size + self._place)
        done(driver().cuStreamWriteValue32(stream.cuda_stream, address, self._number & 0xFFFFFFFF, 0))

    def _wait(self, what: int, member: int, number: int, stream: torch.cuda.Stream) -> None:
        """Until a member has told the number or a later one, which the driver compares as integers that wrap round."""
        address = self._signals.addresses[self._place] + 4 * (what * self._size + member)
        done(driver().cuStreamWaitValue32(stream.cuda_stream, address, max(number, 0) & 0xFFFFFFFF, 0))


class _Goods:
    """What a transfer brings: `sent` and `arrived`, tensors of `widths` bytes a row; where each begins in the outbox of
    each member, and where the last ends."""

    def __init__(self, traffic: Traffic, tensors: Sequence[Tensor]) -> None:
        self.traffic, self.sent = traffic, [tensor.contiguous() for tensor in tensors]
        self._arriving = traffic.reversed()
        size = sum(self._arriving.rows[traffic.place])
        self.arrived = tuple(tensor.new_empty(size, *tensor.shape[1:]) for tensor in tensors)
        self.widths = [tensor.element_size() * prod(tensor.shape[1:]) for tensor in tensors]
        layouts = [self._lay_out(member) for member in range(len(traffic.rows))]
        self.begins, self.ends = [layout[:-1] for layout in layouts], [layout[-1] for layout in layouts]

    def _lay_out(self, member: int) -> list[int]:
        _, *leaving = self.traffic.leaving(member)
        edges = [0]
        for width in self.widths:
            edges.append(-(-(edges[-1] + sum(leaving) * width) // ALIGNMENT) * ALIGNMENT)
        return edges

    def rows_before(self, member: int) -> tuple[int, int]:
        """How many rows lie before those from a member: in its outbox, and among what arrived here."""
        place = self.traffic.place
        _, *there = self.traffic.leaving(member)
        here = self._arriving.leaving(place)
        # Both are in order of the other members.
        return sum(there[: place - (member < place)]), sum(here[: 1 + member - (place < member)])


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


def _copy(to: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    if num_bytes:
        done(driver().cuMemcpyDtoDAsync(to, source, num_bytes, stream.cuda_stream))
