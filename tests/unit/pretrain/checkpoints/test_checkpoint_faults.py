"""Files of checkpoints as accidents and enemies leave them: none is loaded in silence, no code is run, each is named;
and readers that meet 100,000 strange inputs raise the documented errors only.

EVA_FAULTS and EVA_FUZZ_INPUTS set how many (defaults: 500 and 100,000).
"""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from file_faults import KINDS, damage, hostile_json

from data.shards import sealed_json
from pretrain.checkpoints.checkpoint import (
    MANIFEST,
    CheckpointReader,
    CheckpointWriter,
    DamagedError,
    step_folder,
)
from pretrain.checkpoints.tensor_files import FileDamage, check_tensor, checksum, read_elements, read_header
from pretrain.errors import UserError

FAULTS = int(os.environ.get("EVA_FAULTS", "500"))
INPUTS = int(os.environ.get("EVA_FUZZ_INPUTS", "100000"))
NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, 0.5, 1e300, float("nan"))
OTHERS = ("", "F32", "F8_E4M3", "a" * 300, "\ud800", "../x", "/etc/passwd", "x\0y", None, True, [], {}, [[]], {"": {}})


def write(run: Path, step: int) -> Path:
    """A checkpoint by two ranks, of tensors as large as pages and smaller."""
    torch.manual_seed(step)
    writer = CheckpointWriter(step_folder(run, step))
    writer.begin()
    files = {}
    for rank in range(2):
        tensors = {f"{kind}/{n}@{rank * 700}": torch.randn(700) for kind in ("param", "exp_avg") for n in range(6)}
        files |= writer.write_tensors(rank, {**tensors, f"rng/cpu.{rank}@0": torch.get_rng_state()})
    config = f"[model]\nsize = {step}\n".encode()
    shapes = {str(n): (1400,) for n in range(6)}
    writer.commit(files=files, shapes=shapes, state={"step": step, "lr": 1e-05 * step}, texts={"config.toml": config})
    return writer.folder


def load(folder: Path) -> None:
    """Reads everything, verified."""
    reader = CheckpointReader(folder)
    reader.verify()
    for kind in ("param", "exp_avg", "rng"):
        for name in reader.keys(kind):
            reader.tensor(f"{kind}/{name}")
    reader.text("config.toml")


def test_no_fault_is_loaded_in_silence(tmp_path: Path) -> None:
    older, whole, canary = write(tmp_path / "run", 10), write(tmp_path / "run", 20), tmp_path / "canary"
    victim = step_folder(tmp_path / "victim", 20)
    choose = random.Random(0)
    for number in range(FAULTS):
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(whole, victim)
        kind = KINDS[number % len(KINDS)]
        path = damage(kind, victim, older, canary, choose)
        with pytest.raises(DamagedError) as raised:
            load(victim)
        assert path.name in str(raised.value), (number, kind)
    assert not canary.exists()


def put(path: Path, content: bytes) -> None:
    """A new file: some file systems write one that is emptied and filled again to the disk at once."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def mutated(raw: bytes, choose: random.Random) -> bytes:
    """Some bytes changed, removed, doubled or put in."""
    content = bytearray(raw)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(len(content) + 1)
        match choose.randrange(4):
            case 0 if place < len(content):
                content[place] = choose.choice(b'{}[]",:0129-eE.\\ \x00\xff')
            case 1:
                del content[place : place + choose.choice([1, 2, 50])]
            case 2:
                content[place:place] = content[place : place + choose.choice([1, 8, 50])]
            case _:
                content[place:place] = choose.choice([b"[" * 50, b"9" * 30, b"\\ud800", b'"a":1,', bytes(8)])
    return bytes(content)


def altered(value: Any, choose: random.Random) -> Any:
    """JSON with one of its values replaced, removed or renamed."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        match choose.randrange(8):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {(choose.choice(["", "x", "a@b", "p@-1", "p@²", "p@" + "9" * 30]) if name == key else name): item
                        for name, item in value.items()}  # fmt: skip
            case _:
                return {**value, key: altered(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        place = choose.randrange(len(value))
        return [*value[:place], altered(value[place], choose), *value[place + choose.randrange(2) :]]
    return choose.choice(NUMBERS if choose.random() < 0.6 else OTHERS)


def test_the_reader_of_manifests_raises_its_own_errors_only(tmp_path: Path) -> None:
    folder = write(tmp_path, 20)
    path, choose, accepted = folder / MANIFEST, random.Random(1), 0
    raw = path.read_bytes()
    content = json.loads(raw)
    del content["seal"]
    for number in range(INPUTS * 3 // 10):
        if number % 50 == 0:
            strange = hostile_json(choose)
        elif number % 3 == 0:
            strange = mutated(raw, choose)
        else:
            # Sealed anew, so that what it says is looked at.
            changed = altered(content, choose)
            strange = sealed_json(changed if isinstance(changed, dict) else {"files": changed})
        put(path, strange)
        with contextlib.suppress(UserError):
            reader = CheckpointReader(folder)
            if number % 10 == 0:
                reader.verify()
                for name in reader.manifest.shapes:
                    reader.parameter(name)
            accepted += 1
    assert accepted < INPUTS // 10


def test_the_reader_of_tensors_raises_its_own_errors_only(tmp_path: Path) -> None:
    whole = (write(tmp_path, 20) / "rank-00000.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    content, values = json.loads(whole[8:start]), whole[start:]
    path, choose, accepted = tmp_path / "strange.safetensors", random.Random(2), 0
    for number in range(INPUTS * 7 // 10):
        if number % 4 == 0:
            header = mutated(whole[:start], choose)
        else:
            text = json.dumps(altered(content, choose)).encode()
            length = choose.choice([len(text)] * 9 + [2**64 - 1])
            header = length.to_bytes(8, "little") + text
        put(path, header + values)
        size, length = len(header) + len(values), int.from_bytes(header[:8], "little")
        with contextlib.suppress(FileDamage):
            # The header is vouched for, so that what it says is looked at.
            for stored in read_header(path, size, checksum((header + values)[: 8 + length])):
                if number % 10 == 0:
                    read_elements(path, stored, 0, torch.empty(stored.numel, dtype=stored.dtype))
                    check_tensor(path, stored)
            accepted += 1
    assert accepted < INPUTS // 4
