"""Checkpoints: complete or absent, verified, free of pickle, and independent of the layout that wrote them.

    RUN/checkpoints/step-00000100/
        rank-00000.safetensors    what rank 0 holds: ranges of flat logical tensors, each with a checksum
        config.toml  tokenizer.*  so that the folder stands alone
        manifest.json             sizes and checksums of the files, shapes, state of the run; its own checksum; last

Every parameter and optimizer state is one flat logical tensor, named `kind/name`; a file holds the range that begins at
`start` as the 1-D tensor `kind/name@start`. ZeRO's fragments and slices of stacked experts are such ranges, so any
layout can read what any other wrote. The folder is filled under another name and renamed when everything is on disk.
What is found damaged is renamed too, and never removed.

Of a file of tensors, the manifest has the checksum of the header, which has those of the tensors; of any other, the
checksum of the whole.
"""

import errno
import math
import os
import re
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from data.errors import DataError
from data.shards import is_plain_name, read_sealed_json, sealed_json
from pretrain.checkpoints.tensor_files import (
    FileDamage,
    StoredTensor,
    check_tensor,
    checksum,
    read_elements,
    read_header,
    sync_folder,
    write_small_file,
    write_tensor_file,
)
from pretrain.errors import UserError

FORMAT = "eva-checkpoint"
VERSION = 2
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"
_REPLACED = f".replaced{_PARTIAL}"
_DAMAGED = ".damaged"
_TENSORS = ".safetensors"
_MAX_THREADS = 8
_MAX_MANIFEST_BYTES = 1 << 28
_MAX_DIMS = 8
# What the system says of a file that cannot be what was saved, whoever reads it.
_DAMAGE = (errno.EIO, errno.EISDIR, errno.ELOOP)


class DamagedError(UserError):
    """A checkpoint that is not what was saved; the message names the file, and the tensor where it can be told."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and checksum of one file: of its header, if it holds tensors."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `shapes` are those of the logical parameters; `state` is JSON of the run's own."""

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, FileEntry]
    state: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION


_MANIFESTS = TypeAdapter(Manifest)


@dataclass(frozen=True)
class _Range:
    start: int
    file: str
    stored: StoredTensor

    @property
    def end(self) -> int:
        return self.start + self.stored.numel


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_folder: Path, *, whole: bool = True) -> list[Path]:
    """The checkpoints of a run, oldest first: those with a manifest, or all, if they need not be `whole`. Raises
    UserError where they cannot be read."""
    parent = run_folder / "checkpoints"
    try:
        folders = [path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)] if parent.is_dir() else []
        listed = [path for path in folders if not whole or (path / MANIFEST).is_file()]
    except OSError as error:
        raise UserError(f"the checkpoints in {parent} cannot be read: {error}") from None
    return sorted(listed, key=lambda path: int(path.name[5:]))


