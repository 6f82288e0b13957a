"""Who else gets the numbers of a run, where those packages are installed and where they are not."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support import finish, start_training, write_run

from pretrain.errors import UserError
from pretrain.logging_config import LoggingConfig
from pretrain.trackers import check_trackers, open_trackers, run_id, scalars_of

METRICS = {"step": 3, "time": 1e9, "loss": 2.5, "moe": {"1": {"entropy": 0.5}}, "expert_load": {"1": [4, 4]}}


def test_nested_numbers_have_paths_for_names() -> None:
    assert dict(scalars_of({**METRICS, "note": "text"})) == {"loss": 2.5, "moe/1/entropy": 0.5}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(LoggingConfig())
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_trackers(LoggingConfig())
    with pytest.raises(UserError, match=rf"logging\.{name} = true needs .* not installed; run `pip install {name}`"):
        check_trackers(LoggingConfig(**{name: True}))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_run_without_the_package_ends_before_any_work(tmp_path: Path) -> None:
    output = finish(start_training(write_run(tmp_path), "logging.wandb=true"), expect=2)
    assert "pip install wandb" in output
    assert "Traceback" not in output
    assert not (tmp_path / "small" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"wandb": 7}',
        '{"wandb": "../../etc"}',
        '{"wandb": "a b"}',
        "[" * 100_000,
        "\ud800",
        '{"wandb": ""}',
    ],
)
def test_an_id_is_kept_whatever_the_file_holds(tmp_path: Path, text: str) -> None:
    (tmp_path / "trackers.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert run_id(tmp_path, "wandb") is None
    assert run_id(tmp_path, "wandb", "one") == "one"
    assert run_id(tmp_path, "mlflow", "two") == "two"
    assert run_id(tmp_path, "wandb", "three") == "one"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "one", "mlflow": "two"}


def track(folder: Path, config: LoggingConfig, steps: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for _, tracker in open_trackers(folder, config, steps.start - 1):
        for step in steps:
            tracker.write(step, {"loss": 1 / step, "moe/1/entropy": 0.5, "grad_norm": math.nan})
        tracker.close()


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = LoggingConfig(tensorboard=False, mlflow=True, project="trial")
    track(tmp_path / "runs" / "one", config, range(1, 5))
    track(tmp_path / "runs" / "one", config, range(3, 7))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 3, 4, 4, 5, 6]
    assert run.data.metrics["moe/1/entropy"] == 0.5


def test_mlflow_that_cannot_begin_is_a_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at.all")
    with pytest.raises(UserError, match=r"logging\.mlflow = true, but it cannot begin: .*nowhere"):
        track(tmp_path, LoggingConfig(tensorboard=False, mlflow=True), range(1, 2))


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = LoggingConfig(tensorboard=False, wandb=True, project="trial")
    track(tmp_path / "one", config, range(1, 5))
    track(tmp_path / "one", config, range(3, 7))
    number = run_id(tmp_path / "one", "wandb")
    folders = [path for path in (tmp_path / "one" / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert folders
    assert all(path.name.endswith(f"-{number}") for path in folders)
    assert all((path / f"run-{number}.wandb").stat().st_size > 0 for path in folders)


def test_wandb_that_cannot_begin_is_a_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    output = finish(start_training(write_run(tmp_path), "logging.wandb=true"), expect=2)
    assert "logging.wandb = true, but it cannot begin" in output
    assert "WANDB_MODE=offline" in output
    assert "Traceback" not in output
