"""Sources: what a user names on the command line, found on disk as a fixed list of files, then cut into units.

A source is a file (text, JSONL, compressed JSONL, Parquet), a folder of such files, a folder written by `save_to_disk`
of the `datasets` library, `datasets:NAME` for what that library can load by name, or `stdlib:`, the Python standard
library's own source: real code that is on every machine.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any, Literal

from data.errors import DataError
from data.readers import COMPRESSIONS, JSONL_SUFFIXES, Unit, arrow_units, jsonl_units, parquet_units, text_units

STDLIB = "stdlib:"
DATASETS_PREFIX = "datasets:"
_STDLIB_LEFT_OUT = ("test", "tests", "idle_test", "site-packages", "dist-packages")
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES, _UNITS = 1 << 18, 1 << 26, 256

Format = Literal["text", "jsonl", "parquet", "arrow"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read sources.

    The globs of `include` and `exclude` apply to each part of a path within its folder, or to the whole of it when they
    hold a slash; an excluded folder is not entered. `split` and `config` are those of the `datasets` library.
    `leave_out` is a folder that is never looked into: the one being written.
    """

    text_key: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    split: str = "train"
    config: str = ""
    leave_out: Path | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is its path within the source, `stamp` its time of change in ns."""

    path: Path
    name: str
    format: Format
    size: int
    stamp: int


@dataclass(frozen=True)
class Source:
    """What one argument of the command line stands for."""

    spec: str
    files: tuple[SourceFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written to."""
        lines = (f"{file.name}\0{file.format}\0{file.size}\0{file.stamp}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def find_source(spec: str, options: SourceOptions) -> Source:
    """The files of a source, in order. Raises DataError when there is no such source or no file is left."""
    path = Path(spec)
    if spec == STDLIB:
        files = _stdlib_files(options)
    elif spec.startswith(DATASETS_PREFIX):
        files = _datasets_files(spec.removeprefix(DATASETS_PREFIX), options)
    elif _is_saved_dataset(path):
        files = _datasets_files(spec, options)
    elif path.is_dir():
        files = _folder_files(path, options)
    elif path.exists():
        files = [_file(path, path.name)]
    else:
        raise DataError(
            f"source {spec!r} does not exist; give a file, a folder, {STDLIB} or {DATASETS_PREFIX}NAME, "
            "a dataset that the `datasets` library can load by name"
        )
    if not files:
        raise DataError(f"source {spec!r} holds no file to read; check --include, --exclude and the folder")
    return Source(spec, tuple(files))


def plan_units(sources: Sequence[Source], options: SourceOptions) -> list[Unit]:
    """Cuts sources into units, small enough to share among processes. Depends on nothing but the files."""
    unit_bytes = sum(source.size for source in sources) // _UNITS
    unit_bytes = min(max(unit_bytes, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    files = [file for source in sources for file in source.files]
    units: list[Unit] = []
    for kind, group in groupby(files, lambda file: file.format):
        if kind == "text":
            units += text_units(((file.path, file.size) for file in group), unit_bytes)
            continue
        for file in group:
            units += _file_units(file, options.text_key, unit_bytes)
    return units


def _file_units(file: SourceFile, text_key: str, unit_bytes: int) -> Iterator[Unit]:
    if file.format == "jsonl":
        return jsonl_units(file.path, file.size, text_key, unit_bytes)
    if file.format == "parquet":
        return parquet_units(file.path, file.size, text_key)
    return arrow_units(file.path, text_key, unit_bytes)


def _file(path: Path, name: str, kind: Format | None = None) -> SourceFile:
    stat = path.stat()
    return SourceFile(path, name, kind or _format_of(path), stat.st_size, stat.st_mtime_ns)


def _format_of(path: Path) -> Format:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        return "parquet"
    if suffixes and suffixes[-1] in COMPRESSIONS:
        if suffixes[-2:-1] and suffixes[-2] in (*JSONL_SUFFIXES, ".json"):
            return "jsonl"
        raise DataError(f"{path} is compressed, which is read for JSONL only; unpack it first, or use --exclude")
    return "jsonl" if suffixes and suffixes[-1] in JSONL_SUFFIXES else "text"


def _folder_files(folder: Path, options: SourceOptions) -> list[SourceFile]:
    """Files below a folder, sorted; hidden ones, links to folders and what is no plain file are left out."""
    names: list[PurePath] = []
    left_out = _within(folder, options.leave_out)
    for parent, folders, files in os.walk(folder, onerror=_raise):
        below = PurePath(parent).relative_to(folder)
        folders[:] = [name for name in folders if not name.startswith(".") and Path(parent, name) != left_out]
        folders[:] = [name for name in folders if not _matches(below / name, options.exclude)]
        names += [below / name for name in files if not name.startswith(".")]
    chosen = [name for name in sorted(names, key=lambda name: name.parts) if _is_chosen(name, options)]
    return [_file(folder / name, name.as_posix()) for name in chosen if (folder / name).is_file()]


def _is_chosen(name: PurePath, options: SourceOptions) -> bool:
    return (not options.include or _matches(name, options.include)) and not _matches(name, options.exclude)


def _matches(name: PurePath, patterns: Sequence[str]) -> bool:
    """Whether a part of the name matches a pattern, or all of it one that holds a slash."""
    return any(
        any(fnmatchcase(subject, pattern) for subject in ((name.as_posix(),) if "/" in pattern else name.parts))
        for pattern in patterns
    )


def _stdlib_files(options: SourceOptions) -> list[SourceFile]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = _folder_files(folder, SourceOptions(include=("*.py",), exclude=_STDLIB_LEFT_OUT))
    return [file for file in files if _is_chosen(PurePath(file.name), options)]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def _datasets_files(name: str, options: SourceOptions) -> list[SourceFile]:
    """The Arrow files of a saved or named dataset; the `datasets` library downloads or converts when it has to."""
    dataset = _load_dataset(name, options)
    if options.text_key not in dataset.column_names:
        columns = ", ".join(map(repr, dataset.column_names))
        raise DataError(f"{name} has no column {options.text_key!r} (it has {columns}); name it with --text-key")
    paths = [Path(file["filename"]) for file in dataset.cache_files]
    files = [_file(path, path.name, "arrow") for path in paths]
    rows = sum(_count_rows(path) for path in paths)
    if rows != dataset.num_rows:
        raise DataError(
            f"{name} selects {dataset.num_rows} of the {rows} rows in its files; "
            "write the selection out with flatten_indices() and save_to_disk()"
        )
    return files


def _load_dataset(name: str, options: SourceOptions) -> Any:
    import datasets

    try:
        if not _is_saved_dataset(Path(name)):
            return datasets.load_dataset(name, options.config or None, split=options.split)
        dataset = datasets.load_from_disk(name)
    # The library passes on whatever its readers and the network raise.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"`datasets` cannot load split {options.split!r} of {name!r} ({reason}); check the name, --split, --config"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if options.split not in dataset:
            raise DataError(f"{name} has no split {options.split!r} (it has {', '.join(dataset)}); choose with --split")
        return dataset[options.split]
    return dataset


def _count_rows(path: Path) -> int:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(file))


def _raise(error: OSError) -> None:
    raise error


def _within(folder: Path, other: Path | None) -> Path | None:
    """`other` spelled as a path below `folder`, or None when it is elsewhere."""
    if other is None or not other.resolve().is_relative_to(folder.resolve()):
        return None
    return folder / other.resolve().relative_to(folder.resolve())
