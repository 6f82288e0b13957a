"""Who else gets the numbers of a run: TensorBoard, Weights & Biases, MLflow.

The last two are used only if asked for, and under the id that the run got when it first was, so a resumed run goes on
in the same place. What fails there later must not end a training: the tracker is left out from then on.
"""

import importlib
import importlib.util
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from data.shards import write_atomically
from pretrain.errors import UserError
from pretrain.logging_config import LoggingConfig

IDS = "trackers.json"
_REMEDIES = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline to keep its files in the run's folder",
    "mlflow": "look at MLFLOW_TRACKING_URI, which says where numbers go",
}
_METRICS_AT_ONCE, _MOST_PENDING = 1000, 100
_MAX_ID = 128


class Tracker(Protocol):
    """Takes scalars, from which point of the run on it says when it is opened."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Those of one step."""

    def close(self) -> None:
        """Sends what was not sent yet."""


def check_trackers(config: LoggingConfig) -> None:
    """Raises UserError for a tracker that is asked for and not installed."""
    for name in _REMEDIES:
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logging.{name} = true needs the package {name}, which is not installed; run `pip install {name}`, or "
                f"set logging.{name} = false"
            )


def open_trackers(folder: Path, config: LoggingConfig, step: int) -> Iterator[tuple[str, Tracker]]:
    """The trackers of a run that goes on after `step` steps, by name. Raises UserError where one cannot begin."""
    if config.tensorboard:
        yield "TensorBoard", _TensorBoard(folder, step)
    for name, make in (("wandb", _WeightsAndBiases), ("mlflow", _MlFlow)):
        if getattr(config, name):
            try:
                yield name, make(folder, config.project)
            except Exception as error:
                line = " ".join(str(error).split()) or type(error).__name__
                raise UserError(
                    f"logging.{name} = true, but it cannot begin: {line}; {_REMEDIES[name]}, or set logging.{name} = "
                    "false"
                ) from None


def scalars_of(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of metrics by name, nested ones as `moe/3/entropy`; lists are left out."""
    for key, value in metrics.items():
        if isinstance(value, int | float) and prefix + key not in ("step", "time"):
            yield prefix + key, value
        elif isinstance(value, Mapping):
            yield from scalars_of(value, f"{prefix}{key}/")


def run_id(folder: Path, name: str, new: str | None = None) -> str | None:
    """The id that a run has with a tracker; kept in the folder, `new` if there is none."""
    path = folder / IDS
    try:
        known = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        known = {}
    known = {key: value for key, value in known.items() if _is_id(value)} if isinstance(known, dict) else {}
    if name not in known and new is not None:
        known[name] = new
        write_atomically(path, json.dumps(known).encode())
    return known.get(name)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isalnum() and len(value) <= _MAX_ID


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        # Without this, an installed TensorFlow would be imported, with all it prints.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _WeightsAndBiases:
    """Its files lie in RUN/wandb. The environment says where they go: WANDB_MODE=offline keeps them there."""

    def __init__(self, folder: Path, project: str) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=run_id(folder, "wandb", secrets.token_hex(8)),
            dir=str(folder),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps that are computed again after a resume are earlier than the last, which its own count does not allow.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MlFlow:
    """MLFLOW_TRACKING_URI says where numbers go; if it is not set, to a database beside the folders of runs."""

    def __init__(self, folder: Path, project: str) -> None:
        # It sends what it is used for to its makers, unless told not to.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow: Any = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute().parent / 'mlflow.db'}"
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._id = run_id(folder, "mlflow")
        if self._id is None:
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            made = self._client.create_run(number, run_name=folder.name).info.run_id
            self._id = run_id(folder, "mlflow", made)
        self._client.update_run(self._id, status="RUNNING")

        # A database may take as long as a step.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._pending: deque[Future[None]] = deque()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        found = [self._metric(name, value, now, step) for name, value in scalars.items()]
        self._pending.append(self._thread.submit(self._send, found))
        while self._pending and (self._pending[0].done() or len(self._pending) > _MOST_PENDING):
            self._pending.popleft().result()

    def _send(self, metrics: list[Any]) -> None:
        for first in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[first : first + _METRICS_AT_ONCE])

    def close(self) -> None:
        self._thread.shutdown()
        for sent in self._pending:
            sent.result()
        self._client.update_run(self._id, status="FINISHED")
