"""The weight gradients of experts against plain products, in the interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from model.kernels import grouped


@pytest.mark.parametrize("counts", [[5, 0, 40, 3], [0, 0, 0, 0], [0, 33, 0, 0]])
@pytest.mark.parametrize("is_first", [True, False])
def test_against_products(counts: list[int], is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 2, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(grouped, "TILE", tile)
    # The interpreter multiplies the bits of bf16 numbers, not the numbers.
    grad, rows = torch.randn(sum(counts), 40), torch.randn(sum(counts), 64)
    total = torch.randn(len(counts), 40, 64)
    products = [g.t() @ x for g, x in zip(grad.split(counts), rows.split(counts), strict=True)]
    expected = torch.stack(products) + (0.0 if is_first else total)
    grouped.add_weight_gradients(total, grad, rows, torch.tensor(counts), is_first=is_first)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
