"""A forward pass in segments, with communication between them, and its backward pass.

Autograd runs a backward pass in one go, in which communication hides under nothing. Here a forward pass is cut where
something is sent: each segment is an autograd graph of its own, its inputs detached, and a `Tape` keeps what the
backward pass needs, in order. Both passes are generators that yield whenever a transfer has been launched and not yet
waited for, so whoever drives two of them in turns hides the transfers of one under the computation of the other:

    attend ─ count ─ yield ─ launch ─ yield ─ experts ─ launch ─ yield ─ combine          forward
    combine ─ launch ─ yield ─ experts ─ launch ─ yield ─ their weights ─ yield ─ attend  backward

Both have three turns a layer for each hop of rows, on all ranks alike, and more where rows go in rounds or a part is
run again. A layer without experts pauses as often, but only as far as the other pass has more turns in which something
is under way. What a turn launches travels while the other pass has its turn; and when the host waits for counts, the
device has the other's work to do.

Tensors that pass between segments are leaves. A leaf adds up the gradients of all segments that use it.
"""

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from model.linear import WeightGradients, Work

T = TypeVar("T")
Turn = Literal["under way", "pause"]
UNDER_WAY: Final = "under way"
PAUSE: Final = "pause"
Steps = Generator[Turn, None, T]
"""A pass that yields when one of its turns ends: why."""
TURNS_A_LAYER: Final = 3
"""For each hop of rows."""


class TurnCounts(NamedTuple):
    """How many turns of a pass end while something is under way, and how many in a pause."""

    under_way: int
    pauses: int


class Flight(Protocol):
    """A transfer under way."""

    def wait(self) -> tuple[Tensor, ...]:
        """What arrived, for the current stream, which waits for it on a GPU."""
        ...


class Exchange(Protocol):
    """A transfer between ranks, and the transfer of its gradients the other way, of those that have any."""

    def send(self, *tensors: Tensor) -> Flight:
        """Launches the transfer."""
        ...

    def send_gradients(self, *gradients: Tensor) -> Flight:
        """Launches the transfer of the gradients of what arrived; they arrive as those of what was sent."""
        ...


@dataclass
class _Segment:
    """The end of a segment: its results, and the leaves or the constant that their gradients come from. `weights_last`:
    its weight gradients may wait until the gradients of its inputs are under way."""

    results: list[Tensor]
    gradients: list[Tensor | float]
    weights_last: bool = False


@dataclass
class Transfer:
    """An exchange on the tape: which of its tensors have gradients, and those of them that were sent and arrived."""

    exchange: Exchange
    flight: Flight | None
    have_gradients: tuple[bool, ...]
    sent: tuple[Tensor, ...]
    arrived: tuple[Tensor, ...] = field(default=())
    returning: Flight | None = None


@dataclass
class _Launched:
    transfer: Transfer


@dataclass
class _Arrived:
    transfer: Transfer


@dataclass
class _Pause:
    """A turn for the other pass, in which nothing is under way."""


@dataclass
class _Again:
    """A part of the forward pass that is run again when its gradient is needed."""

    part: "Part"
    inputs: tuple[Tensor, ...]
    out: Tensor


Part = Callable[..., Steps[Tensor]]