def list_damaged(run_folder: Path) -> list[Path]:
    """What `set_aside` renamed."""
    return sorted((run_folder / "checkpoints").glob(f"step-*{_DAMAGED}*"))


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it is looked at no more, and returns its new path. Raises OSError."""
    number, target = 1, checkpoint.with_name(checkpoint.name + _DAMAGED)
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}-{number}")
    os.rename(checkpoint, target)
    sync_folder(checkpoint.parent)
    return target


def put_back_replaced(run_folder: Path) -> None:
    """Gives its name back to a checkpoint whose successor of the same step was killed before it could take it. Raises
    OSError."""
    for replaced in (run_folder / "checkpoints").glob(f"step-*{_REPLACED}"):
        checkpoint = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if not checkpoint.exists():
            os.rename(replaced, checkpoint)


def remove_old_checkpoints(run_folder: Path, keep: int, keep_every: int = 0) -> None:
    """Removes all but the `keep` newest (0: none is removed) and those of every `keep_every`-th step (0: of none), and
    what a killed save left behind. Raises OSError."""
    put_back_replaced(run_folder)
    for leftover in (run_folder / "checkpoints").glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(leftover)
    for old in list_checkpoints(run_folder)[:-keep] if keep else []:
        if not keep_every or int(old.name[5:]) % keep_every:
            doomed = old.with_name(f"{old.name}.old{_PARTIAL}")
            # Whole or absent, however far the removal gets.
            os.rename(old, doomed)
            shutil.rmtree(doomed)


class CheckpointWriter:
    """Writes one checkpoint in three steps: `begin` (one process), `write_tensors` (each rank), `commit` (one process,
    after all ranks have written). All raise OSError where the disk does.

    In a run's folder, where all names are the program's own, what a killed save left behind is replaced. `alone`, a
    single process writes to a place that a user named, and nothing that is there already is touched.
    """

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self.folder = folder
        self._alone = alone
        self.partial = folder.with_name(f"{folder.name}{_PARTIAL}{f'-{os.getpid()}' if alone else ''}")

    def begin(self) -> None:
        """Makes the folder that will be renamed, empty."""
        if self.partial.exists() and not self._alone:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def discard(self) -> None:
        """Removes what was written since `begin`, if it was not committed."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def write_tensors(self, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
        """Writes this rank's ranges, keyed `kind/name@start`, and returns the manifest's entry of the file."""
        path = self.partial / f"rank-{rank:05d}{_TENSORS}"
        return {path.name: FileEntry(*write_tensor_file(path, tensors))}

    def commit(
        self,
        *,
        files: Mapping[str, FileEntry],
        shapes: Mapping[str, tuple[int, ...]],
        state: Mapping[str, Any],
        texts: Mapping[str, bytes],
    ) -> None:
        """Writes the small files of `texts` and the manifest, and gives the folder its name."""
        entries = dict(files)
        for name, content in texts.items():
            entries[name] = FileEntry(*write_small_file(self.partial / name, content))
        write_small_file(self.partial / MANIFEST, sealed_json(asdict(Manifest(dict(shapes), entries, dict(state)))))
        sync_folder(self.partial)
        replaced = self.folder.with_name(self.folder.name + _REPLACED)
        if self.folder.exists() and not self._alone:
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(self.folder, replaced)
        os.rename(self.partial, self.folder)
        sync_folder(self.folder.parent)
        # The folder above may be new as well.
        sync_folder(self.folder.parent.parent)
        if not self._alone and replaced.exists():
            shutil.rmtree(replaced)


