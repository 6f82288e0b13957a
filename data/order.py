"""The endless, shuffled stream of one dataset's tokens, readable at any offset.

The stream is a pure function of (dataset, seed): all documents of epoch 0 in a random order, then those of epoch 1,
without a gap. Trillions of tokens are shuffled without an array over all documents, in three steps an epoch:

    shards     are permuted and dealt into groups of `group_shards`;
    a group    is cut into windows: each shard into equally many slices of consecutive documents, and a window takes
               one random slice of every shard, about `window_tokens` tokens in all;
    a window   has all its documents shuffled.

So a dataset smaller than a window is shuffled fully, and a larger one is read in a few long slices at a time. Where
groups lie in the stream follows from the index alone, where windows lie from a few numbers a shard. Only windows that
are read are laid out, by data/window.py.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data.dataset import TokenDataset
from data.fim import EXTRA_TOKENS, Count, fim_count, fim_mask, fim_steps
from data.randomness import permutation, random_bits
from data.shards import Tokens
from data.window import Int64s, Pieces, Window, join_pieces, lay_window


@dataclass(frozen=True, kw_only=True)
class Shuffle:
    """Sizes of the shuffle. They are part of the order: other numbers give another stream."""

    group_shards: int = 16
    window_tokens: int = 1 << 26
    window_documents: int = 1 << 20
    sample_tokens: int = 1 << 24


@dataclass(frozen=True)
class _Epoch:
    """`shards` in the epoch's order; documents and offset in the stream before each group [G]."""

    shards: Int64s
    documents: Int64s
    starts: Int64s


@dataclass(frozen=True)
class _SlicedShard:
    """A shard of a group, cut into one slice a window.

    `bounds` [N + 1] are the borders of its documents, `cuts` [W + 1] the documents at which slices begin, `slices` [W]
    the slice that each window takes.
    """

    tokens: memoryview
    bounds: Int64s
    cuts: Int64s
    slices: Int64s

    @property
    def num_documents(self) -> Int64s:
        """Documents for each window [W]."""
        return np.diff(self.cuts)[self.slices]

    @property
    def num_tokens(self) -> Int64s:
        """Tokens for each window [W]."""
        return np.diff(self.bounds[self.cuts])[self.slices]

    def window_bounds(self, window: int) -> Int64s:
        """Borders of the documents for one window."""
        chosen = self.slices[window]
        return self.bounds[self.cuts[chosen] : self.cuts[chosen + 1] + 1]


@dataclass(frozen=True)
class _Group:
    """The shards of a group; documents and offset in the stream before each window [W]."""

    shards: tuple[_SlicedShard, ...]
    documents: Int64s
    starts: Int64s


