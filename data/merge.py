"""Merging: the parts of a corpus, read in the order of its sources, split in two and cut into shards.

A document goes to validation when the hash of its text, read as a fraction, lies below the asked fraction. That depends
on nothing but the text: not on order, processes or other documents, and copies of one text stay on one side.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.parts import Frame, read_frames
from data.readers import SKIP_REASONS
from data.shards import SPLITS, ShardEntry, Tokens, write_shard


def text_hash(content: bytes) -> int:
    """The 64-bit hash of a document's UTF-8 text that decides its split."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Survey:
    """What the parts hold, before the split is known."""

    documents: int
    skipped: tuple[int, ...]
    lowest_hash: int
    highest_hash: int


def survey_parts(parts: Sequence[Path], dtype: np.dtype[Any]) -> Survey:
    """Counts documents and finds the range of their hashes, without reading tokens."""
    documents, skipped, lowest, highest = 0, [0] * len(SKIP_REASONS), 1 << 64, -1
    for part in parts:
        for frame in read_frames(part, dtype, with_tokens=False):
            skipped = [total + count for total, count in zip(skipped, frame.skipped, strict=True)]
            documents += len(frame.hashes)
            lowest = min(lowest, int(frame.hashes.min(initial=np.uint64(2**64 - 1))))
            highest = max(highest, int(frame.hashes.max(initial=np.uint64(0))))
    return Survey(documents, tuple(skipped), lowest, highest)


def merge_parts(
    parts: Sequence[Path],
    out: Path,
    dtype: np.dtype[Any],
    validation: float,
    shard_tokens: int,
    survey: Survey,
    report: Callable[[int], None],
) -> Mapping[str, tuple[ShardEntry, ...]]:
    """Writes all shards and returns their entries by split. Reports the bytes of every finished part."""
    limit = _hash_limit(validation, survey)
    writers = {split: _ShardWriter(out, split, dtype, shard_tokens) for split in SPLITS}
    for part in parts:
        for frame in read_frames(part, dtype, with_tokens=True):
            held_out = (frame.hashes < limit).tolist()
            rows = zip(_documents(frame), frame.text_bytes.tolist(), held_out, strict=True)
            for document, text_bytes, is_held_out in rows:
                writers["validation" if is_held_out else "train"].add(document, text_bytes)
        report(part.stat().st_size)
    for writer in writers.values():
        writer.flush()
    return {split: tuple(writer.entries) for split, writer in writers.items()}


class _ShardWriter:
    """Collects the documents of one split and writes a shard whenever the next document would not fit."""

    def __init__(self, out: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._out = out
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._start_shard()
        self.entries: list[ShardEntry] = []

    def add(self, document: Tokens, text_bytes: int) -> None:
        if self._tokens and self._tokens + len(document) > self._shard_tokens:
            self.flush()
        self._documents.append(document)
        self._tokens += len(document)
        self._ends.append(self._tokens)
        self._text_bytes += text_bytes

    def flush(self) -> None:
        if not self._documents:
            return
        path = self._out / f"{self._split}-{len(self.entries):05d}.safetensors"
        tokens = np.concatenate(self._documents, dtype=self._dtype)
        self.entries.append(write_shard(path, tokens, np.array(self._ends, np.uint64), self._text_bytes))
        self._start_shard()

    def _start_shard(self) -> None:
        self._documents: list[Tokens] = []
        self._ends: list[int] = []
        self._tokens = self._text_bytes = 0


def _hash_limit(validation: float, survey: Survey) -> np.uint64:
    """Hashes below it are for validation: at least one and never all, when it is asked for and the texts differ."""
    if not validation or survey.lowest_hash >= survey.highest_hash:
        return np.uint64(0)
    return np.uint64(min(max(int(validation * 2**64), survey.lowest_hash + 1), survey.highest_hash))


def _documents(frame: Frame) -> Iterator[Tokens]:
    ends = np.cumsum(frame.lengths).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        yield frame.tokens[start:end]
