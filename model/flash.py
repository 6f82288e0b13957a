"""Attention by FlashAttention 4, for runs that have to repeat their bits.

torch attends with cuDNN, which is as fast, but not where algorithms must be deterministic. What it takes then is seven
times slower at heads of 192 and 128 (benchmarks/README.md); FlashAttention's backward pass can add up in a fixed order.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

LARGEST_HEAD, HEAD_MULTIPLE = 256, 8


@lru_cache
def is_installed() -> bool:
    """Whether it can be imported, and this GPU has its kernels for heads of any size."""
    return _is_importable() and torch.cuda.get_device_capability()[0] == 9


def _is_importable() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def can_attend(q: Tensor, v: Tensor) -> bool:
    """Whether queries and keys [..., d] and values [..., v] are of a kind that it takes, where bits must repeat."""
    if not (q.is_cuda and q.dtype == torch.bfloat16 and torch.are_deterministic_algorithms_enabled()):
        return False
    fits = all(size <= LARGEST_HEAD and size % HEAD_MULTIPLE == 0 for size in (q.shape[-1], v.shape[-1]))
    return fits and is_installed()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: [B, S, H, d] twice and [B, S, H, v] to [B, S, H, v]."""
    from flash_attn.cute import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=True)[0]
    return out
