"""One split of a dataset folder, checked before anything is read from it.

Opening reads the index and the size of every file, so it costs the same for short and long shards; shards are mapped
when the order first reaches them. `verify` reads everything once, shared out over the ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.errors import DataError
from data.shards import DatasetIndex, Shard, ShardEntry, TokenizerEntry, open_shard, read_index, verify_shard


@dataclass(frozen=True)
class TokenDataset:
    """The shards of one split that hold documents. Made by `open_dataset`."""

    folder: Path
    split: str
    index: DatasetIndex
    shards: tuple[ShardEntry, ...]

    @property
    def tokenizer(self) -> TokenizerEntry:
        """The tokenizer of the dataset, with the ids of its special tokens."""
        return self.index.tokenizer

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the split, end-of-document tokens included."""
        return sum(entry.tokens for entry in self.shards)

    @cached_property
    def num_documents(self) -> int:
        """Documents of the split."""
        return sum(entry.documents for entry in self.shards)

    def open_shard(self, number: int) -> Shard:
        """Maps one shard. Raises DataError when it is damaged."""
        return open_shard(self.folder, self.shards[number], self.index.dtype)

    def verify(
        self, part: int = 0, num_parts: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Checks layout and checksum of every `num_parts`-th shard, from number `part` on.

        `progress(done, total)` is called after each shard. Raises DataError naming the first damaged file.
        """
        entries = self.shards[part::num_parts]
        for done, entry in enumerate(entries, 1):
            verify_shard(self.folder, entry)
            open_shard(self.folder, entry, self.index.dtype)
            progress(done, len(entries))


def open_dataset(folder: Path, split: str = "train", *, vocab_size: int) -> TokenDataset:
    """Opens one split for a model of `vocab_size` ids.

    Raises DataError when the dataset is missing, damaged, empty, or made for a larger vocabulary.
    """
    index = read_index(folder)
    if index.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"dataset {folder} has {index.tokenizer.vocab_size} token ids, but model.vocab_size = {vocab_size}; "
            f"set it to at least {index.tokenizer.vocab_size}, or prepare the dataset with the model's tokenizer"
        )
    shards = tuple(entry for entry in index.splits.get(split, ()) if entry.documents)
    if not shards:
        raise DataError(f"dataset {folder} has no documents in split {split!r}; prepare it from a larger source")
    token_size = {"uint16": 2, "uint32": 4}[index.dtype]
    for entry in shards:
        _check_size(folder / entry.file, entry.tokens * token_size + entry.documents * 8)
    return TokenDataset(folder, split, index, shards)


def check_alike(datasets: Sequence[TokenDataset]) -> None:
    """Raises DataError unless all datasets of a mixture were made with one tokenizer and hold one type of tokens."""
    first = datasets[0]
    for other in datasets[1:]:
        if other.tokenizer.sha256 != first.tokenizer.sha256:
            raise DataError(
                f"datasets {first.folder} and {other.folder} were made with different tokenizers "
                f"({first.tokenizer.sha256[:16]}… and {other.tokenizer.sha256[:16]}…); prepare both with the same one"
            )
        if other.index.dtype != first.index.dtype:
            raise DataError(
                f"datasets {first.folder} and {other.folder} hold tokens of different types ({first.index.dtype} and "
                f"{other.index.dtype}); prepare both with this program"
            )


def _check_size(path: Path, payload: int) -> None:
    """The file exists and is long enough for the tokens and documents that the index promises."""
    if not path.is_file():
        raise DataError(f"shard {path} is missing; copy it again, or prepare the dataset again")
    size = path.stat().st_size
    if size < payload:
        raise DataError(f"shard {path} has {size} bytes, its tokens alone need {payload}; it is cut off, copy it again")
