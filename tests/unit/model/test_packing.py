"""Rows in FP8 on their way."""

import pytest
import torch

from model.packing import decode_rows, encode_rows


@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_rounding_of_rows(width: int) -> None:
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    codes, scales = encode_rows(rows)
    assert codes.dtype == torch.uint8
    assert codes.shape == (7, -(-width // 128), 128)
    back = decode_rows(codes, scales, width)
    # E4M3 has 3 bits after the point: at most 1/16 of a value is lost, or half of the smallest step of its group.
    bound = rows.abs() / 16 + scales.repeat_interleave(128, 1)[:, :width] * 2**-10
    assert ((back - rows).abs() <= bound).all()


def test_the_largest_value_is_exact_and_zeros_stay() -> None:
    rows = torch.zeros(2, 256)
    rows[0, 5], rows[0, 200] = -3.5, 448.0
    back = decode_rows(*encode_rows(rows), 256)
    torch.testing.assert_close(back, rows)


def test_no_rows() -> None:
    codes, scales = encode_rows(torch.zeros(0, 200))
    assert decode_rows(codes, scales, 200).shape == (0, 200)
