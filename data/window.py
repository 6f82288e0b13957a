"""A window of a document stream as a piece table: its tokens are a concatenation of slices of memory-mapped shards.

An ordinary document is one piece, a fill-in-the-middle document seven, three of which are special tokens. The table is
all that is made when a window is reached; tokens are copied when they are read.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.fim import NUM_PIECES, Int64s, fim_pieces
from data.shards import Tokens


class Pieces(NamedTuple):
    """Slices of arrays: for each, the range that it is part of, which array, where, how long, of which document."""

    ranges: Int64s
    sources: Int64s
    begins: Int64s
    lengths: Int64s
    document_numbers: Int64s


@dataclass(frozen=True)
class Window:
    """P pieces: piece i begins at `begins[i]` of `arrays[sources[i]]`, and fills the stream from `offsets[i]` to
    `offsets[i + 1]`. `document_numbers` [P] counts documents from the start of the stream."""

    arrays: tuple[Tokens, ...]
    sources: Int64s
    begins: Int64s
    offsets: Int64s
    document_numbers: Int64s

    @property
    def end(self) -> int:
        """The offset in the stream past the last piece."""
        return int(self.offsets[-1])

    def cut(self, starts: Int64s, stops: Int64s) -> Pieces:
        """The pieces of ranges [R] of the stream that lie in this window, range after range."""
        firsts = np.searchsorted(self.offsets, starts, "right") - 1
        counts = np.searchsorted(self.offsets, stops, "left") - firsts
        ranges = np.repeat(np.arange(len(starts)), counts)
        found = np.arange(len(ranges)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
        offsets = self.offsets[found]
        edges = np.maximum(offsets, starts[ranges])
        lengths = np.minimum(self.offsets[found + 1], stops[ranges]) - edges
        begins = self.begins[found] + edges - offsets
        return Pieces(ranges, self.sources[found], begins, lengths, self.document_numbers[found])


def lay_window(
    arrays: tuple[Tokens, ...],
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
