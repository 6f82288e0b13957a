"""All-to-alls of rows: plain, or with the rows on their way in FP8.

Rows lie in order of member, this rank's own before all others'. Own rows are copied: NCCL would carry them through the
same few multiprocessors as the others.
"""

from collections.abc import Sequence

from torch import Tensor
from torch import distributed as dist

from model.packing import decode_rows, encode_rows
from parallel.clock import Clock


class AllToAll:
    """`leaving` rows to each member of a group, `arriving` rows from each, this rank first and then the others in
    order; gradients go the other way."""

    def __init__(self, group: dist.ProcessGroup, leaving: Sequence[int], arriving: Sequence[int], clock: Clock) -> None:
        self._group, self._leaving, self._arriving, self._clock = group, list(leaving), list(arriving), clock

    def send(self, *tensors: Tensor) -> "TensorsInFlight":
        """Launches the transfer of tensors [rows, ...]."""
        return TensorsInFlight(self._group, tensors, self._leaving, self._arriving, self._clock)

    def send_gradients(self, *gradients: Tensor) -> "TensorsInFlight":
        """Launches the transfer of the gradients of what arrived."""
        return self.reversed().send(*gradients)

    def reversed(self) -> "AllToAll":
        """The way back."""
        return AllToAll(self._group, self._arriving, self._leaving, self._clock)


class Fp8AllToAll(AllToAll):
    """The same with the first tensor, rows [R, D], packed: E4M3 with a scale for every 128 values of a row, in half the
    bytes of BF16. The way back and gradients are not quantised (report, section 3.3.3)."""

    def send(self, *tensors: Tensor) -> "_RowsInFlight":  # type: ignore[override]
        """Launches the transfer; the rows arrive rounded, in their dtype."""
        rows, *others = tensors
        return _RowsInFlight(super().send(encode_rows(rows), *others), rows)


class TensorsInFlight:
    """All-to-alls under way."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        tensors: Sequence[Tensor],
        leaving: list[int],
        arriving: list[int],
        clock: Clock,
    ) -> None:
        (own, *others_leaving), (_, *others_arriving) = leaving, arriving
        place = dist.get_rank(group)
        others_leaving.insert(place, 0)
        others_arriving.insert(place, 0)
        self._clock = clock
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._arrived = tuple(tensor.new_empty(sum(arriving), *tensor.shape[1:]) for tensor in tensors)
        pairs = list(zip(self._arrived, self._sent, strict=True))
        self._works = [
            dist.all_to_all_single(out[own:], sent[own:], others_arriving, others_leaving, group=group, async_op=True)
            for out, sent in pairs
        ]
        for out, sent in pairs:
            out[:own].copy_(sent[:own])

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived, in the order of what was sent."""
        with self._clock.phase("all_to_all"):
            for work in self._works:
                work.wait()
        self._sent.clear()
        return self._arrived


class _RowsInFlight:
    """Packed rows under way, before other tensors."""

    def __init__(self, flight: TensorsInFlight, like: Tensor) -> None:
        self._flight, self._width, self._dtype = flight, like.shape[1], like.dtype

    def wait(self) -> tuple[Tensor, ...]:
        packed, *others = self._flight.wait()
        return decode_rows(packed, self._width, self._dtype), *others
