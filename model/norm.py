"""RMSNorm, y = w · x / √(mean(x²) + ε), computed in fp32 whatever the dtype of x.

The backward pass, with r = 1/√(mean(x²) + ε), x̂ = x r and g = w · dy, is dx = r (g − x̂ · mean(g · x̂)) and
dw = Σ dy · x̂, so nothing but x and r is kept. Where the input is a sum, the sum is part of the same pass over memory.
"""

from typing import Any, overload

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalises the last dimension; shape and dtype are kept."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., size] to [..., size]; or with an update of x, both x + update and that normalised."""
        if update is None:
            normed: Tensor = _Norm.apply(x, self.weight, self.eps)
            return normed
        results: tuple[Tensor, Tensor] = _NormOfSum.apply(x, update, self.weight, self.eps)
        return results


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale = ctx.saved_tensors
        return *_gradients(grad, x, ctx.weight, scale, None), None


class _NormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.is_cuda:
            from model.kernels.norm import add_rms_norm

            rows = x.flatten(0, -2), update.flatten(0, -2)
            residual, normed, scale = add_rms_norm(*rows, weight, eps)
            residual, normed = residual.view(x.shape), normed.view(x.shape)
        else:
            residual = x + update
            normed, scale = _normalize(residual, weight, eps)
        ctx.save_for_backward(residual, scale)
        ctx.weight = weight
        return residual, normed

    @staticmethod
    def backward(ctx: Any, grad_residual: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        residual, scale = ctx.saved_tensors
        grad_x, grad_weight = _gradients(grad, residual, ctx.weight, scale, grad_residual)
        return grad_x, grad_x, grad_weight, None


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and r, one for each row, in fp32."""
    if x.is_cuda:
        from model.kernels.norm import rms_norm

        normed, scale = rms_norm(x.flatten(0, -2), weight, eps)
        return normed.view(x.shape), scale
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.float()).to(x.dtype), scale


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, grad_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx, with the gradient that x has besides, and dw."""
    if x.is_cuda:
        from model.kernels.norm import rms_norm_backward

        beside = None if grad_residual is None else grad_residual.flatten(0, -2)
        grad_x, grad_weight = rms_norm_backward(grad.flatten(0, -2), x.flatten(0, -2), weight, scale, beside)
        return grad_x.view(x.shape), grad_weight.to(weight.dtype)
    unit, wide_grad = x.float() * scale, grad.float()
    weighted = wide_grad * weight.float()
    grad_x = scale * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + grad_residual.float()
    return grad_x.to(x.dtype), (wide_grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
