"""The kernel of the loss in rows that are as wide as a piece, narrower and wider."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")

from gate_and_loss_cases import check_token_losses

from model.kernels import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("vocab_size", [2, 96, 1000, 1024])
def test_token_losses(vocab_size: int, scale: float, dtype: torch.dtype) -> None:
    check_token_losses(7, vocab_size, dtype, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [96, 1000, 1024])
def test_rows_in_pieces(vocab_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "PIECE", 128)
    check_token_losses(5, vocab_size, dtype, 20.0)


def test_a_label_that_is_none_is_seen() -> None:
    losses = cross_entropy.token_losses(torch.zeros(3, 8), torch.tensor([7, 8, -1]))
    assert losses.isnan().tolist() == [False, True, True]
