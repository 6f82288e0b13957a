"""Checkpoints: complete or absent, verified, free of pickle, and independent of the layout that wrote them.

    RUN/checkpoints/step-00000100/
        rank-00000.safetensors    what rank 0 holds: ranges of flat logical tensors
        config.toml  tokenizer.*  so that the folder stands alone
        manifest.json             sizes and checksums of the files, shapes, state of the run; its own checksum; last

Every parameter and optimizer state is one flat logical tensor, named `kind/name`; a file holds the range that begins at
`start` as the 1-D tensor `kind/name@start`. ZeRO's fragments and slices of stacked experts are such ranges, so any
layout can read what any other wrote. The folder is filled under another name and renamed when everything is on disk.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import DataError
from data.shards import file_sha256, is_plain_name, read_sealed_json, write_sealed_json
from pretrain.errors import UserError

FORMAT = "eva-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `shapes` are those of the logical parameters; `state` is JSON of the run's own."""

    shapes: dict[str, tuple[int, ...]]
    files: dict[str, FileEntry]
    state: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True)
class _Range:
    start: int
    numel: int
    file: str
    key: str


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Raises UserError where they cannot be read."""
    parent = run_folder / "checkpoints"
    try:
        folders = [path for path in parent.iterdir() if _STEP_FOLDER.fullmatch(path.name)] if parent.is_dir() else []
        complete = [path for path in folders if (path / MANIFEST).is_file()]
    except OSError as error:
        raise UserError(f"the checkpoints in {parent} cannot be read: {error}") from None
    return sorted(complete, key=lambda path: int(path.name[5:]))


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest (0: none is removed), and what a killed save left behind."""
    for leftover in (run_folder / "checkpoints").glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(leftover)
    for old in list_checkpoints(run_folder)[:-keep] if keep else []:
        _remove(old)


class CheckpointWriter:
    """Writes one checkpoint in three steps: `begin` (one process), `write_tensors` (each rank), `commit` (one process,
    after all ranks have written).

    In a run's folder, where all names are the program's own, what a killed save left behind is replaced. `alone`, a
    single process writes to a place that a user named, and nothing that is there already is touched.
    """

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self.folder = folder
        self._alone = alone
        self._partial = folder.with_name(f"{folder.name}{_PARTIAL}{f'-{os.getpid()}' if alone else ''}")

    def begin(self) -> None:
        """Makes the folder that will be renamed, empty."""
        if self._partial.exists() and not self._alone:
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)

    def discard(self) -> None:
        """Removes what was written since `begin`, if it was not committed."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def write_tensors(self, rank: int, tensors: Mapping[str, Tensor]) -> dict[str, FileEntry]:
        """Writes this rank's ranges, keyed `kind/name@start`, and returns the manifest's entry of the file. Raises
        OSError where that fails."""
        path = self._partial / f"rank-{rank:05d}.safetensors"
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        return {path.name: _entry(path)}

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
            (self._partial / name).write_bytes(content)
            entries[name] = _entry(self._partial / name)
        write_sealed_json(self._partial / MANIFEST, asdict(Manifest(dict(shapes), entries, dict(state))))
        _sync_folder(self._partial)
        if self.folder.exists() and not self._alone:
            _remove(self.folder)
        os.rename(self._partial, self.folder)
        _sync_folder(self.folder.parent)


class CheckpointReader:
    """Reads a checkpoint written by any number of ranks. Raises UserError, naming the file, for a damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self._ranges: dict[str, list[_Range]] | None = None

    def verify(self, part: int = 0, num_parts: int = 1) -> None:
        """Compares sizes and checksums of every `num_parts`-th file from `part` on with the manifest."""
        for name in sorted(self.manifest.files)[part::num_parts]:
            entry, path = self.manifest.files[name], self.folder / name
            if not path.is_file():
                raise UserError(f"checkpoint {self.folder} lacks {name}; use another checkpoint")
            if path.stat().st_size != entry.bytes or file_sha256(path) != entry.sha256:
                raise UserError(f"checkpoint {self.folder} is damaged: {name} does not match its checksum; use another")

    def range(self, key: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flat tensor `kind/name`, put together from the files, 1-D."""
        pieces, reached = [], start
        for piece in self._index().get(key, []):
            end = min(piece.start + piece.numel, start + numel)
            if piece.start <= reached < end:
                with safe_open(self.folder / piece.file, "pt") as file:
                    pieces.append(file.get_slice(piece.key)[reached - piece.start : end - piece.start])
                reached = end
        if reached != start + numel or not pieces:
            raise UserError(
                f"checkpoint {self.folder} lacks elements {reached} to {start + numel} of {key}; use another"
            )
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def parameter(self, name: str) -> Tensor:
        """A whole parameter in its shape and stored dtype."""
        shape = self.manifest.shapes[name]
        return self.range(f"param/{name}", 0, torch.Size(shape).numel()).view(shape)

    def tensor(self, key: str) -> Tensor | None:
        """A whole flat tensor `kind/name`, None if there is none."""
        pieces = self._index().get(key)
        return None if not pieces else self.range(key, 0, max(piece.start + piece.numel for piece in pieces))

    def keys(self, kind: str) -> list[str]:
        """The names that there are of a kind."""
        return [key.removeprefix(f"{kind}/") for key in self._index() if key.startswith(f"{kind}/")]

    def text(self, name: str) -> str:
        """The content of one of the small files."""
        if name not in self.manifest.files:
            raise UserError(f"checkpoint {self.folder} lacks {name}; use another checkpoint")
        return (self.folder / name).read_text(encoding="utf-8")

    def _index(self) -> dict[str, list[_Range]]:
        if self._ranges is None:
            self._ranges = {}
            for name in sorted(self.manifest.files):
                if name.endswith(".safetensors"):
                    self._index_file(name, self._ranges)
            for pieces in self._ranges.values():
                pieces.sort(key=lambda piece: piece.start)
        return self._ranges

    def _index_file(self, name: str, ranges: dict[str, list[_Range]]) -> None:
        try:
            with safe_open(self.folder / name, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dictionary
                    logical, _, start = key.rpartition("@")
                    numel = torch.Size(file.get_slice(key).get_shape()).numel()
                    ranges.setdefault(logical, []).append(_Range(int(start), numel, name, key))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"checkpoint {self.folder} is damaged: {name}: {error}; use another") from None


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = TypeAdapter(Manifest).validate_python(
            read_sealed_json(folder / MANIFEST, remedy="use another checkpoint")
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no checkpoint at {folder}: {MANIFEST} is missing; name a folder such as RUN/checkpoints/step-…"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {folder} cannot be read: {error}") from None
    except ValidationError:
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} is not a manifest; use another") from None
    except DataError as error:
        raise UserError(str(error)) from None
    if (manifest.format, manifest.version) != (FORMAT, VERSION):
        raise UserError(
            f"checkpoint {folder} has format {manifest.format!r} version {manifest.version}; this program reads "
            f"{FORMAT!r} version {VERSION}"
        )
    for name in manifest.files:
        if not is_plain_name(name):
            raise UserError(f"checkpoint {folder} names {name!r}, which is not a file of its own folder; use another")
    return manifest


def _remove(checkpoint: Path) -> None:
    """Takes a checkpoint's name first, so that it is whole or absent however far the removal gets."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{_PARTIAL}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _entry(path: Path) -> FileEntry:
    """Makes sure that a file is on disk and takes its size and checksum."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, file_sha256(path))


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
