"""Random numbers that are a pure function of a key, the same on every machine and with every version of numpy.

numpy guarantees the raw output of its bit generators for good, but not what its distributions and shuffles make of it;
so only raw output is used here.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def random_bits(count: int, *key: str | int) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit numbers named by a purpose and its coordinates."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)


def permutation(count: int, *key: str | int) -> npt.NDArray[np.int64]:
    """The numbers below `count` (< 2^24 for a fair shuffle) in random order."""
    index_bits = np.uint64(count.bit_length())
    # The index breaks ties of the random part, so the order does not depend on the sorting algorithm.
    keyed = random_bits(count, *key) << index_bits | np.arange(count, dtype=np.uint64)
    keyed.sort()
    return (keyed & ((np.uint64(1) << index_bits) - np.uint64(1))).astype(np.int64)
