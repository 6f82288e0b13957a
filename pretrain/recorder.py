"""What a run tells: `metrics.jsonl`, `events.jsonl`, `log.txt`, a progress line, and trackers such as TensorBoard. Only
the first process tells anything."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch

from data.shards import write_atomically
from pretrain.logging_config import LoggingConfig
from pretrain.trackers import Tracker, open_trackers, scalars_of

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
Metrics = Mapping[str, Any]
EventKind = Literal["start", "resume", "finish", "stop", "skip", "spike", "rollback", "save", "save_failed", "unequal"]

# Dense bf16 peaks in TFLOP/s by the vendor's datasheets. PCIe and NVL boards of the H100 and H200, and parts of a
# divided GPU, are slower.
_PEAK_TFLOPS = {r"NVIDIA H100 \d+GB HBM3|NVIDIA H200": 989.4, r"NVIDIA A100[- ][\w -]+": 312.0}


class Goal(NamedTuple):
    """How far a run is: the metric that tells, its value now and at the end."""

    metric: str
    done: int
    total: int | None


class Recorder:
    """Writes the records of a run that goes on after `step` steps; the metrics of later steps are dropped, as they will
    be computed again. Events stay: they happened. Raises UserError where a tracker cannot begin."""

    def __init__(self, folder: Path, config: LoggingConfig, *, step: int, goal: Goal) -> None:
        self._config = config
        folder.mkdir(parents=True, exist_ok=True)
        drop_later_metrics(folder / METRICS, step)
        end_line(folder / EVENTS)
        self._open = ExitStack()
        self._metrics = self._open.enter_context(open(folder / METRICS, "a", encoding="utf-8"))
        self._events = self._open.enter_context(open(folder / EVENTS, "a", encoding="utf-8"))
        self._log = self._open.enter_context(open(folder / "log.txt", "a", encoding="utf-8"))
        self._trackers: dict[str, Tracker] = {}
        self._progress: _ProgressLine | None = None
        with ExitStack() as opened:
            opened.push(self._open)
            for name, tracker in open_trackers(folder, config, step):
                self._trackers[name] = tracker
                self._open.callback(self._use, name, tracker.close)
            opened.pop_all()
        if sys.stderr.isatty():
            self._progress = _ProgressLine(goal)
            self._open.callback(self._progress.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def record(self, metrics: Metrics) -> None:
        """One step. Numbers that are not finite are written as null."""
        self._metrics.write(json.dumps(_finite(dict(metrics))) + "\n")
        self._metrics.flush()
        scalars = dict(scalars_of(metrics)) if self._trackers else {}
        for name, tracker in list(self._trackers.items()):
            self._use(name, partial(tracker.write, metrics["step"], scalars))
        line = describe_step(metrics)
        if self._progress:
            self._progress.update(metrics, line)
        if metrics["step"] % self._config.every == 0 or metrics["step"] == 1 or "val_loss" in metrics:
            self.say(line, to_screen=self._progress is None)

    def say(self, line: str, *, to_screen: bool = True) -> None:
        """A line for the log, and for whoever watches."""
        self._log.write(line + "\n")
        self._log.flush()
        if to_screen and self._progress:
            self._progress.print(line)
        elif to_screen:
            print(line, file=sys.stderr, flush=True)

    def tell(self, kind: EventKind, step: int, text: str, *, to_screen: bool = True) -> None:
        """A line that is an event too."""
        self.note(kind, step, text)
        self.say(text, to_screen=to_screen)

    def note(self, kind: EventKind, step: int, text: str) -> None:
        """An event alone."""
        event = {"time": time.time(), "step": step, "kind": kind, "text": text}
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()

    def _use(self, name: str, what: Callable[[], None]) -> None:
        """Whatever a tracker raises: it is the last time that it is used."""
        if name not in self._trackers:
            return
        try:
            what()
        except Exception as error:
            del self._trackers[name]
            line = " ".join(str(error).split()) or type(error).__name__
            self.say(f"{name} failed and gets no more numbers; metrics.jsonl has all of them: {line}")


class SilentRecorder(Recorder):
    """The recorder of all other processes."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, metrics: Metrics) -> None:
        """Nothing."""

    def say(self, line: str, *, to_screen: bool = True) -> None:
        """Nothing."""

    def note(self, kind: EventKind, step: int, text: str) -> None:
        """Nothing."""


class _ProgressLine:
    """`rich`'s progress bar."""

    def __init__(self, goal: Goal) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=Console(stderr=True)
        )
        self._metric = goal.metric
        self._task = self._progress.add_task("starting", total=goal.total, completed=goal.done)
        self._progress.start()

    def update(self, metrics: Metrics, line: str) -> None:
        self._progress.update(self._task, completed=metrics[self._metric], description=line)

    def print(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()


def describe_step(metrics: Metrics) -> str:
    """A step in one line."""
    parts = [
        f"step {metrics['step']:,}",
        f"{metrics['tokens']:,} tokens",
        f"loss {metrics['loss']:.4f}",
        f"norm {metrics['grad_norm']:.3f}",
        f"lr {metrics['lr']:.2e}",
        f"{metrics['tokens_per_s']:,.0f} tokens/s",
    ]
    if "val_loss" in metrics:
        parts.append(f"held-out {metrics['val_loss']:.4f}")
    return " · ".join(parts)


def drop_later_metrics(path: Path, step: int) -> None:
    """Keeps the lines of the first `step` steps only; a torn last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, b"".join(kept))


def end_line(path: Path) -> None:
    """Ends a last line that was torn, so that the next is one of its own."""
    if path.is_file() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def peak_tflops(config: LoggingConfig, device: torch.device, dtype: torch.dtype) -> float | None:
    """What one device can do in a dtype, None where nobody knows."""
    if config.peak_tflops:
        return config.peak_tflops
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for names, peak in _PEAK_TFLOPS.items() if re.fullmatch(names, name)), None)


def max_memory_gib(device: torch.device, beside_tensors: int = 0) -> float:
    """The most memory this process has held: on the device, with so many bytes that are not torch's, or resident where
    the device is the CPU."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + beside_tensors) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
