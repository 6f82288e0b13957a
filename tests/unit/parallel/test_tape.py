"""Segments on a tape against plain autograd, with an exchange that goes nowhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.linear import WeightGradients
from parallel.tape import Steps, Tape, run_in_turns, run_to_end, without_gradients


class Loopback:
    """Sends to itself, and writes down what happens."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def send(self, *tensors: Tensor) -> Any:
        return self._fly("forward", tensors)

    def send_gradients(self, *gradients: Tensor) -> Any:
        return self._fly("backward", gradients)

    def _fly(self, way: str, tensors: tuple[Tensor, ...]) -> Any:
        self.events.append(f"launch {self.name} {way}")
        events, name = self.events, self.name

        class Flight:
            def wait(self) -> tuple[Tensor, ...]:
                events.append(f"wait {name} {way}")
                return tuple(tensor.clone() for tensor in tensors)

        return Flight()


def one_pass(tape: Tape, x: Tensor, w: Tensor, exchange: Loopback) -> Steps[Tensor]:
    """y = relu(x w) · sum(x) + x, the product sent; a root with gradient 0.5 beside it."""
    (h, skip) = tape.cut(x @ w, x * 1.0, roots=[(x.square().sum(), 0.5)])
    transfer = tape.launch(exchange, h)
    yield
    (h,) = tape.arrive(transfer)
    (out,) = tape.cut(h.relu() * skip.sum() + skip)
    return out


def plain(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = (x @ w).relu() * x.sum() + x
    ((y * grad).sum() + 0.5 * x.square().sum()).backward()
    return y.detach(), x.grad, w.grad


def inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3))


def twice(tape: Tape, x: Tensor, w: Tensor, exchange: Loopback) -> Steps[Tensor]:
    return tape.run_twice(lambda tape, x: one_pass(tape, x, w, exchange), x)


@pytest.mark.parametrize("run", [one_pass, twice])
def test_the_same_as_autograd(run: Callable[..., Steps[Tensor]]) -> None:
    x, w, grad = inputs(0)
    expected = plain(x, w, grad)
    tape, x, w = Tape(), x.requires_grad_(), w.requires_grad_()
    out = run_to_end(run(tape, x, w, Loopback([], "a")))
    out.grad = grad
    run_to_end(tape.backward())
    for ours, theirs in zip((out.detach(), x.grad, w.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_passes_in_turns_hide_each_others_transfers() -> None:
    events: list[str] = []
    (x, w, grad), (x2, w2, _) = inputs(0), inputs(1)
    tape, x, w = Tape(), x.requires_grad_(), w.requires_grad_()
    out = run_to_end(one_pass(tape, x, w, Loopback([], "a")))
    out.grad = grad
    other = Tape()
    result = run_in_turns(_named(tape, events), one_pass(other, x2.requires_grad_(), w2, Loopback(events, "f")))
    assert events == ["launch b", "launch f forward", "wait b", "wait f forward"]
    torch.testing.assert_close(result.detach(), plain(x2.detach(), w2, grad)[0])
    torch.testing.assert_close(x.grad, plain(x.detach(), w.detach(), grad)[1])


def _named(tape: Tape, events: list[str]) -> Steps[None]:
    backward = tape.backward()
    next(backward)
    events.append("launch b")
    yield
    for _ in backward:
        yield
    events.append("wait b")


class _Product(torch.autograd.Function):
    """x w, whose gradient for w may wait."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: nn.Parameter, later: WeightGradients, events: list[str]) -> Tensor:
        ctx.x, ctx.w, ctx.later, ctx.events = x.detach(), w, later, events
        return x.detach() @ w.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        def of_weight() -> Tensor:
            ctx.events.append("weight")
            return ctx.x.mT @ grad

        return grad @ ctx.w.detach().mT, ctx.later.gradient(ctx.w, of_weight), None, None


@pytest.mark.parametrize("waits", ["for what is sent", "for the end", "never"])
def test_weight_gradients_come_after_what_is_sent(waits: str) -> None:
    """Or later, where all of a pass wait; or at once, where none may. Turns are as many, and gradients the same."""
    x, matrix, grad = inputs(0)
    w, later, events = nn.Parameter(matrix.clone()), WeightGradients(), []
    tape = Tape(weight_gradients=None if waits == "never" else later)
    exchange = Loopback(events, "a")
    (leaf,) = tape.cut(x.requires_grad_())
    (arrived,) = tape.arrive(tape.launch(exchange, leaf))
    (out,) = tape.cut(_Product.apply(arrived, w, later, events), weights_last=True)
    out.grad = grad
    events.clear()
    later.deferring = waits == "for the end"
    for _ in tape.backward():
        events.append("turn")
    later.deferring = False
    for work in later.take():
        work()
    assert (
        events
        == {
            "for what is sent": ["launch a backward", "turn", "weight", "turn", "wait a backward"],
            "for the end": ["launch a backward", "turn", "turn", "wait a backward", "weight"],
            "never": ["weight", "launch a backward", "turn", "turn", "wait a backward"],
        }[waits]
    )
    torch.testing.assert_close(x.grad, grad @ matrix.mT)
    torch.testing.assert_close(w.grad, x.detach().mT @ grad)


def test_gradients_stay_on_for_whoever_has_the_other_turns() -> None:
    def quiet() -> Steps[None]:
        assert not torch.is_grad_enabled()
        yield
        assert not torch.is_grad_enabled()

    steps = without_gradients(quiet())
    next(steps)
    assert torch.is_grad_enabled()
    run_to_end(steps)


def test_a_forgotten_root_is_seen() -> None:
    """A planted fault: without its root the gradient differs."""
    x, w, grad = inputs(0)
    expected = plain(x, w, grad)
    tape, x, w = Tape(), x.requires_grad_(), w.requires_grad_()
    out = run_to_end(one_pass(tape, x, w, Loopback([], "a")))
    segment = tape._records[0]
    del segment.results[-1], segment.gradients[-1]
    out.grad = grad
    run_to_end(tape.backward())
    assert not torch.allclose(x.grad, expected[1])
