"""Kernels against plain torch in fp64, at sizes that the caller chooses: few under Triton's interpreter, real ones on a
GPU. Each check returns what the kernels gave, to be compared with another run of the same."""

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values, the same for the same arguments."""
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def rows_apart(num_rows: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows that lie further apart than their size, as those of a split do."""
    return random(num_rows, size + 16, dtype=dtype, seed=seed)[:, :size]


def check(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounded once to `dtype` from what fp32 arithmetic gives. The interpreter cuts off where a GPU rounds, so there it
    may be one unit in the last place off instead of half a unit."""
    assert (actual.dtype, actual.shape) == (dtype, exact.shape)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 0.0
    relative = (unit if DEVICE.type == "cpu" else unit / 2) + 4e-6
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(actual.double(), exact, rtol=relative, atol=2e-6 * scale)


def check_norm(num_rows: int, size: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    """The norm with and without the addition, and both gradients."""
    from model.kernels.norm import add_rms_norm, rms_norm, rms_norm_backward

    x, update, grad, grad_residual = (rows_apart(num_rows, size, dtype, seed) for seed in range(4))
    weight = 1 + random(size, dtype=weight_dtype, seed=4) / 4
    y, rstd = rms_norm(x, weight, EPS)
    exact_rstd = (x.double().square().mean(1) + EPS).rsqrt()
    check(rstd, exact_rstd, torch.float32)
    check(y, weight.double() * x.double() * exact_rstd[:, None], dtype)

    residual, y_after, rstd_after = add_rms_norm(x, update, weight, EPS)
    check(residual, x.double() + update.double(), dtype)
    for of_sum, alone in zip((y_after, rstd_after), rms_norm(residual, weight, EPS), strict=True):
        torch.testing.assert_close(of_sum, alone, rtol=0, atol=0)

    outputs = [y, rstd, residual, y_after, rstd_after]
    normal = x.double() * exact_rstd[:, None]
    inner = weight.double() * grad.double()
    exact = (inner - normal * (inner * normal).mean(1, keepdim=True)) * exact_rstd[:, None]
    for added in (None, grad_residual):
        grad_x, grad_weight = rms_norm_backward(grad, x, weight, rstd, added)
        check(grad_x, exact if added is None else exact + added.double(), dtype)
        check(grad_weight, (grad.double() * normal).sum(0), torch.float32)
        outputs += [grad_x, grad_weight]
    return outputs


def check_swiglu(num_rows: int, size: int, dtype: torch.dtype, *, weighted: bool) -> list[Tensor]:
    """Forward, and the gradient with and without the result."""
    from model.kernels.swiglu import swiglu, swiglu_backward

    gate_up = 2 * random(num_rows, 2 * size, dtype=dtype)
    grad = random(num_rows, size, dtype=dtype, seed=1)
    weights = random(num_rows, seed=2).abs() if weighted else None
    gate, up = gate_up.double().chunk(2, dim=1)
    factor = 1.0 if weights is None else weights.double()[:, None]
    silu, slope = gate * gate.sigmoid(), gate.sigmoid() * (1 + gate * (1 - gate.sigmoid()))
    result = swiglu(gate_up, weights)
    check(result, factor * silu * up, dtype)
    outputs = [result]
    for with_result in (False, True):
        grad_gate_up, grad_weights, again = swiglu_backward(grad, gate_up, weights, with_result=with_result)
        exact = torch.cat((grad.double() * factor * up * slope, grad.double() * factor * silu), dim=1)
        check(grad_gate_up, exact, dtype)
        assert (grad_weights is None, again is None) == (not weighted, not with_result)
        if grad_weights is not None:
            check(grad_weights, (grad.double() * silu * up).sum(1), torch.float32)
        if again is not None:
            torch.testing.assert_close(again, result, rtol=0, atol=0)
        outputs += [each for each in (grad_gate_up, grad_weights, again) if each is not None]
    return outputs


def check_sum_rows(
    num_rows: int, num_tokens: int, num_slots: int, size: int, dtype: torch.dtype, num_addends: int
) -> list[Tensor]:
    """Sums over slots, of which some stand for no row."""
    from model.kernels.permute import sum_rows

    rows = random(num_rows, size, dtype=dtype)
    generator = torch.Generator(DEVICE).manual_seed(1)
    slots = torch.randint(num_rows + 1, (num_tokens, num_slots), generator=generator, device=DEVICE)
    if num_tokens:
        slots[0] = num_rows + 7
    addends = tuple(random(num_tokens, size, dtype=dtype, seed=2 + i) for i in range(num_addends))
    result = sum_rows(rows, slots, addends)
    padded = torch.cat((rows, rows.new_zeros(1, size))).double()
    exact = torch.zeros(num_tokens, size, dtype=torch.float64, device=DEVICE)
    for column in slots.clamp(max=num_rows).unbind(1):
        exact += padded[column]
    check(result, sum((addend.double() for addend in addends), exact), dtype)
    return [result]


def draw_choices(kind: str, num_choices: int, num_experts: int) -> Tensor:
    """Choices [N] of experts, of which `num_experts` means none."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    choices = torch.randint(num_experts + 1, (num_choices,), generator=generator, device=DEVICE)
    if kind == "one expert":
        return torch.full_like(choices, num_experts // 2)
    if kind == "none":
        return torch.full_like(choices, num_experts)
    if kind == "skewed":
        return torch.minimum(choices, choices.flip(0)) // 3
    assert kind == "even"
    return choices


def check_places(kind: str, num_choices: int, num_experts: int) -> list[Tensor]:
    """The counting sort against a stable sort."""
    from model.kernels.permute import count_and_place

    experts = draw_choices(kind, num_choices, num_experts)
    places, order, counts = count_and_place(experts, num_experts)
    expected = experts.argsort(stable=True)
    inverse = torch.empty_like(expected)
    inverse[expected] = torch.arange(num_choices, device=DEVICE)
    expected_counts = torch.bincount(experts, minlength=num_experts + 1)[:num_experts]
    for actual, wanted in zip((places, order, counts), (inverse, expected, expected_counts), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    return [places, order, counts]


def turned(x: Tensor, table: Tensor, *, inverse: bool) -> Tensor:
    """The pairs of x [B, S, H, P] as complex numbers times cos + i sin, or its conjugate."""
    turn = torch.view_as_complex(table.double())[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * (turn.conj() if inverse else turn)).flatten(-2)


def check_rotation(
    shape: tuple[int, int, int, int], rotary_dim: int, dtype: torch.dtype, *, heads_first: bool
) -> list[Tensor]:
    """Turned in place and, from the same start, back; x [B, S, H, N + P] lies as [B, H, S, N + P] if so wanted."""
    from model.kernels.rope import rotate_

    batch, length, num_heads, width = shape
    angles = 10 * random(length, rotary_dim // 2)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    outputs = []
    for inverse in (False, True):
        if heads_first:
            x = random(batch, num_heads, length, width, dtype=dtype).transpose(1, 2)
        else:
            x = random(batch, length, num_heads, width + 8, dtype=dtype)[..., :width]
        before = x.clone()
        rotate_(x, table, rotary_dim=rotary_dim, inverse=inverse)
        kept = width - rotary_dim
        torch.testing.assert_close(x[..., :kept], before[..., :kept], rtol=0, atol=0)
        check(x[..., kept:], turned(before[..., kept:], table, inverse=inverse), dtype)
        outputs.append(x)
    return outputs


def check_keys(
    batch: int, length: int, num_heads: int, dims: tuple[int, int, int], dtype: torch.dtype, *, heads_first: bool
) -> list[Tensor]:
    """Keys from parts, exactly, and their gradients; `dims` are those of a head: N, P and V."""
    from model.kernels.rope import make_keys, make_keys_backward

    nope, rope, value = dims
    kv = random(batch, length, num_heads, nope + value, dtype=dtype)
    k_rope = random(batch, length, 24 + rope, dtype=dtype, seed=1)[..., 24:]
    keys = make_keys(kv, k_rope, nope)
    assert keys.is_contiguous()
    shared = k_rope.unsqueeze(2).expand(-1, -1, num_heads, -1)
    torch.testing.assert_close(keys, torch.cat((kv[..., :nope], shared), dim=-1), rtol=0, atol=0)

    def gradient(width: int, seed: int) -> Tensor:
        if heads_first:
            return random(batch, num_heads, length, width, dtype=dtype, seed=seed).transpose(1, 2)
        return random(batch, length, num_heads, width + 8, dtype=dtype, seed=seed)[..., :width]

    grad_k, grad_v = gradient(nope + rope, 2), gradient(value, 3)
    grad_kv, grad_rope = make_keys_backward(grad_k, grad_v, nope)
    assert grad_kv.is_contiguous()
    torch.testing.assert_close(grad_kv, torch.cat((grad_k[..., :nope], grad_v), dim=-1), rtol=0, atol=0)
    check(grad_rope, grad_k[..., nope:].double().sum(2), dtype)
    return [keys, grad_kv, grad_rope]


def check_fp8_rows(num_rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Packed rows and what comes back: on a GPU those of plain torch to the bit. The interpreter cuts codes off, and
    halves the few that should become the next power of two. Some rows are zeros, some begin with a group of zeros."""
    from model import packing
    from model.kernels.fp8_rows import decode_rows, encode_rows

    rows = random(num_rows, width, dtype=dtype)
    rows[: num_rows // 3] = 0
    rows[1::4, :128] = 0
    packed = encode_rows(rows)
    back = decode_rows(packed, width, dtype)
    plain = packing.encode_rows(rows.cpu())
    assert (packed.dtype, packed.shape) == (plain.dtype, plain.shape)
    codes, scales = packing.codes_and_scales(packed)
    assert torch.equal(scales.cpu(), packing.codes_and_scales(plain)[1])
    assert not codes[:, width:].float().any()
    if DEVICE.type == "cuda":
        assert torch.equal(packed.cpu(), plain)
        assert torch.equal(back.cpu(), packing.decode_rows(plain, width, dtype))
    assert torch.equal(decode_rows(packed, width, torch.float32).cpu(), packing.decode_rows(packed.cpu(), width))
    lost = (back.double() - rows.double()).abs()
    step = scales.repeat_interleave(128, 1)[:, :width].double() * 2**-9
    assert (lost <= rows.double().abs() / 2 + step).all()
    assert (lost > rows.double().abs() / 8 + step).sum() <= 0.05 * rows.numel()
    return [packed, back]
