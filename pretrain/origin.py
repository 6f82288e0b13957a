"""Where a run comes from: the file, its base, what was set on the command line, and the device; RUN/origin.json.

The resolved configuration says what holds, but not what somebody decided; the report shows how it differs from the
base."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.shards import write_atomically
from pretrain.config import Table, dump_config, parse_config, read_table
from pretrain.errors import UserError

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Base:
    """What a configuration inherits: the `base` as its file names it, and the values there."""

    file: str
    values: Table


@dataclass(frozen=True)
class Origin:
    """A configuration's file, overrides and base, if it has one."""

    file: str
    overrides: tuple[str, ...]
    base: Base | None


def find_origin(path: Path, overrides: Sequence[str]) -> Origin:
    """Of a file that `load_config` has taken. Raises UserError where it can no longer be read."""
    try:
        base = tomllib.loads(path.read_text(encoding="utf-8")).get("base")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    inherited = None
    if isinstance(base, str):
        inherited = Base(base, _resolved(read_table(path.parent / base)))
    return Origin(str(path), tuple(overrides), inherited)


def write_origin(folder: Path, origin: Origin, device: torch.device) -> None:
    """Writes RUN/origin.json."""
    name, gib = device.type, None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, gib = properties.name, properties.total_memory / 2**30
    content: dict[str, Any] = asdict(origin) | {"device": name, "device_memory_gib": gib}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ORIGIN, (json.dumps(content, indent=2, default=str) + "\n").encode())


def _resolved(table: Table) -> Table:
    """With every default written out, where the base is a whole configuration; else as it is."""
    try:
        return tomllib.loads(dump_config(parse_config(table)))
    except UserError:
        return table
