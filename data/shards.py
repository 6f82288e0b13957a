"""Token shards: how a tokenised corpus lies on disk, and how it is mapped into memory.

A dataset is a folder:

    dataset.json                 the index: tokenizer, dtype and, per split, the shards with their checksums
    tokenizer.model | .json      the tokenizer the tokens were made with
    train-00000.safetensors      tokens [T] (uint16 or uint32) and ends [N] (uint64)
    validation-00000.safetensors

`ends[i]` is the offset just past document i, whose last token is always end-of-document. Shards are plain safetensors
files, so any tool can read them; nothing is ever unpickled. Sizes and the checksum of the index itself are checked when
a dataset is opened, checksums of shards by `verify_shard`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import save

from data.errors import DataError

FORMAT = "eva-tokens"
VERSION = 1
INDEX_NAME = "dataset.json"
SPLITS = ("train", "validation")
_MAX_HEADER_BYTES = 1 << 20
_NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer made the tokens. `sha256` is that of the file; the others are token ids."""

    file: str
    sha256: str
    vocab_size: int
    eos: int
    fim_begin: int
    fim_hole: int
    fim_end: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard of the index. `text_bytes` is the size of the source text as UTF-8."""

    file: str
    sha256: str
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class DatasetIndex:
    """The content of dataset.json."""

    tokenizer: TokenizerEntry
    dtype: str
    splits: Mapping[str, tuple[ShardEntry, ...]]
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True)
class Shard:
    """A shard mapped into memory: `tokens` [T] and `ends` [N], read-only."""

    path: Path
    tokens: Tokens
    ends: npt.NDArray[np.uint64]

    @property
    def num_documents(self) -> int:
        """How many documents the shard holds."""
        return len(self.ends)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned type that holds every id of a vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path, tokens: Tokens, ends: npt.NDArray[np.uint64], text_bytes: int) -> ShardEntry:
    """Writes a shard complete or not at all, and returns its entry for the index.

    `tokens` [T] holds the documents one after another, `ends` [N] the offset past each of them.
    """
    # A single key: safetensors writes several in random order.
    payload = save({"tokens": tokens, "ends": ends}, metadata={"format": f"{FORMAT} {VERSION}"})
    write_atomically(path, payload)
    return ShardEntry(path.name, hashlib.sha256(payload).hexdigest(), len(tokens), len(ends), text_bytes)


def write_index(folder: Path, index: DatasetIndex) -> None:
    """Writes dataset.json; a dataset without it does not exist yet."""
    write_sealed_json(folder / INDEX_NAME, asdict(index))


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes beside, fsyncs and renames, so that a reader never sees half a file."""
    with open_atomically(path) as file:
        file.write(payload)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece, which takes its name only when the block ends without an error."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object as JSON together with a checksum of itself, the key `seal`."""
    write_atomically(path, sealed_json(content))


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """An object as JSON together with a checksum of itself, the key `seal`."""
    return (json.dumps({**content, "seal": _seal(content)}, indent=2) + "\n").encode()


def read_sealed_json(path: Path, *, remedy: str = "prepare the dataset again") -> dict[str, Any]:
    """Reads what `write_sealed_json` wrote. Raises DataError, with the remedy, when it is not that, byte for byte."""
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        del content["seal"]
        is_whole = sealed_json(content) == raw
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({_first_line(error)}); {remedy}") from error
    if not is_whole:
        raise DataError(f"{path} is damaged or was edited: its checksum does not fit; {remedy}")
    return content


def is_plain_name(name: str) -> bool:
    """Whether a name read from an index can only be that of a file in the index's own folder."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


def read_index(folder: Path) -> DatasetIndex:
    """Reads and checks dataset.json. Raises DataError when it is missing, damaged or of another version."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(f"no dataset at {folder}: {INDEX_NAME} is missing; make one with `python -m data prepare`")
    raw = read_sealed_json(path)
    if (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {raw.get('format')!r} version {raw.get('version')!r}, this program reads "
            f"{FORMAT!r} version {VERSION}; prepare the dataset again"
        )
    try:
        index = TypeAdapter(DatasetIndex).validate_python(raw)
    except ValidationError as error:
        raise DataError(f"{path} is damaged ({_first_line(error)}); prepare the dataset again") from error
    _check_names(path, index)
    return index