class Tape:
    """Records one forward pass; `backward` consumes it. A tape that is not `recording` only cuts and sends. Without
    `weight_gradients` none come last."""

    def __init__(self, *, recording: bool = True, weight_gradients: WeightGradients | None = None) -> None:
        self.recording = recording
        self._weight_gradients = weight_gradients
        self._records: list[_Segment | _Launched | _Arrived | _Pause | _Again] = []

    def cut(
        self, *tensors: Tensor, roots: Iterable[tuple[Tensor, float]] = (), weights_last: bool = False
    ) -> tuple[Tensor, ...]:
        """Ends a segment: returns its results as leaves. `roots` are further results, scalars, each with the constant
        that is its gradient. With `weights_last` the backward pass computes gradients of weights when it has next sent
        others, as a rule those of what arrived for the segment."""
        if not self.recording:
            return tuple(tensor.detach() for tensor in tensors)
        leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors)
        segment = _Segment([], [], weights_last)
        ends: list[tuple[Tensor, Tensor | float]] = [*zip(tensors, leaves, strict=True), *roots]
        for tensor, gradient in ends:
            if tensor.requires_grad:
                segment.results.append(tensor)
                segment.gradients.append(gradient)
        self._records.append(segment)
        return leaves

    def launch(self, exchange: Exchange, *leaves: Tensor) -> Transfer:
        """Launches the transfer of leaves, and of tensors that have no gradient."""
        flight = exchange.send(*(leaf.detach() for leaf in leaves))
        have_gradients = tuple(leaf.requires_grad for leaf in leaves)
        transfer = Transfer(exchange, flight, have_gradients, tuple(compress(leaves, have_gradients)))
        if self.recording:
            self._records.append(_Launched(transfer))
        return transfer

    def arrive(self, transfer: Transfer) -> tuple[Tensor, ...]:
        """Waits for a transfer; returns what arrived, as leaves."""
        assert transfer.flight is not None
        arrived = transfer.flight.wait()
        transfer.flight = None
        if not self.recording:
            return arrived
        transfer.arrived = tuple(tensor.requires_grad_() for tensor in compress(arrived, transfer.have_gradients))
        self._records.append(_Arrived(transfer))
        return arrived

    def pause(self) -> Steps[None]:
        """Ends a turn in both passes. To be called right after a cut."""
        if self.recording:
            self._records.append(_Pause())
        yield PAUSE

    def run_twice(self, part: Part, *leaves: Tensor) -> Steps[Tensor]:
        """Runs part(tape, *leaves), a part of the forward pass that ends in a leaf, keeping nothing but its inputs; the
        backward pass runs it again, transfers included."""
        out = yield from without_gradients(part(Tape(recording=False), *leaves))
        if self.recording:
            out.requires_grad_()
            self._records.append(_Again(part, leaves, out))
        return out

    def backward(self) -> Steps[None]:
        """Runs the records backwards. Gradients of the results must lie in the `grad` of the last leaves; those of the
        inputs appear in the `grad` of theirs."""
        late: list[Work] | None = None
        while self._records:
            record = self._records.pop()
            if isinstance(record, _Segment):
                if record.weights_last:
                    assert late is None
                    late = self._run_without_weights(record)
                else:
                    _run_segment(record)
            elif isinstance(record, _Arrived):
                transfer = record.transfer
                transfer.returning = transfer.exchange.send_gradients(*map(_gradient, transfer.arrived))
                transfer.arrived = ()
            elif isinstance(record, _Launched):
                yield UNDER_WAY
                if late is not None:
                    while late:
                        late.pop(0)()
                    late = None
                    yield UNDER_WAY
                assert record.transfer.returning is not None
                for leaf, gradient in zip(record.transfer.sent, record.transfer.returning.wait(), strict=True):
                    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            elif isinstance(record, _Pause):
                yield PAUSE
            else:
                yield from self._run_again(record)
        assert late is None

    def _run_without_weights(self, segment: _Segment) -> list[Work]:
        """Runs all of a segment but weight gradients; returns these: an empty list where they wait for longer, may not
        wait, or there are none. Their turn is taken all the same, so that all ranks take as many."""
        gradients = self._weight_gradients
        if gradients is None or gradients.deferring:
            _run_segment(segment)
            return []
        gradients.deferring = True
        try:
            _run_segment(segment)
        finally:
            gradients.deferring = False
        return gradients.take()

    def _run_again(self, record: _Again) -> Steps[None]:
        tape = Tape(weight_gradients=self._weight_gradients)
        out = yield from record.part(tape, *record.inputs)
        out.grad, record.out.grad = record.out.grad, None
        yield from tape.backward()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _run_segment(segment: _Segment) -> None:
    results, gradients = [], []
    for result, gradient in zip(segment.results, segment.gradients, strict=True):
        if isinstance(gradient, float):
            results.append(result)
            gradients.append(torch.full_like(result, gradient))
        elif gradient.grad is not None:
            results.append(result)
            gradients.append(gradient.grad)
            gradient.grad = None
    if results:
        torch.autograd.backward(results, gradients)


def without_gradients(steps: Steps[T]) -> Steps[T]:
    """The same pass outside autograd, which stays on for whatever runs in its turns."""
    while True:
        with torch.no_grad():
            try:
                turn = next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
        yield turn


def run_to_end(steps: Steps[T]) -> T:
    """Runs a pass by itself: nothing but weight gradients of experts lies beside its transfers."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def run_in_turns(one: Steps[Any], other: Steps[T]) -> T:
    """Runs two passes in turns, switching where a transfer is under way; returns what the second gives. A backward pass
    is to be the first: then all that it sends travels beside the larger part of the forward pass."""
    results: list[Any] = [None, None]
    running = {0: one, 1: other}
    while running:
        for number in list(running):
            try:
                next(running[number])
            except StopIteration as end:
                results[number] = end.value
                del running[number]
    result: T = results[1]
    return result


def pauses_left_out(backward: TurnCounts, forward: TurnCounts) -> tuple[range, range]:
    """Which of their pauses, by number, a backward and a forward pass leave out that run in turns, so that neither
    pauses while the other has nothing under way. They keep those that are next to layers with experts: layers without
    come first."""
    most = max(backward.under_way, forward.under_way)
    kept = [min(most - counts.under_way, counts.pauses) for counts in (backward, forward)]
    return range(kept[0], backward.pauses), range(forward.pauses - kept[1])


def leave_out(steps: Steps[T], pauses: range) -> Steps[T]:
    """The same pass without some of its pauses."""
    number = 0
    while True:
        try:
            turn = next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        number += turn == PAUSE
        if turn != PAUSE or number - 1 not in pauses:
            yield turn