class DocumentStream:
    """The endless stream of one dataset.

    `seed` and `number` (which dataset of a mixture this is) choose the order, `fim_rate` the share of documents
    rewritten for fill-in-the-middle.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        number: int = 0,
        fim_rate: float = 0.0,
        shuffle: Shuffle | None = None,
    ) -> None:
        self._dataset = dataset
        self._key = (seed, number)
        self._fim_steps = fim_steps(fim_rate)
        self._shuffle = shuffle or Shuffle()
        self._num_tokens = np.array([entry.tokens for entry in dataset.shards], np.int64)
        self._num_documents = np.array([entry.documents for entry in dataset.shards], np.int64)
        tokenizer = dataset.tokenizer
        specials = np.array([tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end], dataset.index.dtype)
        self._specials = specials.data
        # Neighbouring samples may lie on both sides of a border. No more, as each shard of a group is an open file.
        self._epoch = lru_cache(maxsize=2)(self._lay_epoch)
        self._group = lru_cache(maxsize=2)(self._lay_group)
        self._window = lru_cache(maxsize=4)(self._lay_window)

    def read(self, start: int, count: int) -> Tokens:
        """Tokens `start` to `start + count` of the stream, count >= 1."""
        return self.cut(np.array([0]), np.array([start]), count).read()

    def cut(self, ranges: Int64s, starts: Int64s, count: int) -> Pieces:
        """The pieces of ranges of `count` >= 1 tokens from each of `starts` [R] on; `ranges` [R] are their numbers."""
        parts: list[Pieces] = []
        stops = starts + count
        while len(starts):
            window = self._window_at(int(starts.min()))
            if stops.max() <= window.end:
                parts.append(window.cut(ranges, starts, stops))
                break
            begun = starts < window.end
            edges = np.minimum(stops, window.end)
            parts.append(window.cut(ranges[begun], starts[begun], edges[begun]))
            starts = np.where(begun, edges, starts)
            rest = starts < stops
            ranges, starts, stops = ranges[rest], starts[rest], stops[rest]
        return join_pieces(parts)

    def epoch_start(self, epoch: int) -> int:
        """The offset in the stream at which an epoch begins."""
        return epoch * self._dataset.num_tokens + self._fim_tokens(epoch * self._dataset.num_documents)

    def _fim_tokens(self, documents: Count) -> Count:
        """What fill-in-the-middle adds to the first documents of the stream."""
        return EXTRA_TOKENS * fim_count(documents, self._fim_steps)

    def _window_at(self, offset: int) -> Window:
        # Rewriting only adds tokens, so the range holds every candidate but epoch 0.
        candidates = range(1, offset // self._dataset.num_tokens + 1)
        epoch = bisect_right(candidates, offset, key=self.epoch_start)
        group = _last_at_most(self._epoch(epoch).starts, offset)
        window = _last_at_most(self._group(epoch, group).starts, offset)
        return self._window(epoch, group, window)

    def _lay_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(len(self._num_tokens), "shards", *self._key, epoch)
        firsts = np.arange(0, len(shards), self._shuffle.group_shards)
        documents = epoch * self._dataset.num_documents + _before(self._num_documents[shards])[firsts]
        tokens = epoch * self._dataset.num_tokens + _before(self._num_tokens[shards])[firsts]
        return _Epoch(shards, documents, tokens + self._fim_tokens(documents))

    def _lay_group(self, epoch: int, group: int) -> _Group:
        around, size = self._epoch(epoch), self._shuffle.group_shards
        numbers = around.shards[group * size : (group + 1) * size]
        num_windows = max(
            _ceil_div(int(self._num_tokens[numbers].sum()), self._shuffle.window_tokens),
            _ceil_div(int(self._num_documents[numbers].sum()), self._shuffle.window_documents),
        )
        shards = tuple(self._cut_shard(number, num_windows, epoch) for number in numbers.tolist())
        documents = _before(np.sum([shard.num_documents for shard in shards], axis=0))
        tokens = _before(np.sum([shard.num_tokens for shard in shards], axis=0))
        first_document, start = int(around.documents[group]), int(around.starts[group])
        added = self._fim_tokens(first_document + documents) - self._fim_tokens(first_document)
        return _Group(shards, first_document + documents, start + tokens + added)

    def _cut_shard(self, number: int, num_windows: int, epoch: int) -> _SlicedShard:
        shard = self._dataset.open_shard(number)
        bounds = np.concatenate([[0], shard.ends.astype(np.int64)])
        cuts = shard.num_documents * np.arange(num_windows + 1) // num_windows
        slices = permutation(num_windows, "slices", *self._key, epoch, number)
        return _SlicedShard(shard.tokens.data, bounds, cuts, slices)

    def _lay_window(self, epoch: int, group: int, window: int) -> Window:
        around = self._group(epoch, group)
        bounds = [shard.window_bounds(window) for shard in around.shards]
        sources = np.repeat(np.arange(len(bounds)), [len(bound) - 1 for bound in bounds])
        begins = np.concatenate([bound[:-1] for bound in bounds])
        lengths = np.concatenate([np.diff(bound) for bound in bounds])
        order = permutation(len(sources), "documents", *self._key, epoch, group, window)
        first_document = int(around.documents[window])
        rewritten = fim_mask(first_document, len(order), self._fim_steps)
        draws = random_bits(2 * int(rewritten.sum()), "cuts", *self._key, epoch, group, window)
        return lay_window(
            (*(shard.tokens for shard in around.shards), self._specials),
            sources[order],
            begins[order],
            lengths[order],
            rewritten=rewritten,
            draws=draws.reshape(-1, 2),
            start=int(around.starts[window]),
            first_document=first_document,
        )


def _before(counts: Int64s) -> Int64s:
    """The sum of all entries before each one."""
    return np.cumsum(counts) - counts


def _last_at_most(starts: Int64s, offset: int) -> int:
    """The last of the rising `starts` that is not past the offset."""
    return int(np.searchsorted(starts, offset, "right")) - 1


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
