"""Small token datasets for tests, written without `prepare`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.dataset import TokenDataset, open_dataset
from data.shards import DatasetIndex, ShardEntry, TokenizerEntry, write_index, write_shard

EOS, FIM_BEGIN, FIM_HOLE, FIM_END = 0, 1, 2, 3
FIRST_TOKEN = 4
VOCAB_SIZE = 50_000

Documents = Sequence[Sequence[int]]


def tokenizer_entry(sha256: str = "a" * 64, vocab_size: int = VOCAB_SIZE) -> TokenizerEntry:
    """An entry for a tokenizer whose file is never read."""
    return TokenizerEntry("tokenizer.json", sha256, vocab_size, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)


def write_dataset(
    folder: Path,
    train: Sequence[Documents],
    validation: Sequence[Documents] = (),
    *,
    dtype: str = "uint16",
    tokenizer: TokenizerEntry | None = None,
) -> None:
    """Writes shards of documents, which end in EOS, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {
        name: tuple(
            _write_shard(folder / f"{name}-{number:05d}.safetensors", documents, dtype)
            for number, documents in enumerate(shards)
        )
        for name, shards in (("train", train), ("validation", validation))
    }
    write_index(folder, DatasetIndex(tokenizer or tokenizer_entry(), dtype, splits))


def make_dataset(folder: Path, train: Sequence[Documents], *, dtype: str = "uint16") -> TokenDataset:
    """Writes a dataset and opens its training split."""
    write_dataset(folder, train, dtype=dtype)
    return open_dataset(folder, vocab_size=VOCAB_SIZE)


def documents_of(lengths: Sequence[Sequence[int]]) -> list[list[list[int]]]:
    """Shards of documents of these lengths, EOS included, in which no other token comes twice."""
    fresh = iter(range(FIRST_TOKEN, VOCAB_SIZE))
    return [[[next(fresh) for _ in range(length - 1)] + [EOS] for length in shard] for shard in lengths]


def _write_shard(path: Path, documents: Documents, dtype: str) -> ShardEntry:
    tokens = np.array([token for document in documents for token in document], dtype)
    ends = np.cumsum([len(document) for document in documents], dtype=np.uint64)
    return write_shard(path, tokens, ends, text_bytes=len(tokens))
