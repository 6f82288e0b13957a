"""Showing a dataset: how much there is, how long its documents are, and what some of them say."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.shards import DatasetIndex, Shard, ShardEntry, open_shard, read_index
from data.tokenizer import tokenizer_from_entry

if TYPE_CHECKING:
    from rich.console import Console

_PERCENTILES = (0, 10, 50, 90, 99, 100)
_BAR_WIDTH = 40
_SAMPLE_TOKENS = 200
# A document must not be able to steer the terminal.
_VISIBLE = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t\r"}


def show(folder: Path, split: str, num_samples: int, console: "Console") -> None:
    """Prints statistics of every split and `num_samples` decoded documents of one, evenly spread over it."""
    index = read_index(folder)
    if split not in index.splits:
        raise DataError(f"--split is {split!r}, but {folder} has {', '.join(index.splits)}")
    shards = {name: [open_shard(folder, entry, index.dtype) for entry in index.splits[name]] for name in index.splits}
    lengths = {name: _lengths(shards[name]) for name in shards}
    console.print(_overview(index, lengths))
    for name, values in lengths.items():
        if len(values):
            console.print(_histogram(name, values))
    if num_samples:
        _print_samples(folder, index, shards[split], split, num_samples, console)


def _lengths(shards: Sequence[Shard]) -> npt.NDArray[np.int64]:
    """Tokens of every document, end-of-document included."""
    of_shards = [np.diff(shard.ends.astype(np.int64), prepend=0) for shard in shards]
    return np.concatenate([np.empty(0, np.int64), *of_shards])


def _overview(index: DatasetIndex, lengths: dict[str, npt.NDArray[np.int64]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    tokenizer = index.tokenizer
    fim = "with FIM tokens" if tokenizer.fim_begin >= 0 else "without FIM tokens"
    table = Table(title=Text(f"{index.dtype} tokens of {tokenizer.file}: {tokenizer.vocab_size:,} entries, {fim}"))
    names = ["shards", "documents", "tokens", "text", "bytes per token"]
    names += [f"length, percentile {percentile}" for percentile in _PERCENTILES]
    columns = [[*_amounts(index.splits[split]), *_percentiles(values)] for split, values in lengths.items()]
    table.add_column("")
    for split in lengths:
        table.add_column(split, justify="right")
    for row in zip(names, *columns, strict=True):
        table.add_row(*row)
    return table


def _percentiles(lengths: npt.NDArray[np.int64]) -> list[str]:
    if not len(lengths):
        return ["–"] * len(_PERCENTILES)
    return [f"{int(value):,}" for value in np.percentile(lengths, _PERCENTILES)]


def _amounts(entries: Sequence[ShardEntry]) -> list[str]:
    from rich.filesize import decimal

    documents = sum(entry.documents for entry in entries)
    tokens = sum(entry.tokens for entry in entries)
    text_bytes = sum(entry.text_bytes for entry in entries)
    # End-of-document tokens stand for no text.
    ratio = f"{text_bytes / (tokens - documents):.3f}" if tokens > documents else "–"
    return [str(len(entries)), f"{documents:,}", f"{tokens:,}", decimal(text_bytes), ratio]


def _histogram(split: str, lengths: npt.NDArray[np.int64]) -> Any:
    """How many documents have a length between two powers of two."""
    from rich.table import Table

    counts = np.bincount(np.log2(lengths).astype(np.int64))
    first = int(np.flatnonzero(counts)[0])
    table = Table(title=f"length of {split} documents, in tokens", box=None, show_header=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for power in range(first, len(counts)):
        bar = "█" * -(-int(counts[power]) * _BAR_WIDTH // int(counts.max()))
        table.add_row(f"{1 << power:,} – {(2 << power) - 1:,}", f"{counts[power]:,}", bar)
    return table


def _print_samples(
    folder: Path, index: DatasetIndex, shards: Sequence[Shard], split: str, num_samples: int, console: "Console"
) -> None:
    from rich.panel import Panel
    from rich.text import Text

    tokenizer = tokenizer_from_entry(folder, index.tokenizer)
    places = [(shard, number) for shard in shards for number in range(shard.num_documents)]
    for choice in np.linspace(0, len(places) - 1, min(num_samples, len(places))).astype(int):
        shard, number = places[choice]
        start = int(shard.ends[number - 1]) if number else 0
        tokens = shard.tokens[start : int(shard.ends[number]) - 1]
        text = tokenizer.decode(tokens[:_SAMPLE_TOKENS]).translate(_VISIBLE)
        title = f"{split} document {choice}: {len(tokens):,} tokens"
        more = f"… {len(tokens) - _SAMPLE_TOKENS:,} more" if len(tokens) > _SAMPLE_TOKENS else None
        console.print(Panel(Text(text), title=title, subtitle=more))