class CheckpointReader:
    """Reads a checkpoint written by any number of ranks. Raises DamagedError, naming the file, for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Compares sizes and headers of all files with the manifest, and the content of the `part`-th of `num_parts`
        parts with the checksums, by several threads."""
        step, named = self.manifest.state.get("step"), _STEP_FOLDER.fullmatch(self.folder.name)
        if named and step is not None and step != int(named[1]):
            raise self._damaged(MANIFEST, f"is that of step {step!r:.20}")
        whole = [name for name in sorted(self.manifest.files) if not name.endswith(_TENSORS)]
        checks: list[tuple[str, StoredTensor | None]] = [(name, None) for name in whole]
        for name, tensors in self._headers.items():
            checks += [(name, stored) for stored in tensors]
        with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
            try:
                list(pool.map(lambda check: self._check(*check), checks[part::num_parts]))
            except DamagedError:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def range(self, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flat tensor `kind/name`, put together from the files, 1-D."""
        reached, needed = start, []
        for piece in self._ranges.get(key, []):
            end = min(piece.end, start + numel)
            if piece.start <= reached < end:
                needed.append((piece, reached, end))
                reached = end
        if reached != start + numel or key not in self._ranges:
            raise UserError(
                f"checkpoint {self.folder} lacks elements {reached} to {start + numel} of {key}; use another"
            )
        values = torch.empty(numel, dtype=self._ranges[key][0].stored.dtype)
        for piece, begin, end in needed:
            if piece.stored.dtype != values.dtype:
                raise self._damaged(piece.file, f"holds {key} in another dtype than other files")
            part = values[begin - start : end - start]
            self._guard(piece.file, read_elements, piece.stored, begin - piece.start, part)
        return values

    def parameter(self, name: str, kind: str = "param") -> Tensor:
        """A whole parameter in its shape and stored dtype, or its average (`ema`)."""
        shape = self.manifest.shapes[name]
        return self.range(f"{kind}/{name}", 0, torch.Size(shape).numel()).view(shape)

    def tensor(self, key: str) -> Tensor | None:
        """A whole flat tensor `kind/name`, None if there is none."""
        pieces = self._ranges.get(key)
        return None if not pieces else self.range(key, 0, max(piece.end for piece in pieces))

    def keys(self, kind: str) -> list[str]:
        """The names that there are of a kind."""
        return [key.removeprefix(f"{kind}/") for key in self._ranges if key.startswith(f"{kind}/")]

    def text(self, name: str) -> str:
        """The content of one of the small files."""
        if name not in self.manifest.files:
            raise self._damaged(name, "is missing")
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise self._damaged(name, f"cannot be read: {error}") from None

    @cached_property
    def _headers(self) -> dict[str, list[StoredTensor]]:
        names = [name for name in sorted(self.manifest.files) if name.endswith(_TENSORS)]
        entries = {name: self.manifest.files[name] for name in names}
        return {name: self._guard(name, read_header, entry.bytes, entry.checksum) for name, entry in entries.items()}

    @cached_property
    def _ranges(self) -> dict[str, list[_Range]]:
        ranges: dict[str, list[_Range]] = {}
        for name, tensors in self._headers.items():
            for stored in tensors:
                logical, _, start = stored.key.rpartition("@")
                if not (start.isascii() and start.isdecimal() and len(start) < 20):
                    raise self._damaged(name, f"holds {stored.key[:100]!r}, which says not where it begins")
                ranges.setdefault(logical, []).append(_Range(int(start), name, stored))
        for pieces in ranges.values():
            pieces.sort(key=lambda piece: piece.start)
        return ranges

    def _check(self, name: str, stored: StoredTensor | None) -> None:
        if stored is not None:
            self._guard(name, check_tensor, stored)
        else:
            self._guard(name, _check_whole, self.manifest.files[name])

    def _guard(self, name: str, function: Any, *arguments: Any) -> Any:
        """Calls `function` with the path of a file, which must be there, and tells what is wrong with it."""
        path = self.folder / name
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FileDamage("is not a file")
            return function(path, *arguments)
        except (FileNotFoundError, NotADirectoryError):
            raise self._damaged(name, "is missing") from None
        except FileDamage as error:
            raise self._damaged(name, str(error)) from None
        except OSError as error:
            if error.errno in _DAMAGE:
                raise self._damaged(name, f"cannot be read: {error}") from None
            raise UserError(f"checkpoint {self.folder} cannot be read: {name}: {error}") from None

    def _damaged(self, name: str, reason: str) -> DamagedError:
        return DamagedError(f"checkpoint {self.folder} is damaged: {name} {reason}; use another checkpoint")


def _check_whole(path: Path, entry: FileEntry) -> None:
    found = path.stat().st_size
    if found != entry.bytes:
        raise FileDamage(f"has {found:,} bytes instead of {entry.bytes:,}")
    if checksum(path.read_bytes()) != entry.checksum:
        raise FileDamage("does not match its checksum")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is damaged: it is not a file of a manifest's size; use another checkpoint")
        content = read_sealed_json(path, remedy="use another checkpoint")
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise UserError(
                f"checkpoint {folder} has a {MANIFEST} of format {content.get('format')!r} version "
                f"{content.get('version')!r}; this program reads {FORMAT!r} version {VERSION}"
            )
        manifest = _MANIFESTS.validate_python(content)
    except (FileNotFoundError, NotADirectoryError):
        kind = DamagedError if folder.is_dir() else UserError
        raise kind(
            f"no checkpoint at {folder}: {MANIFEST} is missing; name a folder such as RUN/checkpoints/step-…"
        ) from None
    except OSError as error:
        kind = DamagedError if error.errno in _DAMAGE else UserError
        raise kind(f"checkpoint {folder} cannot be read: {error}") from None
    except ValidationError:
        raise DamagedError(f"checkpoint {folder} is damaged: {MANIFEST} is not a manifest; use another") from None
    except DataError as error:
        raise DamagedError(str(error)) from None
    for name in manifest.files:
        if not is_plain_name(name):
            raise DamagedError(f"{path} names {name!r}, which is not a file of its own folder; use another checkpoint")
    for name, shape in manifest.shapes.items():
        if any(size < 0 for size in shape) or math.prod(shape[:_MAX_DIMS]) >= 1 << 62 or len(shape) > _MAX_DIMS:
            raise DamagedError(
                f"checkpoint {folder} is damaged: {MANIFEST} gives {name} an impossible shape; use another"
            )
    return manifest
