"""Batches ahead of time: a thread reads this rank's share of every global batch while the model trains.

One thread is enough, because numpy copies tokens without holding the interpreter's lock.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from data.errors import DataError
from data.stream import DataPosition, SampleStream


@dataclass(frozen=True)
class BatchSpec:
    """One global batch: `batch_size` samples from `position` on."""

    position: DataPosition
    batch_size: int


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch.

    `tokens` [batch_size / dp_size, seq_len + extra] are as the shards hold them, uint16 or uint32, to be widened on the
    device that trains: int64 would be two to four times as much to read and to send there. `documents`, of the same
    shape, int32, numbers the documents of each sample from 0, or is None where attention may cross them.
    """

    spec: BatchSpec
    tokens: torch.Tensor
    documents: torch.Tensor | None


class BatchLoader:
    """Iterates the batches of `specs`, `prefetch` of them read ahead in a thread, or each when asked for if that is 0.
    Close it, or use it in `with`.

    Of each global batch, rank r of `dp_size` gets the r-th run of consecutive samples. What goes wrong while reading a
    batch is raised when that batch is asked for. `pin_memory` makes batches page-locked where CUDA is present.
    """

    def __init__(
        self,
        stream: SampleStream,
        specs: Iterable[BatchSpec],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._stream = stream
        self._specs = iter(specs)
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch = prefetch
        self._pin = pin_memory and torch.cuda.is_available()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batch-loader")
        self._pending: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._prefetch:
            return self._read(next(self._specs))
        self._read_ahead()
        if not self._pending:
            raise StopIteration
        batch = self._pending.popleft()
        self._read_ahead()
        return batch.result()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread; waits for the batch being read, drops the others."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def _read_ahead(self) -> None:
        while len(self._pending) < self._prefetch and (spec := next(self._specs, None)):
            self._pending.append(self._pool.submit(self._read, spec))

    def _read(self, spec: BatchSpec) -> Batch:
        rows, rest = divmod(spec.batch_size, self._dp_size)
        if rest:
            raise DataError(
                f"a batch of {spec.batch_size} samples cannot be shared by {self._dp_size} data-parallel ranks; "
                "make train.batch_size a multiple of them"
            )
        samples = self._stream.read(spec.position, self._dp_rank * rows, rows)
        documents = None if samples.documents is None else self._tensor(torch.from_numpy(samples.documents))
        return Batch(spec, self._tensor(torch.from_numpy(samples.tokens)), documents)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._pin else tensor


def stream_hash(open_stream: Callable[[], SampleStream], specs: list[BatchSpec], dp_size: int = 1) -> str:
    """Digest of the samples of consecutive global batches, put together from what `dp_size` ranks read on their own.

    The same samples give the same digest, whatever the number of ranks, the sizes of the batches and the type that
    tokens are stored in. Every rank gets a stream of its own from `open_stream`.
    """
    tokens, documents = hashlib.sha256(), hashlib.sha256()
    loaders = [BatchLoader(open_stream(), specs, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for parts in zip(*loaders, strict=True):
        for part in parts:
            tokens.update(part.tokens.long().numpy().tobytes())
            if part.documents is not None:
                documents.update(part.documents.numpy().tobytes())
    for loader in loaders:
        loader.close()
    return hashlib.sha256(tokens.digest() + documents.digest()).hexdigest()
