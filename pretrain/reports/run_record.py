"""What a run has left in its folder, read for the report: metrics as columns, load of the experts, events, the measured
pipeline, configuration. All but metrics and configuration may be missing: older runs have less."""

import json
import math
import tomllib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UserError
from pretrain.origin import ORIGIN
from pretrain.recorder import METRICS
from pretrain.reports.expert_loads import LoadHistory, LoadReader
from pretrain.reports.series import Collector, Column, Series, as_number, flattened

CONFIG, EVENTS, PIPELINE = "config.toml", "events.jsonl", "pipeline.json"
COLUMNS = (
    "step", "tokens", "loss", "lm_loss", "mtp_loss", "balance_loss", "val_loss", "lr", "bias_update_speed",
    "mtp_weight", "batch_size", "seq_len", "world_size", "grad_norm", "skipped", "spikes", "checkpoint_failed",
    "step_time_s", "tokens_per_s", "tflops_per_gpu", "mfu", "max_memory_gib", "load_max_violation", "dead_experts",
    "time",
)  # fmt: skip
_MAX_EVENTS = 20_000
# Of tables in one another; a configuration has three.
_MAX_DEPTH = 20
# What is told of the lines read: once for so many bytes.
_BYTES_TOLD = 1 << 20

Tell = Callable[[float], None]


@dataclass(frozen=True)
class Event:
    """Something that happened: when (unix seconds), after which step, of which kind, in words."""

    time: float
    step: float
    kind: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """A run: its metrics, one value a step in each of `COLUMNS`, NaN where there is none, and what was recorded now and
    then: `moe` by `layer/metric`, `received` rows by "max" and "mean" with "rounds_max", seconds by phase, `parts` by
    `part/metric`, busy seconds by rank, `fp8` by its key. `pipeline` and `origin` are as read."""

    name: str
    config_text: str
    config: dict[str, Any]
    written: datetime
    columns: dict[str, Column]
    loads: LoadHistory
    moe: Series
    received: Series
    phases: Series
    parts: Series
    ranks: Series
    fp8: Series
    events: tuple[Event, ...] = ()
    pipeline: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    def tokens_at(self, step: float) -> float:
        """Tokens seen after a step, or after the nearest one that there is."""
        return float(np.interp(step, self.columns["step"], self.columns["tokens"]))


def read_record(run_folder: Path, tell: Tell = lambda share: None) -> RunRecord:
    """Reads a run's folder. Raises UserError if metrics or configuration are missing or unreadable; a last line that
    was being written when the run died is left out. `tell` hears which share is read."""
    path = run_folder / METRICS
    if not path.is_file():
        raise UserError(f"no metrics at {path}; train first, or name the run's folder, run.dir/run.name")
    config_text, config = _read_config(run_folder / CONFIG)
    metrics = _read_metrics(path, tell)
    run = config.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    return RunRecord(
        name=str(name or run_folder.name),
        config_text=config_text,
        config=config,
        written=datetime.fromtimestamp(path.stat().st_mtime).astimezone(),
        columns={key: np.array(column) for key, column in metrics.columns.items()},
        loads=metrics.loads.history(),
        **{name: collector.series() for name, collector in metrics.nested.items()},
        events=read_events(run_folder / EVENTS),
        pipeline=_read_object(run_folder / PIPELINE),
        origin=_read_object(run_folder / ORIGIN),
    )


def read_events(path: Path) -> tuple[Event, ...]:
    """The newest events of a run, oldest first; lines that are none are left out."""
    events: list[Event] = []
    try:
        with open(path, "rb") as lines:
            for line in lines:
                if event := _parse_event(line):
                    events.append(event)
                if len(events) > 2 * _MAX_EVENTS:
                    del events[:_MAX_EVENTS]
    except OSError:
        return ()
    return tuple(events[-_MAX_EVENTS:])


def parse_step(line: bytes) -> dict[str, Any] | None:
    """The record of a line of metrics, None if it is none."""
    record = _parse_object(line)
    if record is None or any(math.isnan(as_number(record.get(key))) for key in ("step", "tokens")):
        return None
    return record


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, parse_config_text(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}; it is written when a run starts, so train first") from None


def parse_config_text(text: str) -> dict[str, Any]:
    """The tables of a configuration. Raises ValueError or RecursionError where it is none, or tables lie deeper in one
    another than any configuration's."""
    config = tomllib.loads(text)
    if _depth(config) > _MAX_DEPTH:
        raise ValueError(f"tables lie more than {_MAX_DEPTH} deep in one another")
    return config


def _depth(table: dict[str, Any]) -> int:
    """How many tables lie in one another, as far as it matters."""
    depth, level = 0, [table]
    while level and depth <= _MAX_DEPTH:
        depth, level = depth + 1, [inner for outer in level for inner in outer.values() if isinstance(inner, dict)]
    return depth


class _Metrics:
    """Takes lines of metrics apart."""

    def __init__(self) -> None:
        self.columns = {key: array("d") for key in COLUMNS}
        self.loads = LoadReader()
        self.nested = {name: Collector() for name in ("moe", "received", "phases", "parts", "ranks", "fp8")}

    def add(self, record: dict[str, Any]) -> None:
        for key, column in self.columns.items():
            column.append(as_number(record.get(key)))
        step, tokens = self.columns["step"][-1], self.columns["tokens"][-1]
        self.loads.add(step, tokens, record.get("expert_load"))
        for name, values in _nested(record):
            self.nested[name].add(step, tokens, values)


def _nested(record: dict[str, Any]) -> list[tuple[str, dict[str, object]]]:
    """What a line has beside its columns, by the series it belongs to."""
    found: list[tuple[str, dict[str, object]]] = []
    for name in ("moe", "parts"):
        if isinstance(record.get(name), dict):
            found.append((name, flattened(record[name])))
    if isinstance(record.get("phases"), dict):
        found.append(("phases", record["phases"]))
    if isinstance(record.get("received_rows"), dict):
        found.append(("received", record["received_rows"] | {"rounds_max": record.get("rounds_max")}))
    ranks = record.get("ranks")
    if isinstance(ranks, dict) and isinstance(ranks.get("busy_s"), list):
        found.append(("ranks", {str(rank): seconds for rank, seconds in enumerate(ranks["busy_s"])}))
    fp8 = {key: value for key, value in record.items() if key.startswith("fp8_")}
    return [*found, ("fp8", fp8)] if fp8 else found


def _read_metrics(path: Path, tell: Tell) -> _Metrics:
    metrics, size, read, told = _Metrics(), max(1, path.stat().st_size), 0, 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                record = parse_step(line)
                if record is None and not line.endswith(b"\n"):
                    break
                if record is None:
                    raise UserError(
                        f"{path}, line {number} is not a record of a step; remove that line, or train the run again"
                    )
                metrics.add(record)
                read += len(line)
                if read - told >= _BYTES_TOLD:
                    told = read
                    tell(min(1.0, read / size))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not metrics.columns["step"]:
        raise UserError(f"{path} holds no step yet; train first")
    return metrics


def _parse_object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _depth(value) <= _MAX_DEPTH else None


def _parse_event(line: bytes) -> Event | None:
    found = _parse_object(line) or {}
    kind, text = found.get("kind"), found.get("text")
    if not isinstance(kind, str) or not isinstance(text, str):
        return None
    return Event(as_number(found.get("time")), as_number(found.get("step")), kind, text)


def _read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; empty where there is no such file, or something else in it."""
    try:
        return _parse_object(path.read_bytes()) or {}
    except OSError:
        return {}
