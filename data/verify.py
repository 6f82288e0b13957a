"""Verifying a dataset: every byte against its checksum, every shard against the index."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.prepare import PLAN_NAME
from data.progress import progress
from data.shards import DatasetIndex, ShardEntry, open_shard, read_index, read_sealed_json, verify_shard
from data.tokenizer import tokenizer_from_entry


def verify(folder: Path) -> DatasetIndex:
    """Reads the whole dataset. Raises DataError that names every damaged or missing file."""
    index = read_index(folder)
    entries = [entry for split in index.splits.values() for entry in split]
    with progress("verifying", sum(entry.tokens * np.dtype(index.dtype).itemsize for entry in entries)) as report:
        problems = list(_problems_beside_shards(folder, index))
        for entry in entries:
            problems += _problems_of_shard(folder, index, entry)
            report(entry.tokens * np.dtype(index.dtype).itemsize)
    if problems:
        raise DataError("\n".join([f"{folder}: {len(problems)} damaged", *map(str, problems)]))
    return index


def _problems_beside_shards(folder: Path, index: DatasetIndex) -> Iterator[DataError]:
    try:
        tokenizer_from_entry(folder, index.tokenizer)
    except DataError as error:
        yield error
    # The record of how the dataset was made is not needed to use it.
    if (folder / PLAN_NAME).exists():
        try:
            read_sealed_json(folder / PLAN_NAME)
        except DataError as error:
            yield error


def _problems_of_shard(folder: Path, index: DatasetIndex, entry: ShardEntry) -> Iterator[DataError]:
    try:
        verify_shard(folder, entry)
        shard = open_shard(folder, entry, index.dtype)
        if len(shard.tokens) and int(shard.tokens.max()) >= index.tokenizer.vocab_size:
            raise DataError(f"shard {shard.path} holds tokens beyond the vocabulary of {index.tokenizer.vocab_size}")
        if np.any(shard.tokens[shard.ends.astype(np.int64) - 1] != index.tokenizer.eos):
            raise DataError(f"shard {shard.path} has documents without an end-of-document token")
    except DataError as error:
        yield error
    except OSError as error:
        yield DataError(f"shard {folder / entry.file} cannot be read ({error.strerror})")
