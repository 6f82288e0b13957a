"""What can happen to the files of a checkpoint: accidents of disks and of people, and files made on purpose."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

KINDS = ("bit flip", "truncation", "older file", "missing file", "hostile pickle", "hostile JSON", "header bomb")


class Touch:
    """Unpickled where that is allowed, it leaves a file."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self._canary), os.O_CREAT | os.O_WRONLY)


def damage(kind: str, folder: Path, older: Path, canary: Path, choose: random.Random) -> Path:
    """Does to one of the files in `folder` what `kind` says; returns its path. `older` holds another checkpoint of the
    same run. The file is never as it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if kind == "older file":
        swaps = [path for path in files if (older / path.relative_to(folder)).is_file()]
        files = [path for path in swaps if (older / path.relative_to(folder)).read_bytes() != path.read_bytes()]
    path = choose.choice(files)
    content = path.read_bytes()
    path.unlink()
    if kind == "missing file":
        pass
    elif kind == "older file":
        path.write_bytes((older / path.relative_to(folder)).read_bytes())
    elif kind == "bit flip":
        place = choose.randrange(len(content))
        flipped = bytes([content[place] ^ 1 << choose.randrange(8)])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
    elif kind == "truncation":
        path.write_bytes(content[: choose.randrange(len(content))])
    elif kind == "hostile pickle":
        path.write_bytes(_pickled(canary, choose))
    elif kind == "hostile JSON":
        path.write_bytes(hostile_json(choose))
    else:
        path.write_bytes(header_bomb(content, choose))
    return path


def hostile_json(choose: random.Random) -> bytes:
    """Valid or not, and nothing that was ever saved."""
    texts = (
        "[" * choose.randint(1, 200_000), '{"seal":' * choose.randint(1, 50_000), "{}", "[]", "null", '""', "1e999",
        "9" * choose.randint(1, 10_000), '{"files": {"../../etc/passwd": {"bytes": 1, "checksum": ""}}, "seal": ""}',
        '{"__class__": "os.system", "__reduce__": ["touch"], "seal": null}', '{"seal": NaN}', "\ufeff{}", '{"a":1}{',
    )  # fmt: skip
    return choose.choice(texts).encode()


def header_bomb(content: bytes, choose: random.Random) -> bytes:
    """A safetensors file whose header promises more than there is."""
    size = choose.choice([2**64 - 1, 2**63, 2**40, len(content) * 2, 99_999_999])
    if choose.random() < 0.5:
        return size.to_bytes(8, "little") + content[8:]
    entry = {"dtype": "F32", "shape": [choose.choice([size, -1, 2**31]), 2**33], "data_offsets": [0, size]}
    header = json.dumps({"param/w@0": entry}).encode()
    return len(header).to_bytes(8, "little") + header + content[-1000:]


def _pickled(canary: Path, choose: random.Random) -> bytes:
    """A pickle that would run code, bare or as what torch.save writes."""
    import io
    import pickle

    import torch

    if choose.random() < 0.5:
        return pickle.dumps(Touch(canary))
    file = io.BytesIO()
    torch.save({"state": Touch(canary)}, file)
    return file.getvalue()
