"""What a run writes down."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import pretrain.recorder
from pretrain.config import LoggingConfig
from pretrain.recorder import Goal, Recorder, drop_later_metrics, peak_tflops


def step_metrics(step: int, **more: object) -> dict[str, object]:
    numbers = {"loss": 1.25, "grad_norm": math.nan, "lr": 1e-3, "tokens_per_s": 10.0}
    return {"step": step, "tokens": step * 8, **numbers, **more}


def record(folder: Path, first: int, last: int) -> None:
    with Recorder(folder, LoggingConfig(every=2), step=first - 1, goal=Goal("step", first - 1, last)) as recorder:
        for step in range(first, last + 1):
            recorder.record(step_metrics(step, first=first))


def test_later_lines_are_replaced_after_a_resume(tmp_path: Path) -> None:
    record(tmp_path, 1, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "to')
    record(tmp_path, 5, 8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["first"] for line in lines] == [1] * 4 + [5] * 4


def test_numbers_are_unrounded_and_json(tmp_path: Path) -> None:
    record(tmp_path, 1, 1)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["grad_norm"] is None
    assert json.loads(text)["lr"] == 1e-3


def test_dropping_keeps_whole_earlier_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n[]\n{"step": 2}\n{"step": 3}\n{"step": 2')
    drop_later_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_log_and_tensorboard_exist(tmp_path: Path, capsys) -> None:
    record(tmp_path, 1, 4)
    assert (tmp_path / "log.txt").read_text().count("step") == 3
    assert list((tmp_path / "tensorboard").iterdir())
    assert "loss 1.2500" in capsys.readouterr().err


def test_events_stay_after_a_resume(tmp_path: Path) -> None:
    for step in (0, 3, 1):
        with Recorder(tmp_path, LoggingConfig(tensorboard=False), step=step, goal=Goal("step", step, 9)) as recorder:
            recorder.tell("resume" if step else "start", step, "begins\nso")
        with open(tmp_path / "events.jsonl", "a") as file:
            file.write('{"step": 7, "to')
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines[::2]]
    assert [(event["step"], event["kind"]) for event in events] == [(0, "start"), (3, "resume"), (1, "resume")]
    assert events[0]["text"] == "begins\nso"
    assert events[0]["time"] <= events[1]["time"] <= events[2]["time"]
    assert lines[1::2] == ['{"step": 7, "to'] * 3


def test_nested_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with Recorder(tmp_path, LoggingConfig(tensorboard=False), step=0, goal=Goal("step", 0, 9)) as recorder:
        recorder.record(step_metrics(1, parts={"head": {"grad_norm": math.inf}}, ranks={"busy_s": [1.0, math.nan]}))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["parts"], line["ranks"]) == ({"head": {"grad_norm": None}}, {"busy_s": [1.0, None]})


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, step: int, scalars: dict[str, float]) -> None:
            raise OSError("no space\nleft")

        def close(self) -> None:
            raise AssertionError("closed after it failed")

    monkeypatch.setattr(pretrain.recorder, "open_trackers", lambda *_: iter([("board", Full())]))
    record(tmp_path, 1, 4)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "log.txt").read_text().count("board failed and gets no more numbers") == 1
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize("goal", [Goal("step", 6, 10), Goal("tokens", 48, 80)])
def test_a_resumed_run_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: Goal) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Recorder(tmp_path, LoggingConfig(tensorboard=False), step=6, goal=goal) as recorder:
        assert recorder._progress is not None
        (task,) = recorder._progress._progress.tasks
        assert (task.completed, task.total) == (goal.done, goal.total)
        recorder.record(step_metrics(7))
        assert task.completed == {"step": 7, "tokens": 56}[goal.metric]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_peaks_are_those_of_the_part_in_bf16(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    device = torch.device("cuda")
    assert peak_tflops(LoggingConfig(), device, torch.bfloat16) == peak
    assert peak_tflops(LoggingConfig(), device, torch.float32) is None
    assert peak_tflops(LoggingConfig(peak_tflops=60.0), device, torch.float32) == 60.0
    assert peak_tflops(LoggingConfig(), torch.device("cpu"), torch.bfloat16) is None
