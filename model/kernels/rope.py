"""Queries and keys of multi-head latent attention where they lie: rotary positions turned in place, and keys put
together from each head's own part and the rotary part that all heads share."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # values of a tensor that a program holds at a time


def rotate_(x: Tensor, table: Tensor, *, rotary_dim: int, inverse: bool = False) -> None:
    """Turns in place the last `rotary_dim` = P values of each head of x [B, S, H, N + P], in pairs (2i, 2i+1), by the
    cos and sin of `table` [S, P/2, 2] in fp32, or back by them. Only the last dimension of x must be dense."""
    assert x.stride(-1) == 1, x.stride()
    assert table.is_contiguous(), table.stride()
    batch, length, num_heads, width = x.shape
    if x.numel() == 0 or rotary_dim == 0:
        return
    block = triton.next_power_of_2(rotary_dim)
    heads = min(triton.next_power_of_2(num_heads), max(TILE // block, 1))
    tokens = max(TILE // (block * heads), 1)
    _rotate_kernel[(triton.cdiv(batch * length, tokens), triton.cdiv(num_heads, heads))](
        x, table, batch * length, length, num_heads, *x.stride()[:3],
        OFFSET=width - rotary_dim, SIZE=rotary_dim, INVERSE=inverse,
        TOKENS=tokens, HEADS=heads, PAIRS=block // 2, num_warps=4,
    )  # fmt: skip


def make_keys(kv: Tensor, k_rope: Tensor, nope_dim: int) -> Tensor:
    """Keys [B, S, H, N + P]: the first N = `nope_dim` values of each head of kv [B, S, H, N + V], and k_rope [B, S, P],
    already turned, for every head. Only the last dimensions must be dense."""
    assert kv.stride(-1) == k_rope.stride(-1) == 1, (kv.stride(), k_rope.stride())
    batch, length, num_heads, _ = kv.shape
    rotary_dim = k_rope.shape[-1]
    keys = kv.new_empty(batch, length, num_heads, nope_dim + rotary_dim)
    if keys.numel():
        heads, nope_block, rope_block = _head_tile(num_heads, nope_dim, rotary_dim)
        _keys_kernel[(batch * length, triton.cdiv(num_heads, heads))](
            kv, k_rope, keys, length, num_heads, *kv.stride()[:3], *k_rope.stride()[:2],
            NOPE=nope_dim, ROPE=rotary_dim, HEADS=heads, NOPE_BLOCK=nope_block, ROPE_BLOCK=rope_block, num_warps=8,
        )  # fmt: skip
    return keys


def make_keys_backward(grad_k: Tensor, grad_v: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
    """Gradients of kv [B, S, H, N + V] and k_rope [B, S, P] from those of keys [B, S, H, N + P] and values
    [B, S, H, V]; that of k_rope is the sum over heads, in fp32. Only the last dimensions must be dense."""
    assert grad_k.stride(-1) == grad_v.stride(-1) == 1, (grad_k.stride(), grad_v.stride())
    batch, length, num_heads, width = grad_k.shape
    rotary_dim, value_dim = width - nope_dim, grad_v.shape[-1]
    grad_kv = grad_k.new_empty(batch, length, num_heads, nope_dim + value_dim)
    grad_rope = grad_k.new_empty(batch, length, rotary_dim)
    if batch * length:
        heads, nope_block, rope_block = _head_tile(num_heads, nope_dim, rotary_dim)
        _keys_backward_kernel[(batch * length,)](
            grad_k, grad_v, grad_kv, grad_rope, length, num_heads, *grad_k.stride()[:3], *grad_v.stride()[:3],
            NOPE=nope_dim, ROPE=rotary_dim, VALUE=value_dim, HEADS=heads, NOPE_BLOCK=nope_block,
            ROPE_BLOCK=rope_block, VALUE_BLOCK=triton.next_power_of_2(value_dim), num_warps=4,
        )  # fmt: skip
    return grad_kv, grad_rope


def _head_tile(num_heads: int, nope_dim: int, rotary_dim: int) -> tuple[int, int, int]:
    """Heads that a program takes at a time, and the two parts of a head as powers of two."""
    nope_block, rope_block = (triton.next_power_of_2(max(size, 1)) for size in (nope_dim, rotary_dim))
    return min(triton.next_power_of_2(num_heads), max(TILE // nope_block, 1)), nope_block, rope_block


@triton.jit(do_not_specialize=["num_tokens", "length"])
def _rotate_kernel(
    x: tl.tensor, table: tl.tensor, num_tokens: tl.tensor, length: tl.tensor, num_heads: tl.tensor,
    batch_stride: tl.tensor, step: tl.tensor, head_stride: tl.tensor,
    OFFSET: tl.constexpr, SIZE: tl.constexpr, INVERSE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, 2 * PAIRS)
    position = token % length
    real = (token < num_tokens)[:, None] & (channel < SIZE)[None, :]
    angles = tl.load(table + position[:, None] * SIZE + channel[None, :], mask=real, other=0.0)
    cos, sin = tl.split(tl.reshape(angles, (TOKENS, PAIRS, 2)))
    if INVERSE:
        sin = -sin

    start = (token // length).to(tl.int64) * batch_stride + position.to(tl.int64) * step
    at = x + start[:, None, None] + head.to(tl.int64)[None, :, None] * head_stride + OFFSET + channel[None, None, :]
    mask = real[:, None, :] & (head < num_heads)[None, :, None]
    pairs = tl.reshape(tl.load(at, mask=mask, other=0.0).to(tl.float32), (TOKENS, HEADS, PAIRS, 2))
    even, odd = tl.split(pairs)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    tl.store(at, tl.reshape(turned, (TOKENS, HEADS, 2 * PAIRS)), mask=mask)


@triton.jit(do_not_specialize=["length"])
def _keys_kernel(
    kv: tl.tensor, k_rope: tl.tensor, keys: tl.tensor, length: tl.tensor, num_heads: tl.tensor,
    batch_stride: tl.tensor, step: tl.tensor, head_stride: tl.tensor,
    rope_batch_stride: tl.tensor, rope_step: tl.tensor,
    NOPE: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    batch, position = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    nope, rope = tl.arange(0, NOPE_BLOCK)[None, :], tl.arange(0, ROPE_BLOCK)[None, :]
    out = keys + (token * num_heads + head) * (NOPE + ROPE)
    here = head < num_heads
    own = tl.load(
        kv + batch * batch_stride + position * step + head * head_stride + nope, mask=here & (nope < NOPE), other=0.0
    )
    shared = tl.load(k_rope + batch * rope_batch_stride + position * rope_step + rope, mask=rope < ROPE, other=0.0)
    tl.store(out + nope, own, mask=here & (nope < NOPE))
    tl.store(out + NOPE + rope, tl.broadcast_to(shared, (HEADS, ROPE_BLOCK)), mask=here & (rope < ROPE))


@triton.jit(do_not_specialize=["length"])
def _keys_backward_kernel(
    grad_k: tl.tensor, grad_v: tl.tensor, grad_kv: tl.tensor, grad_rope: tl.tensor, length: tl.tensor,
    num_heads: tl.tensor,
    k_batch_stride: tl.tensor, k_step: tl.tensor, k_head_stride: tl.tensor, v_batch_stride: tl.tensor,
    v_step: tl.tensor, v_head_stride: tl.tensor,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, HEADS: tl.constexpr,
    NOPE_BLOCK: tl.constexpr, ROPE_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    batch, position = (tl.program_id(0) // length).to(tl.int64), (tl.program_id(0) % length).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    nope, rope, value = tl.arange(0, NOPE_BLOCK), tl.arange(0, ROPE_BLOCK), tl.arange(0, VALUE_BLOCK)
    total = tl.zeros((HEADS, ROPE_BLOCK), dtype=tl.float32)
    for first in range(0, num_heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
        here = head < num_heads
        of_key = grad_k + batch * k_batch_stride + position * k_step + head * k_head_stride
        of_value = grad_v + batch * v_batch_stride + position * v_step + head * v_head_stride
        out = grad_kv + (token * num_heads + head) * (NOPE + VALUE)
        own = tl.load(of_key + nope[None, :], mask=here & (nope < NOPE)[None, :], other=0.0)
        values = tl.load(of_value + value[None, :], mask=here & (value < VALUE)[None, :], other=0.0)
        shared = tl.load(of_key + NOPE + rope[None, :], mask=here & (rope < ROPE)[None, :], other=0.0)
        tl.store(out + nope[None, :], own, mask=here & (nope < NOPE)[None, :])
        tl.store(out + NOPE + value[None, :], values, mask=here & (value < VALUE)[None, :])
        total += shared.to(tl.float32)
    tl.store(grad_rope + token * ROPE + rope, tl.sum(total, axis=0), mask=rope < ROPE)
