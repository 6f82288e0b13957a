"""Copies of a GPU's tensors in pinned memory of the host."""

import pytest
import torch

from pretrain.checkpoints.host_copies import HostCopies

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SECOND_OR_SO = 2 * 10**9
"""In cycles."""


def test_copies_are_as_the_device_left_them_and_nobody_waits_for_them() -> None:
    """Copies to memory that is not pinned would hold the host until the device has come there."""
    torch.manual_seed(0)
    # More than two segments, and edges within a tensor.
    tensors = {
        name: torch.randn(size, device="cuda") for name, size in (("a", 90_000_001), ("b", 70_000_000), ("c", 3))
    }
    copies = HostCopies()
    copies.prepare(tensors)
    copies.begin(tensors)  # the room is there then
    copies.wait()
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    torch.cuda._sleep(SECOND_OR_SO)
    slept = torch.cuda.current_stream().record_event()
    found = copies.begin(tensors)
    for tensor in tensors.values():
        tensor.zero_()
    assert not slept.query()
    copies.wait()
    for name, copy in found.items():
        assert torch.equal(copy, expected[name])
