"""Rows in FP8 on their way."""

import pytest
import torch

from model.packing import codes_and_scales, decode_rows, encode_rows, packed_width, restore_rows


@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_rounding_of_rows(width: int) -> None:
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    packed = encode_rows(rows)
    _, scales = codes_and_scales(packed)
    back = decode_rows(packed, width)
    # E4M3 has 3 bits after the point: at most 1/16 of a value is lost, or half of the smallest step of its group.
    bound = rows.abs() / 16 + scales.repeat_interleave(128, 1)[:, :width] * 2**-10
    assert ((back - rows).abs() <= bound).all()


@pytest.mark.parametrize(("width", "groups"), [(1, 1), (127, 1), (128, 1), (129, 2), (300, 3)])
def test_a_row_is_its_codes_and_then_its_scales(width: int, groups: int) -> None:
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    packed = encode_rows(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, packed_width(width)) == (5, groups * 132)
    for row, message in zip(rows, packed, strict=True):
        scales = torch.stack([group.abs().max() / 448 for group in row.split(128)])
        codes = torch.zeros(groups * 128)
        codes[:width] = row / scales.repeat_interleave(128)[:width]
        assert message.tolist() == [
            *codes.to(torch.float8_e4m3fn).view(torch.uint8).tolist(),
            *scales.view(torch.uint8).tolist(),
        ]


def test_the_largest_value_is_exact_and_zeros_stay() -> None:
    rows = torch.zeros(2, 256)
    rows[0, 5], rows[0, 200] = -3.5, 448.0
    packed = encode_rows(rows)
    torch.testing.assert_close(decode_rows(packed, 256), rows)
    _, scales = codes_and_scales(packed)
    assert scales.tolist() == [[3.5 / 448, 1.0], [1.0, 1.0]]


def test_some_of_the_rows() -> None:
    rows = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    packed = encode_rows(rows)
    assert torch.equal(packed[1:4], encode_rows(rows[1:4]))
    assert torch.equal(decode_rows(packed[1:4], 200), decode_rows(packed, 200)[1:4])


@pytest.mark.parametrize("width", [100, 128, 200])
def test_no_rows(width: int) -> None:
    packed = encode_rows(torch.zeros(0, width))
    assert packed.shape == (0, packed_width(width))
    assert decode_rows(packed, width).shape == (0, width)


def test_rows_are_kept_as_they_are_or_packed() -> None:
    rows = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert restore_rows(rows, 200, rows.dtype) is rows
    restored = restore_rows(encode_rows(rows), 200, rows.dtype)
    assert torch.equal(restored, decode_rows(encode_rows(rows), 200, torch.bfloat16))
    assert restored.dtype == rows.dtype
