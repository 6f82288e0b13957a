"""Quantisation against loops over numbers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from model.quantize import (
    E4M3,
    E5M2,
    dequantize_blocks,
    dequantize_tiles,
    encode,
    pad_groups,
    quantize_blocks,
    quantize_tiles,
    scale_of,
)


def nearest(value: float, codes: list[float]) -> float:
    """The code nearest to a number; of two as near, the one whose last bit is zero."""
    best = min(abs(code - value) for code in codes)
    found = [code for code in codes if abs(code - value) == best]
    return found[0] if len(found) == 1 else next(code for code in found if codes.index(code) % 2 == 0)


def codes_of(format: torch.dtype) -> list[float]:
    """All finite magnitudes in order, so that the last bit of a code is that of its place."""
    values = torch.arange(128, dtype=torch.uint8).view(format).float().tolist()
    return [value for value in values if math.isfinite(value)]


def quantize_by_hand(tile: Tensor, *, power_of_two: bool) -> tuple[list[float], float]:
    """The codes of a tile in fp32, as numbers, and their scale_inv."""
    amax = max((abs(value) for value in tile.flatten().tolist()), default=0.0)
    scale = 1.0
    if amax:
        scale = float(torch.tensor(448.0) / torch.tensor(amax))
        scale = torch.finfo(torch.float32).max if math.isinf(scale) else scale
        if power_of_two:
            scale = 2.0 ** math.floor(math.log2(scale))
    codes = codes_of(E4M3)
    scaled = (tile.flatten() * torch.tensor(scale)).tolist()
    return [math.copysign(nearest(min(abs(x), 448.0), codes), x) for x in scaled], float(1 / torch.tensor(scale))


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("size", [128, 130, 300, 5])
def test_tiles_by_hand(size: int, power_of_two: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(4, size, generator=generator) * torch.tensor([[1.0], [1e-20], [3e4], [0.0]])
    codes, scale_inv = quantize_tiles(x, power_of_two=power_of_two)
    assert codes.dtype == E4M3
    assert scale_inv.shape == (4, -(-size // 128))
    for row in range(4):
        for number, tile in enumerate(x[row].split(128)):
            expected, inverse = quantize_by_hand(tile, power_of_two=power_of_two)
            assert codes[row, 128 * number : 128 * number + 128].float().tolist() == expected
            assert float(scale_inv[row, number]) == inverse
    values = dequantize_tiles(quantize_tiles(x, power_of_two=power_of_two))
    assert ((values - x).abs() <= 2**-4 * x.abs() + 2**-10 * scale_inv.repeat_interleave(128, 1)[:, :size]).all()


@pytest.mark.parametrize("power_of_two", [True, False])
def test_blocks_by_hand(power_of_two: bool) -> None:
    weight = torch.randn(2, 130, 257, generator=torch.Generator().manual_seed(0))
    codes, scale_inv = quantize_blocks(weight, power_of_two=power_of_two)
    assert scale_inv.shape == (2, 2, 3)
    values = dequantize_blocks(quantize_blocks(weight, power_of_two=power_of_two))
    for matrix in range(2):
        for i in range(2):
            for j in range(3):
                block = (matrix, slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                expected, inverse = quantize_by_hand(weight[block], power_of_two=power_of_two)
                assert codes[block].float().flatten().tolist() == expected
                assert float(scale_inv[matrix, i, j]) == inverse
                assert torch.equal(values[block], codes[block].float() * inverse)


def test_blocks_serve_both_directions() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    there, back = (quantize_blocks(matrix, power_of_two=True) for matrix in (weight, weight.t()))
    assert torch.equal(there.codes.float(), back.codes.t().float())
    assert torch.equal(there.scale_inv, back.scale_inv.t())


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (448.0, 1.0),
        (449.0, 0.5),
        (1.0, 256.0),
        (1.75, 256.0),
        (1.76, 128.0),
        (0.0, 1.0),
        (math.inf, 1.0),
        (math.nan, 1.0),
        (1e-40, 2.0**127),
        (3.4e38, 2.0**-120),
    ],
)
def test_scales_at_the_edges(amax: float, expected: float) -> None:
    assert float(scale_of(torch.tensor([amax]), E4M3, torch.bfloat16, power_of_two=True)) == expected


def test_the_largest_scale_is_a_number_of_the_input() -> None:
    tiny = torch.tensor([1e-40])
    for source in (torch.bfloat16, torch.float32):
        assert float(scale_of(tiny, E4M3, source, power_of_two=False)) == torch.finfo(source).max


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_encoding_is_to_the_nearest_code_and_ends_at_the_last(format: torch.dtype) -> None:
    codes = codes_of(format)
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 5, 500)
    last = codes[-1]
    expected = [math.copysign(nearest(min(abs(value), last), codes), value) for value in x.tolist()]
    assert encode(x, torch.ones(()), format).float().tolist() == expected
    assert encode(torch.tensor([math.inf, -1e30]), torch.ones(()), format).float().tolist() == [last, -last]


def test_powers_of_two_change_exponents_only() -> None:
    """Numbers of 4 significant bits come back as they were."""
    x = torch.randint(-15, 16, (8, 256)).float() * 2.0 ** torch.randint(-20, 20, (8, 2)).repeat_interleave(128, 1)
    assert torch.equal(dequantize_tiles(quantize_tiles(x, power_of_two=True)), x)


def test_groups_have_whole_tiles() -> None:
    counts = torch.tensor([3, 0, 130, 128])
    rows = torch.arange(1.0, 262.0).unsqueeze(1).expand(-1, 2)
    groups = pad_groups(counts, 261)
    tiles = groups.spread(rows)
    assert tiles.shape == (groups.num_tiles, 128, 2)
    filled = [tile[tile > 0].tolist() for tile in tiles[..., 0]]
    assert [len(tile) for tile in filled] == [3, 128, 2, 128, 0, 0]
    assert list(itertools.chain(*filled)) == rows[:, 0].tolist()
    assert torch.equal(tiles.flatten(0, 1)[groups.places], rows)


@pytest.mark.parametrize("shape", [(0, 130), (130, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, int]) -> None:
    assert dequantize_tiles(quantize_tiles(torch.zeros(shape), power_of_two=True)).shape == shape
