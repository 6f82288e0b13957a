"""`pretrain watch` shows a run that goes on, stops, and comes back."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_records import Faults, Recipe, write_synthetic_run
from support import PROJECT

from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.recorder import drop_later_metrics
from pretrain.reports.following import Follower
from pretrain.reports.watch import plot, watch

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def step(number: int, **changes: object) -> str:
    line = {"step": number, "tokens": 100 * number, "lm_loss": 5.0 - number / 100, "step_time_s": 2.0}
    return json.dumps(line | {"tokens_per_s": 50.0, "lr": 1e-3, "grad_norm": 1.0} | changes) + "\n"


def append(folder: Path, text: str) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(text)


def test_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_synthetic_run(tmp_path / "run", faults=Faults(dead=(("2", 5, 120),), skipped=(7,), resumed=(250,)))
    assert main(["watch", str(folder), "--once"]) == 0
    shown = capsys.readouterr().out
    for part in ("300 of 500 steps", "loss, from 4.00K to 1.20M tokens", "dead experts 1 (layer 2)", "skipped 1"):
        assert part in shown, part
    for part in ("tokens/s", "MFU", "lr 0.0006", "memory 55.0 GiB", "resumed after step 250", "finished"):
        assert part in shown, part
    assert max(map(len, shown.splitlines())) <= 80


def test_what_is_new_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[train]\nsteps = 10\n")
    follower = Follower(tmp_path)
    assert follower.update().last == {}
    append(tmp_path, step(1) + step(2) + step(3)[:30])
    state = follower.update()
    assert (state.number("step"), len(state.losses)) == (2, 2)
    assert state.seconds_left == 16.0
    append(tmp_path, step(3)[30:] + "not JSON\n" + step(4))
    assert [loss for _, loss in follower.update().losses] == [4.99, 4.98, 4.97, 4.96]
    (tmp_path / "config.toml").write_text("[train]\ntokens = 1_000\n")
    assert follower.update().seconds_left == 12.0


def test_a_run_that_starts_again(tmp_path: Path) -> None:
    """Its metrics are a new file up to the step from which it goes on."""
    follower = Follower(tmp_path)
    append(tmp_path, "".join(step(number) for number in range(1, 9)) + '{"step": 9, "tok')
    assert follower.update().number("step") == 8
    drop_later_metrics(tmp_path / "metrics.jsonl", 5)
    assert follower.update().number("step") == 5
    append(tmp_path, step(6, lm_loss=1.0))
    state = follower.update()
    assert [loss for _, loss in state.losses] == [4.99, 4.98, 4.97, 4.96, 4.95, 1.0]
    (tmp_path / "metrics.jsonl").unlink()
    follower.update()
    append(tmp_path, step(1))
    assert follower.update().number("step") == 1


def test_a_rollback_in_the_same_file(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path, step(1) + step(2) + step(3) + step(2, lm_loss=9.0))
    assert [loss for _, loss in follower.update().losses] == [4.99, 9.0]


def test_of_a_long_file_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.reports.following._TAIL", 1000)
    append(tmp_path, "".join(step(number) for number in range(1, 101)))
    state = Follower(tmp_path).update()
    assert state.number("step") == 100
    assert 5 < len(state.losses) < 12


def test_nothing_yet_and_nothing_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(tmp_path, once=True)
    assert "waiting for the first step" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no run at .*absent; name the run's folder"):
        watch(tmp_path / "absent", once=True)


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"step": 1, "tokens": 2}\n', step(1, moe={"1": 3}, mfu=[], lr="x"), "\0"]
)
def test_odd_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    append(tmp_path, text)
    (tmp_path / "config.toml").write_text("[train\n\n")
    (tmp_path / "events.jsonl").write_text('{"kind": "save", "text": "\\u001b[2J[red]x[/red]", "time": 1e300}\n[]\n')
    watch(tmp_path, once=True)
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert "[red]x[/red]" in shown


def test_a_plot_rises_to_the_right() -> None:
    lines = plot([0.0, 1.0, 2.0, float("nan"), 4.0], 5, 2)
    assert [len(line) for line in lines] == [5, 5]
    assert lines[0][-1] != chr(0x2800)
    assert lines[0][0] == chr(0x2800)
    assert lines[1][0] != chr(0x2800)
    assert plot([1.0], 1, 1)[0] != chr(0x2800)
    assert plot([float("nan")], 2, 1) == [chr(0x2800) * 2]


def test_follows_until_interrupted(tmp_path: Path) -> None:
    """In a terminal: a step that is written later is seen, and Ctrl-C ends without a word."""
    folder = write_synthetic_run(tmp_path / "run", Recipe(num_steps=20))
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pretrain", "watch", str(folder)],
        cwd=PROJECT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    try:
        seen = _read_until(controller, "step 20 ")
        append(folder, step(21))
        seen += _read_until(controller, "step 21 ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(controller)
    assert "Traceback" not in seen


def _read_until(controller: int, wanted: str) -> str:
    seen, end = "", time.monotonic() + 100
    while wanted not in ESCAPES.sub("", seen):
        assert time.monotonic() < end, seen[-2000:]
        seen += os.read(controller, 65536).decode("utf-8", errors="replace")
    return seen
