"""Parts: what `prepare` leaves on disk between tokenising and merging, one file for each unit of work.

A part appears under its name only when its unit is finished, so after a kill the parts that exist are exactly the work
that need not be done again. It is a run of frames, a few MB each, so that nobody has to hold
a whole part.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.readers import SKIP_REASONS
from data.shards import Tokens

_HEADER_FIELDS = 2 + len(SKIP_REASONS)
_U64 = np.dtype("<u8")

Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Frame:
    """A batch of N tokenised documents of T tokens in all.

    `tokens` [T] is empty when only the rest was read. `lengths`, `text_bytes` (of UTF-8) and `hashes` (of the text) are
    all [N]; `skipped` counts documents left out, in the order of `SKIP_REASONS`.
    """

    tokens: Tokens
    lengths: Numbers
    text_bytes: Numbers
    hashes: Numbers
    skipped: tuple[int, ...]


def part_path(folder: Path, number: int) -> Path:
    """Where the part of unit `number` lies."""
    return folder / f"{number:08d}.part"


def write_frame(file: BinaryIO, frame: Frame) -> None:
    """Appends a frame."""
    header = np.array([len(frame.lengths), len(frame.tokens), *frame.skipped], _U64)
    for array in (header, frame.lengths, frame.text_bytes, frame.hashes, frame.tokens):
        file.write(array.tobytes())


def read_frames(path: Path, dtype: np.dtype[Any], with_tokens: bool) -> Iterator[Frame]:
    """The frames of a part, in order. Raises DataError when it ends too early."""
    with open(path, "rb") as file:
        while head := file.read(_HEADER_FIELDS * _U64.itemsize):
            documents, tokens, *skipped = (int(value) for value in np.frombuffer(head, _U64))
            lengths, text_bytes, hashes = (_read(file, path, _U64, documents) for _ in range(3))
            if not with_tokens:
                file.seek(tokens * dtype.itemsize, 1)
            body = _read(file, path, dtype, tokens if with_tokens else 0)
            yield Frame(body, lengths, text_bytes, hashes, tuple(skipped))


def _read(file: BinaryIO, path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    content = file.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise DataError(f"{path} is damaged: it ends too early; start again with --restart")
    return np.frombuffer(content, dtype)
