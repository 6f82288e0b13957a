"""Matrix products of bf16 matrices with results in fp32.

The product of two bf16 numbers is exact in fp32, so on a GPU tensor cores give what the same matrices in fp32 would,
and nothing is converted.
"""

import torch
from torch import Tensor


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32: [m, k] and [k, n] to [m, n]."""
    if _is_mixed(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool = False) -> None:
    """total += a b in fp32, or total = a b if that is the first: [m, n], [m, k] and [k, n]."""
    kept = 0 if is_first else 1
    if _is_mixed(a, b):
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=kept, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=kept)


def _is_mixed(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16
