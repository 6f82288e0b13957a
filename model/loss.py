"""Cross-entropy over a large vocabulary, in pieces, so that the logits of all tokens never exist at once.

The gradient of the mean over T tokens is known up to the scalar that the backward pass brings,

    d loss / d logits = (softmax(logits) − onehot(label)) / T,

so it overwrites each piece of logits at once, and is multiplied with the weight and with the states while it is there.
The forward pass does all three products, each once, and keeps the gradients of states and weight in place of logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.products import add_product, product_in_fp32


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int) -> Tensor:
    """Mean of −log softmax(hidden Wᵀ)[label] in nats: hidden [..., D], weight [V, D], labels [...] to a scalar in fp32.

    Takes `chunk_size` tokens at a time. Logits and their gradient are rounded to the dtype of `hidden`, as those of a
    linear layer are; all between them is fp32, and so is the sum of the weight's gradient over pieces.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        result: Tensor = _CrossEntropy.apply(hidden, weight, labels, chunk_size)
        return result
    pieces = zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    return torch.cat([token_losses(F.linear(rows, weight), targets) for rows, targets in pieces]).mean()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(logits)[label] in fp32: [T, V] and [T] to [T]."""
    if logits.is_cuda:
        from model.kernels import cross_entropy as kernels

        return kernels.token_losses(logits, labels)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def losses_and_gradient(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The same; logits are overwritten with the gradient of their loss, times `scale`."""
    if logits.is_cuda:
        from model.kernels import cross_entropy as kernels

        return kernels.losses_and_gradient(logits, labels, scale)
    values = logits.float().log_softmax(-1)
    losses = -values.gather(-1, labels[:, None]).squeeze(-1)
    gradient = values.exp_().scatter_add_(-1, labels[:, None], values.new_full((len(labels), 1), -1.0))
    logits.copy_(gradient.mul_(scale))
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), chunk_size):
            piece = slice(start, start + chunk_size)
            logits = F.linear(hidden[piece], weight)
            losses[piece] = losses_and_gradient(logits, labels[piece], 1.0 / len(labels))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[piece])
            if needs_weight:
                grad_weight = _add(grad_weight, logits.t(), hidden[piece], is_all=chunk_size >= len(labels))
            del logits  # before the next ones are made
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = (None if kept is None else kept * grad for kept in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None


def _add(total: Tensor | None, a: Tensor, b: Tensor, *, is_all: bool) -> Tensor:
    """total + a b in fp32, in place; or that product alone, in its own dtype, if it `is_all` there is to add."""
    if is_all:
        return a @ b
    if total is None:
        return product_in_fp32(a, b)
    add_product(total, a, b)
    return total
