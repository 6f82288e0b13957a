"""The global stream of training samples: a pure function of (configuration, seed, position).

Each dataset is an endless stream of documents, cut into samples. Sample k holds the tokens

    origin[d] + k L  ...  origin[d] + (k + 1) L + extra

of dataset d's stream, L being the sequence length and extra the targets that reach past it. Neighbouring samples are
often pieces of one document, and a batch of such neighbours would be far from the average of the data; so samples are
taken in random order within windows of 16 million tokens, or of an epoch where that is less. Sample i of a run comes
from the dataset that the mixture names, as the next of that dataset's shuffled samples. No rank, worker or batch size
appears here, so none can change the order.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.config import DataConfig
from data.dataset import TokenDataset, check_alike, open_dataset
from data.errors import DataError
from data.mixture import Mixture
from data.order import DocumentStream, Shuffle
from data.randomness import permutation
from data.shards import Tokens
from data.window import Pieces, join_pieces


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in its stream.

    `sample` counts the samples consumed so far. They have had `seq_len` tokens since number `since`, when dataset d
    stood at token `origin[d]` of its stream; all of these are 0 until the sequence length changes.
    """

    sample: int
    seq_len: int
    origin: tuple[int, ...]
    since: int = 0

    def advanced(self, samples: int) -> "DataPosition":
        """The position after so many more samples."""
        return replace(self, sample=self.sample + samples)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for checkpoints and metrics."""
        return {"sample": self.sample, "seq_len": self.seq_len, "origin": list(self.origin), "since": self.since}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataPosition":
        """The inverse of `to_json`."""
        origin = tuple(map(int, value["origin"]))
        return cls(int(value["sample"]), int(value["seq_len"]), origin, int(value["since"]))


@dataclass(frozen=True)
class Samples:
    """`tokens` [samples, seq_len + extra] as the shards hold them, uint16 or uint32; `documents`, of the same shape,
    int32, numbers the documents of each sample from 0, or is None where attention may cross them."""

    tokens: Tokens
    documents: npt.NDArray[np.int32] | None


class SampleStream:
    """The samples of a mixture of datasets, readable from any position. `open_stream` makes one from paths.

    `extra` is the number of targets past the sequence: 1 + the depth of multi-token prediction. `shuffle` is for tests.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        config: DataConfig,
        *,
        seed: int,
        extra: int,
        shuffle: Shuffle | None = None,
    ) -> None:
        check_alike(datasets)
        shuffle = shuffle or Shuffle()
        self._seed = seed
        self._window_tokens = np.minimum([dataset.num_tokens for dataset in datasets], shuffle.sample_tokens)
        self.datasets = tuple(datasets)
        self.extra = extra
        self.fingerprint = _fingerprint(datasets, config, seed, shuffle)
        self._with_documents = not config.cross_document_attention
        weights = {entry.path: entry.weight for entry in config.datasets}
        self._mixture = Mixture(weights, seed=seed)
        self._window_order = lru_cache(maxsize=2 * len(datasets))(self._lay_window_order)
        self._streams = [
            DocumentStream(dataset, seed=seed, number=number, fim_rate=config.fim_rate, shuffle=shuffle)
            for number, dataset in enumerate(datasets)
        ]

    def start(self, seq_len: int) -> DataPosition:
        """The position before the first sample."""
        return DataPosition(0, seq_len, (0,) * len(self._streams))

    def resized(self, position: DataPosition, seq_len: int) -> DataPosition:
        """Goes on with samples of another length, after the windows of every dataset that have been begun: of each, the
        rest of one window is left out."""
        sizes = self._window_sizes(position.seq_len)
        begun = -(-self._used(position, position.sample) // sizes)
        origin = np.array(position.origin, np.int64) + begun * sizes * position.seq_len
        return DataPosition(position.sample, seq_len, tuple(origin.tolist()), position.sample)

    def read(self, position: DataPosition, start: int, count: int) -> Samples:
        """Samples `start` to `start + count` after the position, count >= 1.

        Raises DataError when the position is that of another mixture, or a shard turns out to be damaged.
        """
        if len(position.origin) != len(self._streams):
            raise DataError(
                f"the data position is one of {len(position.origin)} datasets, data.datasets lists "
                f"{len(self._streams)}; resume with the datasets the run began with"
            )
        first, seq_len = position.sample + start, position.seq_len
        chosen = self._mixture.datasets(first, count)
        used = self._used(position, first)
        parts = []
        for number, stream in enumerate(self._streams):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                shuffled = self._shuffled(number, int(used[number]), len(rows), seq_len)
                parts.append(stream.cut(rows, position.origin[number] + shuffled * seq_len, seq_len + self.extra))
        return _read_samples(join_pieces(parts), count, self._with_documents)

    def verify(
        self, part: int = 0, num_parts: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Compares this part of the shards with their checksums, dataset by dataset; see `TokenDataset.verify`."""
        for dataset in self.datasets:
            dataset.verify(part, num_parts, progress)

    def _used(self, position: DataPosition, sample: int) -> npt.NDArray[np.int64]:
        """Samples that each dataset gave up to number `sample`, since the sequence length last changed [D]."""
        return self._mixture.before(sample) - self._mixture.before(position.since)

    def _window_sizes(self, seq_len: int) -> npt.NDArray[np.int64]:
        """Samples in a window of each dataset [D]; at most an epoch, so that only neighbouring epochs mix."""
        return np.maximum(self._window_tokens // seq_len, 1)

    def _shuffled(self, number: int, start: int, count: int, seq_len: int) -> npt.NDArray[np.int64]:
        """Which samples of a dataset are its `start`-th to `start + count`-th in the shuffled order [count]; not to be
        written to."""
        size = int(self._window_sizes(seq_len)[number])
        first, last = start // size, -(-(start + count) // size)
        windows = [self._window_order(size, number, seq_len, window) for window in range(first, last)]
        order = windows[0] if len(windows) == 1 else np.concatenate(windows)
        return order[start - first * size :][:count]

    def _lay_window_order(self, size: int, number: int, seq_len: int, window: int) -> npt.NDArray[np.int64]:
        return window * size + permutation(size, "samples", self._seed, number, seq_len, window)


class ValidationSamples:
    """One dataset's held-out split as samples that hold each token once, in an order that never changes.

    Tokens after the last whole sample are left out. With `limit`, only so many samples are used; they come from
    documents all over the split. Raises DataError when there is not one whole sample.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        extra: int,
        limit: int | None = None,
        cross_document_attention: bool = True,
    ) -> None:
        self._seq_len, self._extra = seq_len, extra
        self._with_documents = not cross_document_attention
        self._stream = DocumentStream(dataset, seed=0)
        available = (dataset.num_tokens - extra) // seq_len
        self._length = available if limit is None else min(available, limit)
        if self._length < 1:
            raise DataError(
                f"split {dataset.split!r} of dataset {dataset.folder} has {dataset.num_tokens} tokens, one sample "
                f"needs train.seq_len + {extra} = {seq_len + extra}; prepare the dataset with a larger split"
            )

    def __len__(self) -> int:
        return self._length

    def next_tokens(self) -> npt.NDArray[np.int64]:
        """All samples as one text [len * seq_len + 1], whose tokens after the first are the next-token targets."""
        return self._stream.read(0, self._length * self._seq_len + 1).astype(np.int64)

    def read(self, start: int, count: int) -> Samples:
        """Samples `start` to `start + count`, both within the length, count >= 1."""
        rows = np.arange(count)
        pieces = self._stream.cut(rows, (start + rows) * self._seq_len, self._seq_len + self._extra)
        return _read_samples(pieces, count, self._with_documents)


def open_stream(config: DataConfig, *, seed: int, extra: int, vocab_size: int) -> SampleStream:
    """Opens the training split of every dataset for a model of `vocab_size` ids.

    Raises DataError when one is missing, damaged, empty or made with another tokenizer; checksums are left to `verify`.
    """
    datasets = [open_dataset(Path(entry.path), vocab_size=vocab_size) for entry in config.datasets]
    return SampleStream(datasets, config, seed=seed, extra=extra)


def _read_samples(pieces: Pieces, count: int, with_documents: bool) -> Samples:
    """Samples whose tokens are `count` ranges of one length."""
    tokens = pieces.read().reshape(count, -1)
    return Samples(tokens, pieces.number_documents().reshape(count, -1) if with_documents else None)


def _fingerprint(datasets: Sequence[TokenDataset], config: DataConfig, seed: int, shuffle: Shuffle) -> str:
    """A digest of all that fixes the order besides the position: a run must be resumed with the same."""
    shards = [[entry.sha256 for entry in dataset.shards] for dataset in datasets]
    weights = [entry.weight for entry in config.datasets]
    return hashlib.sha256(repr((seed, shards, weights, config.fim_rate, asdict(shuffle))).encode()).hexdigest()
