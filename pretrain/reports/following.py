"""Follows the records of a run that is being written, perhaps by processes that die and start again."""

import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pretrain.errors import UserError
from pretrain.recorder import METRICS
from pretrain.reports.run_record import CONFIG, EVENTS, Event, parse_config_text, parse_step, read_events
from pretrain.reports.series import as_number

# Of metrics that are there already, so much of the newest is read; and so much at a time of what comes.
_TAIL, _AT_ONCE = 8 << 20, 32 << 20
_HISTORY = 20_000
_SPEED_STEPS = 50


@dataclass
class RunState:
    """What is known of a run: the newest record, the `losses` of the steps read with the tokens before them, events,
    configuration, and when (unix seconds) the last step was written."""

    last: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    val_loss: float = float("nan")
    losses: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    speeds: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_SPEED_STEPS))
    events: tuple[Event, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    written: float = float("nan")

    def number(self, key: str) -> float:
        """A number of the newest record, NaN where there is none."""
        return as_number(self.last.get(key))

    @property
    def step_seconds(self) -> float:
        """The median of the newest steps, NaN before the first."""
        return _median([seconds for seconds, _ in self.speeds])

    @property
    def tokens_per_second(self) -> float:
        """The median of the newest steps, NaN before the first."""
        return _median([speed for _, speed in self.speeds])

    @property
    def goal(self) -> tuple[str, float]:
        """What the run counts up to, "step" or "tokens", and how far; NaN where nobody says."""
        train = self.config.get("train")
        table = train if isinstance(train, dict) else {}
        steps = as_number(table.get("steps"))
        return ("step", steps) if steps > 0 else ("tokens", as_number(table.get("tokens")))

    @property
    def seconds_left(self) -> float:
        """Until the end at the present speed, NaN where it is not known."""
        unit, end = self.goal
        left = max(0.0, end - self.number(unit))
        return left * self.step_seconds if unit == "step" else left / max(self.tokens_per_second, 1e-9)

    def take(self, record: dict[str, Any]) -> None:
        """The next record. One of an earlier step than the last says that the run went back."""
        if self.last and as_number(record["step"]) <= self.number("step"):
            tokens = as_number(record["tokens"])
            kept = [pair for pair in self.losses if pair[0] < tokens]
            self.losses = deque(kept, maxlen=_HISTORY)
        self.last = record
        loss = as_number(record.get("lm_loss", record.get("loss")))
        self.losses.append((as_number(record["tokens"]), loss))
        self.speeds.append((as_number(record.get("step_time_s")), as_number(record.get("tokens_per_s"))))
        if isinstance(record.get("moe"), dict):
            self.moe = record["moe"]
        if "val_loss" in record:
            self.val_loss = as_number(record["val_loss"])


class Follower:
    """Reads what is new in a run's folder. Raises UserError where there is no such folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no run at {folder}; name the run's folder, run.dir/run.name, once it has started")
        self._folder = folder
        self._file: BinaryIO | None = None
        self._inode = -1
        self._torn = b""
        self._stamps: dict[str, tuple[int, int]] = {}
        self.state = RunState()

    def close(self) -> None:
        """Lets go of the file."""
        if self._file:
            self._file.close()
            self._file = None

    def update(self) -> RunState:
        """Takes in all that was written since the last time."""
        if self._has_changed(CONFIG):
            self.state.config = _read_config(self._folder / CONFIG)
        if self._has_changed(EVENTS):
            self.state.events = read_events(self._folder / EVENTS)
        try:
            self._read_metrics()
        except OSError:
            # Replaced or gone at this moment; the next look finds what there is then.
            self.close()
        return self.state

    def _read_metrics(self) -> None:
        path = self._folder / METRICS
        if not path.is_file():
            self.close()
            return
        found = path.stat()
        if self._file is None or found.st_ino != self._inode or found.st_size < self._file.tell():
            self._open(path)
        assert self._file is not None
        while new := self._file.read(_AT_ONCE):
            *lines, self._torn = (self._torn + new).split(b"\n")
            for line in lines:
                if (record := parse_step(line)) is not None:
                    self.state.take(record)
        self.state.written = found.st_mtime

    def _open(self, path: Path) -> None:
        """From the start, or not far from the end; a first line that is cut is no record and left out. A file that
        takes the place of another holds the run up to the step from which it goes on."""
        self.close()
        self.state = RunState(events=self.state.events, config=self.state.config)
        self._file, self._torn = open(path, "rb"), b""
        status = os.fstat(self._file.fileno())
        self._inode = status.st_ino
        self._file.seek(max(0, status.st_size - _TAIL))

    def _has_changed(self, name: str) -> bool:
        try:
            status = (self._folder / name).stat()
        except OSError:
            return self._stamps.pop(name, None) is not None
        stamp = status.st_mtime_ns, status.st_size
        is_new = self._stamps.get(name) != stamp
        self._stamps[name] = stamp
        return is_new


def seconds_since(moment: float) -> float:
    """How long ago a moment (unix seconds) was, not below 0."""
    return max(0.0, time.time() - moment)


def _median(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else float("nan")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return parse_config_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
