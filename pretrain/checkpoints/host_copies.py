"""Copies of tensors in memory of the host that is kept from one time to the next, pinned for those of a GPU."""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64


class HostCopies:
    """Room for one copy of each of some tensors."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def begin(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies, which are there after `wait`, of the tensors as the device's work so far leaves them. Those of the
        time before are gone."""
        places, size = {}, 0
        for key, tensor in tensors.items():
            places[key] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if size > len(self._buffer):
            # The old room first, or there would be both for a moment.
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        copies = {}
        for key, tensor in tensors.items():
            copy = self._buffer[places[key] : places[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if on_gpu else None
        return copies

    def wait(self) -> None:
        """Until the copies are there. Any thread may wait."""
        if self._copied is not None:
            self._copied.synchronize()
