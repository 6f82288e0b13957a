"""The moving average of the weights that the report keeps on the CPU (section 3.2.3), beside the training:

    e ← d e + (1 - d) w        after each update of the masters w; d is `checkpoint.ema`, and e begins as w

Each rank averages the shards that it would save. Their masters are copied to memory of the host in the order of the
device's work, so that the host waits for nothing; a thread does the rest while the next step runs. Averages are saved
as `ema/name`, in fp32, and so go on at any other layout.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pretrain.checkpoints.host_copies import HostCopies


class Averages:
    """`masters` gives the live fp32 masters of this rank by `name@start`, 1-D; `load` the average of a key that was
    saved, None where there was none."""

    def __init__(
        self,
        decay: float,
        masters: Callable[[], Mapping[str, Tensor]],
        load: Callable[[str, Tensor], Tensor | None] = lambda key, master: None,
    ) -> None:
        self._decay, self._masters = decay, masters
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="averages")
        self._pending: Future[None] | None = None
        self._values: dict[str, Tensor] = {}
        for key, master in masters().items():
            saved = load(key, master)
            # A copy in any case: `cpu` gives what is there already itself.
            self._values[key] = master.detach().cpu().clone() if saved is None else saved

    def update(self) -> None:
        """After a step that changed the weights. Waits until the thread has ended the update before."""
        self._wait()
        copies = self._copies.begin(self._masters())
        self._pending = self._thread.submit(self._add, copies)

    def tensors(self) -> dict[str, Tensor]:
        """All averages as they are kept, by `name@start`."""
        self._wait()
        return self._values

    @torch.no_grad()
    def _add(self, copies: Mapping[str, Tensor]) -> None:
        self._copies.wait()
        for key, copy in copies.items():
            self._values[key].lerp_(copy, 1 - self._decay)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
