"""Files of tensors with a checksum of every part: safetensors, whose metadata has that of each tensor by its key.

    8 bytes       length of the header, little-endian
    header        JSON: key → dtype, shape, place; "__metadata__": key → checksum of the tensor's bytes
    tensors       one after another, with nothing between them

So the checksum of the first two parts vouches for the whole file, and names what is damaged: the header or a tensor. A
checksum is XXH3 of 128 bits, which is several times as fast as a disk; it is there against accidents. A header is read
as if an enemy had written it, too: nothing in it makes this process take memory or read beyond the file.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8
_PIECE_BYTES = 1 << 22


class FileDamage(ValueError):
    """What is wrong with a file, in words that follow its name."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `begin` and `end` are offsets in the file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    checksum: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def checksum(payload: Any) -> str:
    """The checksum of anything with bytes, as 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(payload))


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes tensors of any device and makes sure that they are on disk. Returns the size of the file in bytes and the
    checksum of its header. Raises OSError."""
    # A tensor must begin at a multiple of the size of its elements.
    keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
    header_size = len(_header(keys, tensors, dict.fromkeys(keys, "0" * 32)))
    size = header_size + sum(tensor.nbytes for tensor in tensors.values())
    checksums = {}
    # Neither writing nor summing holds Python's lock, so the two go on side by side.
    with new_file(path) as descriptor, ThreadPoolExecutor(1) as beside:
        # What is not written yet reads as zeros.
        os.lseek(descriptor, header_size, os.SEEK_SET)
        for key in keys:
            content = _bytes_of(tensors[key])
            found = beside.submit(checksum, content)
            _write(descriptor, content)
            checksums[key] = found.result()
        header = _header(keys, tensors, checksums)
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write(descriptor, memoryview(header))
    return size, checksum(header)


def write_small_file(path: Path, payload: bytes) -> tuple[int, str]:
    """Writes a file and makes sure that it is on disk. Returns its size and checksum. Raises OSError."""
    with new_file(path) as descriptor:
        _write(descriptor, memoryview(payload))
    return len(payload), checksum(payload)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """The descriptor of a file to be written, which is on disk after the block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(path: Path, size: int, expected: str) -> list[StoredTensor]:
    """The tensors of a file that should have `size` bytes and a header with the checksum `expected`, in the order in
    which they lie there. Raises FileDamage, OSError."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise FileDamage(f"has {found:,} bytes instead of {size:,}")
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise FileDamage(f"has a header that cannot be {length:,} bytes long")
        header = file.read(length)
    if checksum(start + header) != expected:
        raise FileDamage("has a header that does not match its checksum")
    return list(_parse(header, size))


def check_tensor(path: Path, stored: StoredTensor) -> None:
    """Compares a tensor with its checksum. Raises FileDamage, OSError."""
    found = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_PIECE_BYTES, stored.end - stored.begin)))
        for begin in range(stored.begin, stored.end, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, stored.end - begin)]
            _read(file.fileno(), piece, begin)
            found.update(piece)
    if found.hexdigest() != stored.checksum:
        raise FileDamage(f"is damaged in {stored.key}, which does not match its checksum")


def read_elements(path: Path, stored: StoredTensor, start: int, out: Tensor) -> None:
    """Fills the flat CPU tensor `out`, of the dtype of the stored one, with its elements from `start` on. Raises
    FileDamage if the file ends before, OSError."""
    assert start >= 0
    assert start + out.numel() <= stored.numel
    with open(path, "rb", buffering=0) as file:
        _read(file.fileno(), _bytes_of(out), stored.begin + start * stored.dtype.itemsize)


def _header(keys: list[str], tensors: Mapping[str, Tensor], checksums: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {_METADATA: checksums}
    begin = 0
    for key in keys:
        tensor = tensors[key]
        end = begin + tensor.nbytes
        content[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(header: bytes, size: int) -> Iterator[StoredTensor]:
    start = 8 + len(header)
    reached = start
    try:
        content = json.loads(header)
        checksums = content.pop(_METADATA)
        for key, entry in content.items():
            shape, (begin, end) = _shape(entry["shape"]), _shape(entry["data_offsets"])
            stored = StoredTensor(key, _DTYPES[entry["dtype"]], shape, start + begin, start + end, checksums[key])
            if stored.begin != reached or stored.end > size or end - begin != stored.numel * stored.dtype.itemsize:
                raise FileDamage(f"has a header that puts {key[:100]!r} where it cannot be")
            if not isinstance(stored.checksum, str):
                raise FileDamage(f"has no checksum of {key[:100]!r}")
            reached = stored.end
            yield stored
    except FileDamage:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileDamage(f"has a header that cannot be read ({type(error).__name__})") from error
    if reached != size:
        raise FileDamage(f"has {size - reached:,} bytes that its header does not know")


def _shape(values: Any) -> tuple[int, ...]:
    if len(values) > _MAX_DIMS:
        raise ValueError(f"{len(values)} dimensions")
    return tuple(map(_count, values))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value} is no size")
    return value


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: of itself where it is contiguous on the CPU, else of a copy."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy()
    return memoryview(content)


def _write(descriptor: int, content: memoryview) -> None:
    while content.nbytes:
        content = content[os.write(descriptor, content) :]


def _read(descriptor: int, into: memoryview, offset: int) -> None:
    while into.nbytes:
        count = os.preadv(descriptor, [into], offset)
        if not count:
            raise FileDamage(f"ends at byte {offset:,}")
        into, offset = into[count:], offset + count
