"""What a run has left in its folder, read for the report: metrics as columns, load of the experts, configuration."""

import json
import math
import tomllib
from array import array
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import UserError
from pretrain.recorder import METRICS

CONFIG = "config.toml"
COLUMNS = (
    "step", "tokens", "loss", "lm_loss", "mtp_loss", "val_loss", "lr", "batch_size", "world_size", "grad_norm",
    "skipped", "step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "max_memory_gib", "load_max_violation",
    "dead_experts",
)  # fmt: skip
_MAX_SNAPSHOTS = 512

Column = NDArray[np.float64]


@dataclass(frozen=True)
class LoadHistory:
    """Tokens that each expert of a layer received, at moments spread over the run: `tokens` [moments] is when, and
    `layers` holds [moments, experts] by name."""

    tokens: Column
    layers: dict[str, Column]


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics, one value a step in each of `COLUMNS`, NaN where there is none."""

    name: str
    config_text: str
    config: dict[str, Any]
    written: datetime
    columns: dict[str, Column]
    loads: LoadHistory


def read_record(run_folder: Path) -> RunRecord:
    """Reads RUN/metrics.jsonl and RUN/config.toml. Raises UserError if one is missing or unreadable; a last line that
    was being written when the run died is left out."""
    path = run_folder / METRICS
    if not path.is_file():
        raise UserError(f"no metrics at {path}; train first, or name the run's folder, run.dir/run.name")
    config_text, config = _read_config(run_folder / CONFIG)
    columns, loads = _read_metrics(path)
    run = config.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    return RunRecord(
        name=str(name or run_folder.name),
        config_text=config_text,
        config=config,
        written=datetime.fromtimestamp(path.stat().st_mtime).astimezone(),
        columns=columns,
        loads=loads,
    )


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; it is written when a run starts, so train first") from None


def _read_metrics(path: Path) -> tuple[dict[str, Column], LoadHistory]:
    columns = {key: array("d") for key in COLUMNS}
    snapshots = _Snapshots()
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                record = _parse(line)
                if record is None and not line.endswith(b"\n"):
                    break
                if record is None:
                    raise UserError(
                        f"{path}, line {number} is not a record of a step; remove that line, or train the run again"
                    )
                for key, column in columns.items():
                    column.append(_number(record.get(key)))
                snapshots.add(_number(record["tokens"]), record.get("expert_load"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not columns["step"]:
        raise UserError(f"{path} holds no step yet; train first")
    return {key: np.array(column) for key, column in columns.items()}, snapshots.history()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None if it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or any(math.isnan(_number(record.get(key))) for key in ("step", "tokens")):
        return None
    return record


def _number(value: object) -> float:
    """A finite number, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


class _Snapshots:
    """Keeps at most `_MAX_SNAPSHOTS` loads, evenly spread however many there are."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, dict[str, Column]]] = []
        self._stride = 1
        self._seen = 0

    def add(self, tokens: float, load: object) -> None:
        """The `expert_load` of a line, if it has one; what does not look like the first is left out."""
        if not isinstance(load, dict):
            return
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        layers = _layers(load)
        if layers and (not self._kept or _shapes(layers) == _shapes(self._kept[0][1])):
            self._kept.append((tokens, layers))
        if len(self._kept) > _MAX_SNAPSHOTS:
            self._kept = self._kept[::2]
            self._stride *= 2

    def history(self) -> LoadHistory:
        """All that was kept."""
        names = list(self._kept[0][1]) if self._kept else []
        return LoadHistory(
            tokens=np.array([tokens for tokens, _ in self._kept]),
            layers={name: np.stack([layers[name] for _, layers in self._kept]) for name in names},
        )


def _layers(load: dict[str, Any]) -> dict[str, Column]:
    """The layers whose load is a list of numbers."""
    layers = {}
    for name, counts in load.items():
        try:
            numbers = np.array(counts, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            continue
        if numbers.ndim == 1 and len(numbers):
            layers[name] = np.where(np.isfinite(numbers), numbers, 0.0)
    return layers


def _shapes(layers: dict[str, Column]) -> dict[str, int]:
    return {name: len(counts) for name, counts in layers.items()}
