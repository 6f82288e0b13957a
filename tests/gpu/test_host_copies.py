"""Copies of a GPU's tensors in pinned memory of the host."""

import pytest
import torch

from pretrain.checkpoints.host_copies import HostCopies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_copies_are_pinned_and_as_the_device_left_them() -> None:
    torch.manual_seed(0)
    # More than two segments, and edges within a tensor.
    tensors = {
        name: torch.randn(size, device="cuda") for name, size in (("a", 90_000_001), ("b", 70_000_000), ("c", 3))
    }
    copies = HostCopies()
    copies.prepare(tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    found = copies.begin(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    copies.wait()
    for name, copy in found.items():
        assert copy.is_pinned()
        assert torch.equal(copy, expected[name].cpu())
