"""Readers: a corpus cut into units that processes read independently, each giving its documents in a fixed order.

A unit is a value: some small files, a range of bytes of a JSONL file, a row group of a Parquet file, some record
batches of an Arrow file. Its documents depend on nothing else, so any process may read it, and the same document always
comes from the same place. A reader never holds more than a batch of documents.
"""

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.errors import DataError

# Why a document may be left out; the counts are reported.
EMPTY = "empty"
NOT_TEXT = "not UTF-8 text"
SKIP_REASONS = (EMPTY, NOT_TEXT)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BATCH_ROWS = 256


class Document(NamedTuple):
    """A document, or with `skipped` the reason for its absence; `size` is its part of the unit, in source bytes."""

    text: str
    size: int
    skipped: str = ""


class Unit(Protocol):
    """A part of a corpus that one process reads alone."""

    @property
    def size(self) -> int:
        """Source bytes, for the progress bar."""

    def documents(self) -> Iterator[Document]:
        """The documents in order. Raises DataError naming the file when it cannot be read as what it is."""


@dataclass(frozen=True)
class TextFiles:
    """Whole files, one document each."""

    paths: tuple[Path, ...]
    size: int

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            content = path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                text = "\0"
            # No text file holds a NUL; many binary files that decode by chance do.
            yield Document("", len(content), NOT_TEXT) if "\0" in text else _document(text, len(content))


@dataclass(frozen=True)
class JsonLines:
    """The lines of a JSONL file that begin in the bytes from `start` to `stop`."""

    path: Path
    start: int
    stop: int
    text_key: str

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[Document]:
        with open(self.path, "rb") as file:
            # A line that begins before `start` belongs to the unit before.
            position = self.start
            if position:
                file.seek(position - 1)
                position += len(file.readline()) - 1
            while position < self.stop and (line := file.readline()):
                if line.strip():
                    yield _document(self._text(line, position), len(line))
                position += len(line)

    def _text(self, line: bytes, position: int) -> str:
        try:
            return _json_text(line, self.text_key)
        except DataError as error:
            number = 1 + _count_lines(self.path, position)
            raise DataError(f"{self.path} line {number} {error}") from error


@dataclass(frozen=True)
class CompressedJsonLines:
    """A whole compressed JSONL file: it can be read from its beginning only."""

    path: Path
    compression: str
    text_key: str
    size: int

    def documents(self) -> Iterator[Document]:
        import pyarrow

        with open(self.path, "rb") as raw, _damage_named(self.path, OSError):
            # Unlike `zstandard`, Arrow raises when the file ends too early.
            file = io.BufferedReader(pyarrow.CompressedInputStream(raw, self.compression), 1 << 20)
            position = 0
            for number, line in enumerate(file, 1):
                before, position = position, raw.tell()
                if line.strip():
                    yield _document(self._text(line, number), position - before)

    def _text(self, line: bytes, number: int) -> str:
        try:
            return _json_text(line, self.text_key)
        except DataError as error:
            raise DataError(f"{self.path} line {number} {error}") from error


@dataclass(frozen=True)
class ParquetGroup:
    """One row group of a Parquet file."""

    path: Path
    group: int
    text_key: str
    size: int

    def documents(self) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        with _damage_named(self.path, OSError, pyarrow.ArrowException):
            file = pyarrow.parquet.ParquetFile(self.path)
            rows = file.metadata.row_group(self.group).num_rows
            batches = file.iter_batches(_BATCH_ROWS, [self.group], [self.text_key], use_threads=False)
            yield from _rows((batch.column(0) for batch in batches), self.size, rows)


@dataclass(frozen=True)
class ArrowBatches:
    """Record batches `start` to `stop` of an Arrow stream file, the format of `datasets`."""

    path: Path
    start: int
    stop: int
    rows: int
    text_key: str
    size: int

    def documents(self) -> Iterator[Document]:
        import pyarrow

        with _damage_named(self.path, OSError, pyarrow.ArrowException), pyarrow.memory_map(str(self.path)) as file:
            reader = pyarrow.ipc.open_stream(file)
            columns = (batch.column(self.text_key) for batch in islice(reader, self.start, self.stop))
            slices = (column[at : at + _BATCH_ROWS] for column in columns for at in range(0, len(column), _BATCH_ROWS))
            yield from _rows(slices, self.size, self.rows)


