"""A shard or index that is not exactly what was written is refused, and the message names the file."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data.errors import DataError
from data.shards import (
    INDEX_NAME,
    DatasetIndex,
    ShardEntry,
    TokenizerEntry,
    open_atomically,
    open_shard,
    read_index,
    token_dtype,
    verify_shard,
    write_index,
    write_sealed_json,
    write_shard,
)

TOKENIZER = TokenizerEntry("tokenizer.model", "0" * 64, 300, 1, 2, 3, 4)
NAME = "train-00000.safetensors"


@pytest.fixture
def entry(tmp_path: Path) -> ShardEntry:
    tokens = np.array([5, 6, 1, 7, 1], np.uint16)
    return write_shard(tmp_path / NAME, tokens, np.array([3, 5], np.uint64), 10)


def test_written_shard_is_mapped_back(tmp_path: Path, entry: ShardEntry) -> None:
    shard = open_shard(tmp_path, entry, "uint16")
    verify_shard(tmp_path, entry)
    assert shard.tokens.tolist() == [5, 6, 1, 7, 1]
    assert shard.ends.tolist() == [3, 5]
    assert shard.num_documents == 2
    assert not shard.tokens.flags.writeable
    assert set(load_file(tmp_path / NAME)) == {"tokens", "ends"}


def test_same_tokens_same_bytes(tmp_path: Path) -> None:
    arrays = np.arange(10, dtype=np.uint32), np.array([10], np.uint64)
    assert len({write_shard(tmp_path / str(number), *arrays, 0).sha256 for number in range(20)}) == 1


def test_empty_shard(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / NAME, np.empty(0, np.uint16), np.empty(0, np.uint64), 0)
    assert open_shard(tmp_path, entry, "uint16").num_documents == 0


def test_narrowest_type() -> None:
    assert [token_dtype(size).name for size in (1, 65536, 65537)] == ["uint16", "uint16", "uint32"]


def flipped(content: bytes) -> Iterator[bytes]:
    """The content with one bit wrong, once for every byte."""
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        yield bytes(damaged)


def test_every_flipped_bit_is_found(tmp_path: Path, entry: ShardEntry) -> None:
    for damaged in flipped((tmp_path / NAME).read_bytes()):
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{NAME} is damaged: its sha256 is"):
            verify_shard(tmp_path, entry)


def test_any_header_opens_or_is_refused(tmp_path: Path, entry: ShardEntry) -> None:
    """Opening does not read checksums, but whatever the first bytes say, it neither crashes nor leaves the file."""
    content = (tmp_path / NAME).read_bytes()
    messages = []
    for damaged in flipped(content[:-26]):
        (tmp_path / NAME).write_bytes(damaged + content[-26:])
        try:
            open_shard(tmp_path, entry, "uint16")
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all(NAME in message for message in messages)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, -1])
def test_truncated_shard(tmp_path: Path, entry: ShardEntry, length: int) -> None:
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{NAME} is damaged"):
        open_shard(tmp_path, entry, "uint16")
    with pytest.raises(DataError, match=NAME):
        verify_shard(tmp_path, entry)


def test_missing_shard(tmp_path: Path, entry: ShardEntry) -> None:
    (tmp_path / NAME).unlink()
    for check in (lambda: open_shard(tmp_path, entry, "uint16"), lambda: verify_shard(tmp_path, entry)):
        with pytest.raises(DataError, match=rf"{NAME} is missing"):
            check()


def hostile_shard(header: Any, payload: bytes = b"", size: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + payload


def tensor(dtype: Any = "U16", shape: Any = (1,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        hostile_shard(b"[" * 200_000),
        hostile_shard([1]),
        hostile_shard({}),
        hostile_shard({"tokens": 3}),
        hostile_shard({"tokens": tensor(dtype="PICKLE")}, b"ab"),
        hostile_shard({"tokens": tensor(dtype=["U16"])}, b"ab"),
        hostile_shard({"tokens": tensor(shape=[])}, b"ab"),
        hostile_shard({"tokens": tensor(shape=[1, 1])}, b"ab"),
        hostile_shard({"tokens": tensor(shape=[-1], offsets=[2, 0])}, b"ab"),
        hostile_shard({"tokens": tensor(offsets=[-2, 0])}, b"ab"),
        hostile_shard({"tokens": tensor(offsets=[2, 4])}, b"ab"),
        hostile_shard({"tokens": tensor(shape=[1 << 70], offsets=[0, 1 << 71])}, b"ab"),
        hostile_shard({"tokens": tensor(shape=[float("inf")])}, b"ab"),
        hostile_shard({"tokens": tensor(), "other": tensor()}, b"ab"),
        hostile_shard({"tokens": tensor(), "ends": tensor()}, b"ab"),
    ],
)
def test_hostile_header(tmp_path: Path, entry: ShardEntry, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(DataError, match=NAME):
        open_shard(tmp_path, entry, "uint16")


@pytest.mark.parametrize(
    "content",
    [hostile_shard(b"{}", size=1 << 62), hostile_shard(b" " * (2 << 20) + b"{}"), hostile_shard(b"{", size=0)],
)
def test_header_of_impossible_size_is_not_read(tmp_path: Path, entry: ShardEntry, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(DataError, match=rf"{NAME} is damaged: its header cannot be \d+ bytes"):
        open_shard(tmp_path, entry, "uint16")


@pytest.mark.parametrize("ends", [[2, 2], [3, 2], [0, 5], [3, 4], [3, 6], [3, (1 << 64) - 1]])
def test_ends_must_rise_to_the_last_token(tmp_path: Path, ends: list[int]) -> None:
    entry = write_shard(tmp_path / NAME, np.zeros(5, np.uint16), np.array(ends, np.uint64), 0)
    with pytest.raises(DataError, match=rf"{NAME} has document ends that do not rise to its 5 tokens"):
        open_shard(tmp_path, entry, "uint16")


def test_shard_that_contradicts_the_index(tmp_path: Path, entry: ShardEntry) -> None:
    with pytest.raises(DataError, match=r"holds 5 tokens in 2 documents, the index says 6 in 2"):
        open_shard(tmp_path, replace(entry, tokens=6), "uint16")
    with pytest.raises(DataError, match=r"holds uint16 tokens, the index says uint32"):
        open_shard(tmp_path, entry, "uint32")


def test_index_comes_back(tmp_path: Path, entry: ShardEntry) -> None:
    index = DatasetIndex(TOKENIZER, "uint16", {"train": (entry,), "validation": ()})
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index


def test_every_flipped_bit_of_the_index_is_found(tmp_path: Path, entry: ShardEntry) -> None:
    write_index(tmp_path, DatasetIndex(TOKENIZER, "uint16", {"train": (entry,), "validation": ()}))
    content = (tmp_path / INDEX_NAME).read_bytes()
    for damaged in flipped(content):
        (tmp_path / INDEX_NAME).write_bytes(damaged)
        if same_json(content, damaged):
            continue
        with pytest.raises(DataError, match=INDEX_NAME):
            read_index(tmp_path)


def same_json(one: bytes, other: bytes) -> bool:
    """A line end turned into a tab or so changes nothing."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, DatasetIndex], None]:
    def write(folder: Path, index: DatasetIndex) -> None:
        write_index(folder, index)
        content = json.loads((folder / INDEX_NAME).read_text())
        del content["seal"]
        change(content)
        write_sealed_json(folder / INDEX_NAME, content)

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=2), "version 2, this program reads"),
        (lambda content: content.update(format=[]), "has format"),
        (lambda content: content.update(dtype="object"), "has dtype 'object'"),
        (lambda content: content.update(splits=[1]), "is damaged"),
        (lambda content: content.update(splits={"train": 7}), "is damaged"),
        (lambda content: content.update(splits={"test": []}), "splits"),
        (lambda content: content.pop("tokenizer"), "is damaged"),
        (lambda content: content["tokenizer"].update(eos=300), "special tokens"),
        (lambda content: content["tokenizer"].update(fim_hole=-2), "special tokens"),
        (lambda content: content["tokenizer"].update(file="/etc/passwd"), "'/etc/passwd', which is not a file of"),
        (lambda content: content["splits"]["train"][0].update(file="../x"), "'../x', which is not a file of"),
        (lambda content: content["splits"]["train"][0].update(file=".."), "which is not a file of"),
        (lambda content: content["splits"]["train"][0].update(file="a\0b"), "which is not a file of"),
        (lambda content: content["splits"]["train"][0].update(file=None), "is damaged"),
        (lambda content: content["splits"]["train"][0].update(tokens=-1), "negative size"),
        (lambda content: content["splits"]["train"][0].update(tokens="many"), "is damaged"),
    ],
)
def test_hostile_index(
    tmp_path: Path, entry: ShardEntry, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edited(change)(tmp_path, DatasetIndex(TOKENIZER, "uint16", {"train": (entry,)}))
    with pytest.raises(DataError, match=rf"{INDEX_NAME} .*{re.escape(message)}"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"seal": 1}', b"\xff", b"[" * 100_000])
def test_index_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    with pytest.raises(DataError, match=rf"{INDEX_NAME} .*prepare the dataset again"):
        read_index(tmp_path)


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*; make one with `python -m data prepare`"):
        read_index(tmp_path)


def test_half_a_file_never_takes_the_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), open_atomically(path) as file:
        print("new", file=file)
    assert path.read_bytes() == b"old"
