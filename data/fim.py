"""Fill-in-the-middle on token documents, prefix-suffix-middle (DeepSeek-V3 report, section 4.1).

A document `text <eos>` becomes

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

which is three tokens longer. Of the first m documents of a shuffled stream, floor(rate m) are rewritten: every
(1/rate)-th. Which ones these are is as random as the shuffle, and the length of any part of the stream is known
without looking at its documents.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

EXTRA_TOKENS = 3
NUM_PIECES = 7
_RATE_BITS = 20

Int64s = npt.NDArray[np.int64]
Count = TypeVar("Count", int, Int64s)


def fim_steps(rate: float) -> int:
    """The rate in units of 2^-20, so that counting is exact."""
    return round(rate * (1 << _RATE_BITS))


def fim_count(documents: Count, steps: int) -> Count:
    """How many of the first `documents` (< 2^43) of a stream are rewritten."""
    return documents * steps >> _RATE_BITS


def fim_mask(first: int, count: int, steps: int) -> npt.NDArray[np.bool_]:
    """Which of `count` documents of a stream, from number `first` on, are rewritten [count]."""
    counts: Int64s = fim_count(np.arange(first, first + count + 1), steps)
    return counts[1:] > counts[:-1]


def fim_pieces(begins: Int64s, lengths: Int64s, draws: npt.NDArray[np.uint64]) -> tuple[Int64s, Int64s]:
    """Cuts documents at two uniform places and puts the parts in order.

    `begins` and `lengths` [K] say where documents lie among their tokens, `draws` [K, 2] are random 64-bit numbers.
    Returns begins and lengths [K, 7] of the parts. Parts 0, 2 and 4 are the special tokens; their begins count in
    (fim_begin, fim_hole, fim_end).
    """
    cuts = np.sort((draws % lengths[:, None].astype(np.uint64)).astype(np.int64), axis=1)
    first, second, body = cuts[:, 0], cuts[:, 1], lengths - 1
    zero, one = np.zeros_like(begins), np.ones_like(begins)
    parts = (
        (zero, one),
        (begins, first),
        (one, one),
        (begins + second, body - second),
        (2 * one, one),
        (begins + first, second - first),
        (begins + body, one),
    )
    return np.stack([begin for begin, _ in parts], axis=1), np.stack([length for _, length in parts], axis=1)
