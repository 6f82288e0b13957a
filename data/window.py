"""A window of a document stream as a piece table: its tokens are a concatenation of slices of memory-mapped shards.

An ordinary document is one piece, a fill-in-the-middle document seven, three of which are special tokens. The table is
all that is made when a window is reached; tokens are copied when they are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.fim import NUM_PIECES, Int64s, fim_pieces
from data.shards import Tokens


@dataclass(frozen=True)
class Pieces:
    """Slices of token arrays, all of one type, whose concatenation is R ranges of tokens, one after another.

    Slice i is `arrays[sources[i]][begins[i] : begins[i] + lengths[i]]`, a part of range `ranges[i]` and of document
    `documents[i]`, counted from the start of a stream.
    """

    arrays: tuple[memoryview, ...]
    ranges: Int64s
    sources: Int64s
    begins: Int64s
    lengths: Int64s
    documents: Int64s

    def read(self) -> Tokens:
        """Copies the tokens of all ranges."""
        ends = self.begins + self.lengths
        places = zip(self.sources.tolist(), self.begins.tolist(), ends.tolist(), strict=True)
        # Joining bytes takes half the time of joining numpy arrays; a bytearray can be written to, as torch asks.
        joined = bytearray().join([self.arrays[source][begin:end] for source, begin, end in places])
        return np.frombuffer(joined, self.arrays[0].format)

    def number_documents(self) -> npt.NDArray[np.int32]:
        """The document of every token, counted from 0 in each range."""
        firsts = np.searchsorted(self.ranges, self.ranges)
        return np.repeat((self.documents - self.documents[firsts]).astype(np.int32), self.lengths)


def join_pieces(parts: Sequence[Pieces]) -> Pieces:
    """The ranges of all parts. A range may be in several; then its later pieces are in later parts."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([part.ranges for part in parts]), kind="stable")
    num_arrays = np.cumsum([0] + [len(part.arrays) for part in parts])
    return Pieces(
        tuple(array for part in parts for array in part.arrays),
        np.concatenate([part.ranges for part in parts])[order],
        np.concatenate([part.sources + before for part, before in zip(parts, num_arrays, strict=False)])[order],
        np.concatenate([part.begins for part in parts])[order],
        np.concatenate([part.lengths for part in parts])[order],
        np.concatenate([part.documents for part in parts])[order],
    )


@dataclass(frozen=True)
class Window:
    """P pieces: piece i begins at `begins[i]` of `arrays[sources[i]]`, and fills the stream from `offsets[i]` to
    `offsets[i + 1]`. `documents` [P] counts documents from the start of the stream."""

    arrays: tuple[memoryview, ...]
    sources: Int64s
    begins: Int64s
    offsets: Int64s
    documents: Int64s

    @property
    def end(self) -> int:
        """The offset in the stream past the last piece."""
        return int(self.offsets[-1])

    def cut(self, ranges: Int64s, starts: Int64s, stops: Int64s) -> Pieces:
        """The pieces of ranges [R], R >= 1, of the stream that lie in this window; `ranges` [R] are their numbers.

        No range is empty. A batch has few pieces, so what costs time here is the number of numpy calls.
        """
        bounds = self.offsets.searchsorted(np.concatenate((starts, stops - 1)), "right")
        firsts = bounds[: len(starts)] - 1
        counts = bounds[len(starts) :] - firsts
        ends = counts.cumsum()
        befores = ends - counts
        found = np.arange(ends[-1]) + (firsts - befores).repeat(counts)
        offsets, lasts = self.offsets.take(found), self.offsets.take(found + 1)
        # The first and the last piece of each range are cut to it.
        edges = offsets.copy()
        edges[befores], lasts[ends - 1] = starts, stops
        begins = self.begins.take(found) + (edges - offsets)
        sources, documents = self.sources.take(found), self.documents.take(found)
        return Pieces(self.arrays, ranges.repeat(counts), sources, begins, lasts - edges, documents)


def lay_window(
    arrays: tuple[memoryview, ...],
    sources: Int64s,
    begins: Int64s,
    lengths: Int64s,
    *,
    rewritten: npt.NDArray[np.bool_],
    draws: npt.NDArray[np.uint64],
    start: int,
    first_document: int,
) -> Window:
    """Lays N documents one after another from offset `start` of the stream on.

    `sources`, `begins`, `lengths` [N] say in which of `arrays` and where each document lies. The last of `arrays` holds
    the three special tokens of fill-in-the-middle; of the `rewritten` [N] documents, `draws` [K, 2] choose the cuts.
    """
    num_pieces = np.where(rewritten, NUM_PIECES, 1)
    numbers = np.repeat(first_document + np.arange(len(begins)), num_pieces)
    table = np.repeat(np.stack([sources, begins, lengths]), num_pieces, axis=1)
    places = np.flatnonzero(np.repeat(rewritten, num_pieces)).reshape(-1, NUM_PIECES)
    table[0][places[:, (0, 2, 4)]] = len(arrays) - 1
    table[1][places], table[2][places] = fim_pieces(begins[rewritten], lengths[rewritten], draws)
    offsets = start + np.concatenate([[0], np.cumsum(table[2])])
    return Window(arrays, table[0], table[1], offsets, numbers)
