"""A window of a document stream as a piece table: its tokens are a concatenation of slices of memory-mapped shards.

An ordinary document is one piece, a fill-in-the-middle document seven, three of which are special tokens. The table is
all that is made when a window is reached; tokens are copied when they are read.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.fim import NUM_PIECES, Int64s, fim_pieces
from data.shards import Tokens


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

    def pieces(self, start: int, stop: int) -> list[Tokens]:
        """Views whose concatenation is the stream from `start` to `stop`, which lie in this window."""
        found, edges = self._overlap(start, stop)
        begins = self.begins[found] + edges[:-1] - self.offsets[found]
        ends = begins + np.diff(edges)
        places = zip(self.sources[found].tolist(), begins.tolist(), ends.tolist(), strict=True)
        return [self.arrays[source][begin:end] for source, begin, end in places]

    def documents(self, start: int, stop: int) -> Int64s:
        """The document number of each token from `start` to `stop`."""
        found, edges = self._overlap(start, stop)
        return np.repeat(self.document_numbers[found], np.diff(edges))

    def _overlap(self, start: int, stop: int) -> tuple[slice, Int64s]:
        """The pieces that meet [start, stop), and the borders between them inside it."""
        first = int(np.searchsorted(self.offsets, start, "right")) - 1
        last = int(np.searchsorted(self.offsets, stop, "left"))
        return slice(first, last), np.clip(self.offsets[first : last + 1], start, stop)


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
