"""All-to-alls of rows: plain, or with the rows on their way in FP8.

Rows lie in order of member, this rank's own before all others'. Who carries them is another matter: the group's backend
does, or within a node the copy engines of its GPUs (`parallel.peer_copies`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from model.packing import decode_rows, encode_rows
from parallel.clock import Clock
from parallel.tape import Flight


@dataclass(frozen=True)
class Traffic:
    """How many rows go from each member of a group to each other, `rows[from][to]`; this rank is the one at `place`."""

    rows: Sequence[Sequence[int]]
    place: int

    def leaving(self, member: int) -> list[int]:
        """The rows that leave a member: its own, then those to each of the others in order."""
        to = self.rows[member]
        return [to[member], *to[:member], *to[member + 1 :]]

    def reversed(self) -> "Traffic":
        """The way back."""
        return Traffic(list(zip(*self.rows, strict=True)), self.place)


class Carrier(Protocol):
    """Brings rows to the members of a group. All members launch the same transfers in the same order. It says whether
    it needs multiprocessors, which products hold for long; its name for users; and how many bytes of the device's
    memory it keeps, beside tensors."""

    name: str
    needs_multiprocessors: bool

    @property
    def num_bytes(self) -> int: ...

    def launch(self, traffic: Traffic, tensors: Sequence[Tensor]) -> Flight:
        """Launches the transfer of tensors [rows, ...], all of as many rows."""
        ...

    def close(self) -> None:
        """Gives back what it keeps. All members must, when what they launched has arrived."""


class AllToAll:
    """A transfer of rows; gradients go the other way."""

    def __init__(self, carrier: Carrier, traffic: Traffic, clock: Clock) -> None:
        self._carrier, self._traffic, self._clock = carrier, traffic, clock

    def send(self, *tensors: Tensor) -> Flight:
        """Launches the transfer of tensors [rows, ...]. `clock` hears of waiting for it."""
        return _Awaited(self._carrier.launch(self._traffic, tensors), self._clock)

    def send_gradients(self, *gradients: Tensor) -> Flight:
        """Launches the transfer of the gradients of what arrived."""
        return self.reversed().send(*gradients)

    def reversed(self) -> "AllToAll":
        """The way back."""
        return AllToAll(self._carrier, self._traffic.reversed(), self._clock)


class Fp8AllToAll(AllToAll):
    """The same with the first tensor, rows [R, D], packed: E4M3 with a scale for every 128 values of a row, in half the
    bytes of BF16. The way back and gradients are not quantised (report, section 3.3.3)."""

    def send(self, *tensors: Tensor) -> Flight:
        """Launches the transfer; the rows arrive rounded, in their dtype."""
        rows, *others = tensors
        return _PackedInFlight(super().send(encode_rows(rows), *others), rows)


@dataclass(frozen=True)
class _Awaited:
    """A transfer under way, for which the clock hears of waiting."""

    flight: Flight
    clock: Clock

    def wait(self) -> tuple[Tensor, ...]:
        with self.clock.phase("all_to_all"):
            return self.flight.wait()


class _PackedInFlight:
    """Packed rows under way, before other tensors."""

    def __init__(self, flight: Flight, like: Tensor) -> None:
        self._flight, self._width, self._dtype = flight, like.shape[1], like.dtype

    def wait(self) -> tuple[Tensor, ...]:
        packed, *others = self._flight.wait()
        return decode_rows(packed, self._width, self._dtype), *others


class Collectives:
    """Carries rows by the all-to-all of the group's backend, all but a rank's own: NCCL would take these through the
    same few multiprocessors as the others, so they are copied."""

    name = "collectives"
    needs_multiprocessors = True
    num_bytes = 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def launch(self, traffic: Traffic, tensors: Sequence[Tensor]) -> Flight:
        """Launches one all-to-all for each tensor."""
        return _InCollectives(self._group, traffic, tensors)

    def close(self) -> None:
        """Nothing."""


class _InCollectives:
    """All-to-alls under way."""

    def __init__(self, group: dist.ProcessGroup, traffic: Traffic, tensors: Sequence[Tensor]) -> None:
        place = traffic.place
        own, *leaving = traffic.leaving(place)
        _, *arriving = traffic.reversed().leaving(place)
        for others in (leaving, arriving):
            others.insert(place, 0)
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._arrived = tuple(tensor.new_empty(own + sum(arriving), *tensor.shape[1:]) for tensor in tensors)
        pairs = list(zip(self._arrived, self._sent, strict=True))
        self._works = [
            dist.all_to_all_single(out[own:], sent[own:], arriving, leaving, group=group, async_op=True)
            for out, sent in pairs
        ]
        for out, sent in pairs:
            out[:own].copy_(sent[:own])
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived, in the order of what was sent, for the current stream, whichever launched it."""
        for work in self._works:
            work.wait()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        self._sent.clear()
        return self._arrived
