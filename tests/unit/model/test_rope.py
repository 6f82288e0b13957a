"""Rotary positions against complex numbers, YaRN against the formulas of its paper."""

import math

import pytest
import torch

from model.config import RopeScaling
from model.rope import apply_rotary, rotary_frequencies, rotary_table, rotate_heads_, softmax_scale, yarn_mscale

torch.set_num_threads(1)


def test_rotation_is_a_complex_multiplication() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = rotary_frequencies(8, theta=100.0, scaling=None)
    positions = torch.tensor([0, 1, 2, 30, 1000])
    ours = apply_rotary(x, rotary_table(frequencies, positions, scaling=None))
    angles = positions[:, None].double() * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.double().view(2, 5, 3, 4, 2)) * turns).flatten(-2)
    torch.testing.assert_close(ours.double(), expected, atol=2e-4, rtol=0)


def test_only_the_distance_matters() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    frequencies = rotary_frequencies(16, theta=10000.0, scaling=None)

    def product(query_at: int, key_at: int) -> float:
        tables = [rotary_table(frequencies, torch.tensor([at]), scaling=None) for at in (query_at, key_at)]
        return (apply_rotary(q, tables[0]) * apply_rotary(k, tables[1])).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(8, 3), abs=1e-2)


def test_rotation_keeps_the_dtype_but_not_its_precision() -> None:
    x = torch.randn(1, 3, 1, 8).bfloat16()
    table = rotary_table(rotary_frequencies(8, theta=1e4, scaling=None), torch.arange(3), scaling=None)
    assert apply_rotary(x, table).dtype == torch.bfloat16
    assert torch.equal(apply_rotary(x, table), apply_rotary(x.float(), table).bfloat16())


def test_gradient_is_the_turn_back() -> None:
    table = rotary_table(rotary_frequencies(4, theta=1e4, scaling=None), torch.arange(3), scaling=None)
    x = torch.randn(2, 3, 2, 4, requires_grad=True)
    apply_rotary(x, table).backward(apply_rotary(x.detach(), table))
    torch.testing.assert_close(x.grad, x.detach())


def test_heads_are_turned_in_place() -> None:
    table = rotary_table(rotary_frequencies(4, theta=1e4, scaling=None), torch.arange(3), scaling=None)
    x = torch.randn(2, 3, 2 * 6, requires_grad=True)
    product = x * 1.0
    turned = rotate_heads_(product, table, 6).unflatten(-1, (2, 6))
    assert turned.data_ptr() == product.data_ptr()
    kept, part = x.unflatten(-1, (2, 6)).split([2, 4], -1)
    expected = torch.cat((kept, apply_rotary(part, table)), -1)
    torch.testing.assert_close(turned, expected)
    grad = torch.randn(2, 3, 2, 6)
    (of_expected,) = torch.autograd.grad(expected, x, grad)
    turned.backward(grad.clone())
    torch.testing.assert_close(x.grad, of_expected)


def test_no_yarn_unless_configured() -> None:
    frequencies = rotary_frequencies(64, theta=10000.0, scaling=None)
    torch.testing.assert_close(frequencies.double(), 10000.0 ** (-torch.arange(0, 64, 2).double() / 64))
    assert softmax_scale(192, None) == 192**-0.5
    table = rotary_table(frequencies, torch.arange(4), scaling=None)
    torch.testing.assert_close(table.square().sum(-1), torch.ones(4, 32))


def yarn_by_rotations(dim: int, theta: float, scaling: RopeScaling) -> list[float]:
    """Section 3.2 of the YaRN paper, with its ramp over the pairs' index that the published code uses: a pair that
    turns more than beta_fast times over the original length is kept, less than beta_slow times is interpolated."""
    frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]

    def index_of(rotations: float) -> float:
        # frequency = 2π · rotations / length, solved for i
        return -dim / 2 * math.log(2 * math.pi * rotations / scaling.original_max_position_embeddings) / math.log(theta)

    low = max(math.floor(index_of(scaling.beta_fast)), 0)
    high = min(math.ceil(index_of(scaling.beta_slow)), dim - 1)
    scaled = []
    for i, frequency in enumerate(frequencies):
        if i <= low:
            keep = 1.0
        elif i >= high:
            keep = 0.0
        else:
            keep = (high - i) / (high - low)
        scaled.append(frequency * keep + frequency / scaling.factor * (1 - keep))
    return scaled


@pytest.mark.parametrize("length", [16, 512, 4096])
@pytest.mark.parametrize("factor", [1.0, 4.0, 40.0])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_yarn_frequencies(dim: int, factor: float, length: int) -> None:
    scaling = RopeScaling(factor=factor, original_max_position_embeddings=length)
    ours = rotary_frequencies(dim, theta=10000.0, scaling=scaling)
    torch.testing.assert_close(ours, torch.tensor(yarn_by_rotations(dim, 10000.0, scaling)), atol=0, rtol=1e-5)


def test_yarn_of_the_report() -> None:
    scaling = RopeScaling(factor=40, original_max_position_embeddings=4096)
    plain = rotary_frequencies(64, theta=10000.0, scaling=None)
    ratio = plain / rotary_frequencies(64, theta=10000.0, scaling=scaling)
    # Pair 10 turns 4096 · 10000^(-20/64) / 2π = 36.7 times, pair 23 turns 0.87 times.
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert ((ratio[11:23] > 1) & (ratio[11:23] < 40)).all()
    root_t = 0.1 * math.log(40) + 1
    assert yarn_mscale(40, 1.0) == pytest.approx(root_t)
    assert softmax_scale(192, scaling) == pytest.approx(192**-0.5 * root_t**2)
    # mscale and mscale_all_dim are equal, so the table itself is not scaled.
    table = rotary_table(plain, torch.arange(3), scaling=scaling)
    torch.testing.assert_close(table.square().sum(-1), torch.ones(3, 32))


def test_yarn_scales_the_table_where_the_two_differ() -> None:
    scaling = RopeScaling(factor=4, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)
    table = rotary_table(torch.ones(2), torch.arange(3), scaling=scaling)
    ratio = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    torch.testing.assert_close(table.square().sum(-1).sqrt(), torch.full((3, 2), ratio))
