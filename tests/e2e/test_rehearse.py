"""Rehearsals for real: all is as the timeline says, or what is not is named; and no process stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import PROJECT, read_metrics, write_run

from data.stream import SampleStream
from pretrain import loop
from pretrain.__main__ import main
from pretrain.assemble import Assembly
from pretrain.config import load_config
from pretrain.state import TrainState
from pretrain.timeline import Timeline, TimelineValues

SMALL = ("--processes", "2", "--set", "parallel.pp=2", "--set", "parallel.schedule=dualpipe")


def rehearse(config: Path, out: Path, *options: str) -> int:
    return main(["rehearse", str(config), "--out", str(out), *options])


def record(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "rehearsal.json").read_text())
    return loaded


@pytest.mark.timeout(600)
def test_the_timeline_of_the_report_on_fewer_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every boundary of the 671B, with a part of its stages, layers and experts."""
    layout = ("parallel.pp=4", "model.num_hidden_layers=11", "model.n_routed_experts=32")
    options = [word for override in layout for word in ("--set", override)]
    assert rehearse(PROJECT / "configs" / "dsv3_671b.toml", tmp_path / "out", "--processes", "4", *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 7
    counts = re.search(r"samples: (\d+) with (\d+) ends of documents, (\d+) of them rewritten for FIM", printed)
    assert counts is not None
    assert min(map(int, counts.groups())) > 0
    rows = record(tmp_path / "out")["boundaries"]
    assert [row["original"] for row in rows] == [28_032_630_784, 469e9, 10e12, 14.3e12, 14.633e12, 14.8e12]
    assert [row["name"] for row in rows] == ["lr", "batch", "lr, MTP", "lr, γ", "lr", "end"]
    run = tmp_path / "out" / "rehearse-dsv3-671b"
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["data_position"] == sum(line["batch_size"] for line in lines)
    starts = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith(("started", "resumed"))]
    assert len(starts) == 6
    assert (run / "report.html").is_file()
    assert load_config(run / "config.toml").precision.dtype == "bf16"


class Restarted(Timeline):
    """A timeline that begins anew where a run goes on."""

    begin = 0

    def at(self, tokens: int) -> TimelineValues:
        return super().at(tokens - self.begin)


def restart_timeline(run: Assembly, state: TrainState) -> TrainState:
    timeline = Restarted(run.timeline.config, run.timeline.batch_size, run.timeline.seq_len)
    object.__setattr__(timeline, "begin", state.tokens)
    object.__setattr__(run, "timeline", timeline)
    return state


def forget_position(run: Assembly, state: TrainState) -> TrainState:
    stream: SampleStream = run.stream
    return replace(state, position=stream.start(state.position.seq_len))


def lose_a_rank(run: Assembly, state: TrainState) -> TrainState:
    if run.place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return state


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (restart_timeline, "lr 0 instead of 0.01"),
        (forget_position, "data_position 4 instead of"),
        (lose_a_rank, "rank 1: died with exit status -9"),
    ],
)
def test_a_fault_at_a_boundary_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Assembly, TrainState], TrainState],
    message: str,
) -> None:
    others = set(psutil.Process().children(recursive=True))  # such as the browser of other tests
    resume = loop.resume

    def resume_wrongly(run: Assembly) -> TrainState | None:
        state = resume(run)
        return None if state is None else fault(run, state)

    monkeypatch.setattr(loop, "resume", resume_wrongly)
    assert rehearse(write_run(tmp_path), tmp_path / "out", *SMALL) == 3
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.count("of 3: ") == 2
    assert printed.count("FAIL") > 1
    assert not record(tmp_path / "out")["passed"]
    assert set(psutil.Process().children(recursive=True)) <= others


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_stays_behind(tmp_path: Path, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "pretrain", "rehearse", str(write_run(tmp_path)), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, *SMALL], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = tmp_path / "out" / "output.txt"
    while not output.is_file() or "started" not in output.read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 2
    process.send_signal(number)
    assert process.wait(10) == status
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive


def test_what_cannot_be_rehearsed_ends_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    assert rehearse(config, tmp_path / "out", "--set", "parallel.pp=17") == 2
    assert "parallel.pp = 17 needs as many processes" in capsys.readouterr().err
    assert rehearse(config, tmp_path) == 2
    assert "is not empty and holds no rehearsal; give another --out" in capsys.readouterr().err
    assert (tmp_path / "run.toml").is_file()
