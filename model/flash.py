"""Attention by FlashAttention 4, where it is installed.

It is some percent faster than cuDNN, which torch attends with (benchmarks/README.md), and its backward pass can add up
in a fixed order. Where bits must repeat, what torch takes is seven times slower at heads of 192 and 128.
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
    """Whether queries and keys [..., d] and values [..., v] are of a kind that it takes."""
    if not (q.is_cuda and q.dtype == torch.bfloat16):
        return False
    fits = all(size <= LARGEST_HEAD and size % HEAD_MULTIPLE == 0 for size in (q.shape[-1], v.shape[-1]))
    return fits and is_installed()


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: [B, S, H, d] twice and [B, S, H, v] to [B, S, H, v]."""
    from flash_attn.cute import flash_attn_func

    repeats = torch.are_deterministic_algorithms_enabled()
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=repeats)[0]
    return out