def open_shard(folder: Path, entry: ShardEntry, dtype: str) -> Shard:
    """Maps one shard, checking header, sizes and offsets (not the checksum). Raises DataError naming the file."""
    path = folder / entry.file
    if not path.is_file():
        raise DataError(f"shard {path} is missing; copy it again, or prepare the dataset again")
    arrays = _map_safetensors(path)
    if set(arrays) != {"tokens", "ends"}:
        raise DataError(f"shard {path} holds {sorted(arrays)} where 'tokens' and 'ends' belong; it is damaged")
    tokens, ends = arrays["tokens"], arrays["ends"]
    if tokens.dtype != np.dtype(dtype) or ends.dtype != np.uint64:
        raise DataError(f"shard {path} holds {tokens.dtype} tokens, the index says {dtype}; it is damaged")
    if (len(tokens), len(ends)) != (entry.tokens, entry.documents):
        raise DataError(
            f"shard {path} holds {len(tokens)} tokens in {len(ends)} documents, the index says "
            f"{entry.tokens} in {entry.documents}; copy it again"
        )
    signed_ends = ends.astype(np.int64)
    if len(ends) and (signed_ends[-1] != len(tokens) or np.any(np.diff(signed_ends, prepend=0) <= 0)):
        raise DataError(f"shard {path} has document ends that do not rise to its {len(tokens)} tokens; it is damaged")
    return Shard(path, tokens, ends)


def verify_shard(folder: Path, entry: ShardEntry) -> None:
    """Compares the file with its checksum. Raises DataError naming the file."""
    path = folder / entry.file
    if not path.is_file():
        raise DataError(f"shard {path} is missing; copy it again, or prepare the dataset again")
    found = file_sha256(path)
    if found != entry.sha256:
        raise DataError(
            f"shard {path} is damaged: its sha256 is {found[:16]}…, the index says {entry.sha256[:16]}…; copy it again"
        )


def _map_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read-only memory maps of the 1-D integer tensors of a safetensors file, header checked against its size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if not 2 <= header_size <= min(_MAX_HEADER_BYTES, size - 8):
            raise DataError(f"shard {path} is damaged: its header cannot be {header_size} bytes; copy it again")
        raw = file.read(header_size)
    start = 8 + header_size
    arrays: dict[str, npt.NDArray[Any]] = {}
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            (count,), (begin, end) = map(int, tensor["shape"]), map(int, tensor["data_offsets"])
            dtype = _NUMPY_TYPES[tensor["dtype"]]
            if not (count >= 0 and 0 <= begin <= end <= size - start and end - begin == count * dtype.itemsize):
                raise DataError(f"shard {path} is damaged: tensor {name!r} lies outside the file; copy it again")
            # np.memmap refuses empty arrays.
            mapped = np.memmap(path, dtype, "r", start + begin, (count,)) if count else np.empty((0,), dtype)
            arrays[str(name)] = mapped
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"shard {path} is damaged: its header is unreadable; copy it again") from error
    return arrays


def _check_names(path: Path, index: DatasetIndex) -> None:
    """Every file named by the index lies in the dataset's own folder, and every number makes sense."""
    tokenizer = index.tokenizer
    ids = (tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)
    if min(ids) < -1 or max(ids) >= tokenizer.vocab_size or tokenizer.eos < 0:
        raise DataError(f"{path} has special tokens {ids} in a vocabulary of {tokenizer.vocab_size}; it is damaged")
    entries = [entry for split in index.splits.values() for entry in split]
    for name in [tokenizer.file, *(entry.file for entry in entries)]:
        if not is_plain_name(name):
            raise DataError(f"{path} names {name!r}, which is not a file of its own folder; the index is damaged")
    if index.dtype not in ("uint16", "uint32") or set(index.splits) - set(SPLITS):
        raise DataError(f"{path} has dtype {index.dtype!r} and splits {sorted(index.splits)}; the index is damaged")
    if any(min(entry.tokens, entry.documents, entry.text_bytes) < 0 for entry in entries):
        raise DataError(f"{path} has a shard of negative size; the index is damaged")


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
