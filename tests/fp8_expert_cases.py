"""The kernels of experts in FP8 against the plain rounding of `model.quantize`."""

import itertools

import torch
from torch import Tensor

from model.quantize import (
    PaddedGroups,
    Quantized,
    dequantize_blocks,
    dequantize_tiles,
    pad_groups,
    quantize_blocks,
    quantize_tiles,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter loses bits of a code that a GPU rounds to.
STEP = 0.0 if DEVICE.type == "cuda" else 1 / 2
# Of a sum, relative to that of magnitudes: in the interpreter, that of fp32.
BOUND = 2.0**-11 if DEVICE.type == "cuda" else 2.0**-20


def columns_of(rows: Tensor, groups: PaddedGroups, *, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [D, P] of rows along tokens, their factors [P/128, D], and the values of the codes."""
    tiles = groups.spread(rows).transpose(1, 2)
    quantized = quantize_tiles(tiles.flatten(0, 1), power_of_two=power_of_two)
    of_tiles = (quantized.codes.view(tiles.shape), dequantize_tiles(quantized).view(tiles.shape))
    codes, values = (each.transpose(0, 1).flatten(1).contiguous() for each in of_tiles)
    return codes, quantized.scale_inv.view(tiles.shape[:2]), values


def assert_same_codes(codes: Tensor, expected: Tensor) -> None:
    ours, right = codes.float(), expected.float()
    assert ours.shape == right.shape
    assert ((ours - right).abs() <= STEP * right.abs() + (2.0**-9 if STEP else 0)).all()


def check_rounding(counts: list[int], size: int, *, power_of_two: bool) -> None:
    """Of rows gathered from tokens, in both directions; and of weights."""
    from model.kernels.fp8_quantize import quantize_both, quantize_columns, quantize_rows, quantize_weights

    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(50, size, device=DEVICE, generator=generator).bfloat16()
    x[7] = 0
    if DEVICE.type == "cuda":
        x[8, 3] = 3e38
        x[9] *= 1e-38
    on_device = torch.tensor(counts, device=DEVICE)
    tokens = torch.randint(0, 50, (sum(counts),), device=DEVICE, generator=generator)
    by_rows, along = quantize_both(x, on_device, tokens=tokens, power_of_two=power_of_two)
    for both, quantize in ((by_rows, quantize_rows), (along, quantize_columns)):
        alone = quantize(x, on_device, tokens=tokens, power_of_two=power_of_two)
        assert torch.equal(alone.scale_inv[:1], both.scale_inv[:1])
        assert alone.codes.shape == both.codes.shape
    expected = quantize_tiles(x[tokens], power_of_two=power_of_two)
    assert torch.equal(by_rows.scale_inv.t(), expected.scale_inv)
    assert_same_codes(by_rows.codes, expected.codes)
    groups = pad_groups(on_device, len(tokens))
    used = sum(-(-count // 128) for count in counts)
    codes, scale_inv, _ = columns_of(x[tokens], groups, power_of_two=power_of_two)
    assert torch.equal(along.scale_inv[:used], scale_inv[:used])
    assert_same_codes(along.codes[:, : 128 * used], codes[:, : 128 * used])

    weights = torch.randn(len(counts), size, 256, device=DEVICE, generator=generator).bfloat16()
    ours, transposed = quantize_weights(weights, power_of_two=power_of_two)
    blocks = quantize_blocks(weights, power_of_two=power_of_two)
    assert torch.equal(ours.scale_inv, blocks.scale_inv)
    assert torch.equal(transposed.scale_inv, blocks.scale_inv.transpose(1, 2))
    assert_same_codes(ours.codes, blocks.codes)
    assert torch.equal(transposed.codes.view(torch.uint8), ours.codes.view(torch.uint8).transpose(1, 2))


def check_products(counts: list[int], size: int, width: int, *, is_first: bool) -> None:
    """On given codes: rows times weights, and gradients along tokens times rows; each within 2^-11 of the sum of
    magnitudes, as tensor cores keep 13 bits below the largest of the products of a few steps."""
    from model.kernels.fp8_grouped import add_products_of_columns, multiply_rows
    from model.kernels.fp8_quantize import Codes

    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(sum(counts), size, device=DEVICE, generator=generator).bfloat16()
    grad = torch.randn(sum(counts), width, device=DEVICE, generator=generator).bfloat16()
    weights = torch.randn(len(counts), width, size, device=DEVICE, generator=generator).bfloat16()
    on_device = torch.tensor(counts, device=DEVICE)
    rows, blocks = quantize_tiles(x, power_of_two=True), quantize_blocks(weights, power_of_two=True)
    by_rows = Codes(rows.codes, rows.scale_inv.t().contiguous())
    out = multiply_rows(by_rows, Codes(*blocks), on_device)
    values = list(zip(dequantize_tiles(rows).double().split(counts), dequantize_blocks(blocks).double(), strict=True))
    expected, magnitudes = (
        torch.cat([change(part) @ change(matrix).t() for part, matrix in values]) for change in (torch.clone, torch.abs)
    )
    assert ((out.double() - expected).abs() <= BOUND * magnitudes + 2.0**-7 * expected.abs()).all()

    groups = pad_groups(on_device, len(x))
    of_grad, of_x = (columns_of(each, groups, power_of_two=True) for each in (grad, x))
    total = torch.randn(len(counts), width, size, device=DEVICE, generator=generator)
    edges = [0]
    for count in counts:
        edges.append(edges[-1] + -(-count // 128) * 128)
    pairs = list(itertools.pairwise(edges))
    sums, magnitudes = (
        torch.stack([change(of_grad[2][:, a:b].double()) @ change(of_x[2][:, a:b].double()).t() for a, b in pairs])
        for change in (torch.clone, torch.abs)
    )
    expected = sums if is_first else sums + total.double()
    add_products_of_columns(total, Codes(*of_grad[:2]), Codes(*of_x[:2]), on_device, is_first=is_first)
    assert ((total.double() - expected).abs() <= BOUND * magnitudes + 1e-5 * expected.abs() + 1e-5).all()


def values_of(by_rows: tuple[Tensor, Tensor]) -> Tensor:
    """Of codes [R, D] with factors [D/128, R]."""
    codes, scale_inv = by_rows
    return dequantize_tiles(Quantized(codes, scale_inv.t()))
