"""Copies in memory of the host: the values, whatever their sizes, in room that is kept."""

import subprocess
import sys

import pytest
import torch
from support import PROJECT

from pretrain.checkpoints import host_copies
from pretrain.checkpoints.host_copies import HostCopies


@pytest.mark.parametrize("segment", [4096, 2**28])
def test_copies_have_the_values(monkeypatch: pytest.MonkeyPatch, segment: int) -> None:
    monkeypatch.setattr(host_copies, "_SEGMENT", segment)
    torch.manual_seed(0)
    tensors = {
        "long": torch.randn(5000, dtype=torch.float64),
        "none": torch.empty(0),
        "one": torch.tensor(3.0),
        "odd": torch.randn(3, 7).bfloat16(),
        "not in order": torch.randn(40, 30).t(),
        "bytes": torch.arange(200, dtype=torch.uint8),
    }
    copies = HostCopies()
    copies.prepare(tensors)
    for _ in range(2):
        found = copies.begin(tensors)
        copies.wait()
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor), key
            tensor.add_(1)


def test_room_is_kept_until_it_is_too_small() -> None:
    copies, small = HostCopies(), {"x": torch.ones(100)}
    copies.prepare(small)
    first = copies.begin(small)["x"]
    assert copies.begin(small)["x"].data_ptr() == first.data_ptr()
    assert len(copies.begin({"x": torch.ones(10_000)})["x"]) == 10_000


def test_what_goes_wrong_in_the_thread_is_raised_by_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, tensors = HostCopies(), {"x": torch.ones(100)}
    with monkeypatch.context() as broken:
        broken.setattr(host_copies, "_PAGE", -(10**9))
        copies.prepare(tensors)
        with pytest.raises(RuntimeError):
            copies.begin(tensors)
    assert torch.equal(copies.begin(tensors)["x"], tensors["x"])


EARLY_END = """
import torch
from pretrain.checkpoints.host_copies import HostCopies
copies = HostCopies()
copies.prepare({"x": torch.empty(1 << 30, dtype=torch.uint8)})
"""


def test_a_process_ends_in_order_while_room_is_taken() -> None:
    ended = subprocess.run([sys.executable, "-c", EARLY_END], capture_output=True, text=True, timeout=60, cwd=PROJECT)
    assert (ended.returncode, ended.stderr) == (0, "")