def text_units(paths: Iterable[tuple[Path, int]], unit_bytes: int) -> Iterator[Unit]:
    """Groups files, given with their sizes, into units of about `unit_bytes`."""
    group: list[Path] = []
    total = 0
    for path, size in paths:
        group.append(path)
        total += size
        if total >= unit_bytes:
            yield TextFiles(tuple(group), total)
            group, total = [], 0
    if group:
        yield TextFiles(tuple(group), total)


def jsonl_units(path: Path, size: int, text_key: str, unit_bytes: int) -> Iterator[Unit]:
    """Byte ranges of a JSONL file; a compressed one is a single unit."""
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        yield CompressedJsonLines(path, compression, text_key, size)
        return
    for start in range(0, size, unit_bytes):
        yield JsonLines(path, start, min(start + unit_bytes, size), text_key)


def parquet_units(path: Path, size: int, text_key: str) -> Iterator[Unit]:
    """The row groups of a Parquet file. Raises DataError when it is damaged or has no such text column."""
    import pyarrow
    import pyarrow.parquet

    with _damage_named(path, OSError, pyarrow.ArrowException):
        file = pyarrow.parquet.ParquetFile(path)
        _check_text_column(path, file.schema_arrow, text_key)
        rows = file.metadata.num_rows
        for group in range(file.num_row_groups):
            share = size * file.metadata.row_group(group).num_rows // max(rows, 1)
            yield ParquetGroup(path, group, text_key, share)


def arrow_units(path: Path, text_key: str, unit_bytes: int) -> Iterator[Unit]:
    """Runs of record batches of an Arrow stream file. Raises DataError when it is damaged or has no text column."""
    import pyarrow

    with _damage_named(path, OSError, pyarrow.ArrowException), pyarrow.memory_map(str(path)) as file:
        reader = pyarrow.ipc.open_stream(file)
        _check_text_column(path, reader.schema, text_key)
        start = rows = size = stop = 0
        for stop, batch in enumerate(reader, 1):
            rows += batch.num_rows
            size += batch.column(text_key).nbytes
            if size >= unit_bytes:
                yield ArrowBatches(path, start, stop, rows, text_key, size)
                start, rows, size = stop, 0, 0
        if rows:
            yield ArrowBatches(path, start, stop, rows, text_key, size)


def _document(text: str, size: int) -> Document:
    try:
        text.encode()
    # JSON can spell half a surrogate pair, which is no character.
    except UnicodeEncodeError:
        return Document("", size, NOT_TEXT)
    return Document(text, size, "" if text else EMPTY)


def _rows(columns: Iterable[Any], size: int, rows: int) -> Iterator[Document]:
    """The values of Arrow columns; each takes an equal share of `size`."""
    share, rest = divmod(size, max(rows, 1))
    for column in columns:
        for value in column.to_pylist():
            yield _document(value or "", share + (rest > 0))
            rest -= 1


def _json_text(line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON ({error}); repair the file") from error
    if not isinstance(record, dict) or text_key not in record:
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else "no keys at all"
        raise DataError(f"has no key {text_key!r} (it has {keys}); name the key of the text with --text-key")
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"has a {type(text).__name__} at {text_key!r}, where text belongs; name its key with --text-key"
        )
    return text or ""


def _check_text_column(path: Path, schema: Any, text_key: str) -> None:
    from pyarrow import types

    if text_key not in schema.names:
        columns = ", ".join(map(repr, schema.names))
        raise DataError(f"{path} has no column {text_key!r} (it has {columns}); name the column with --text-key")
    kind = schema.field(text_key).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(
            f"{path} has {kind} in column {text_key!r}, where text belongs; name its column with --text-key"
        )


def _count_lines(path: Path, stop: int) -> int:
    """How many lines end in the first `stop` bytes."""
    lines = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 20))):
            lines += block.count(b"\n")
            stop -= len(block)
    return lines


@contextmanager
def _damage_named(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns the errors of a format's library into a DataError that names the file."""
    caught: tuple[type[Exception], ...] = (*errors, UnicodeDecodeError)
    try:
        yield
    except caught as error:
        # A missing file or one we may not read is reported as such.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{path} is damaged ({error}); copy it again") from error
