"""`pretrain compare` trains what it compares: as `train` would, on any number of processes, and on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import PROJECT, TIMINGS, finish, read_metrics, start_training, write_run


def start(a: Path, b: Path, out: Path, *more: object, processes: int = 1) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*launcher, "-m", "pretrain", "compare", *map(str, (a, b, "--out", out, *more))],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def numbers(out: Path) -> dict[str, Any]:
    return json.loads((out / "compare.json").read_text())  # type: ignore[no-any-return]


def without_timings(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(run)]


def test_fp32_against_bf16(tmp_path: Path) -> None:
    config, out = write_run(tmp_path), tmp_path / "out"
    bf16 = ("--set-b", "precision.dtype=bf16", "--seeds", 1)
    output = finish(start(config, config, out, *bf16, "--limit", 20))
    assert "Within the limit" in output
    assert 'differs: precision.dtype: "fp32" → "bf16"' in output
    found = numbers(out)
    assert 0 < abs(found["gap"]) < 0.02
    assert found["noise_floor"] > 0
    for line_a, line_b in zip(read_metrics(out / "a"), read_metrics(out / "b"), strict=True):
        assert line_b["lm_loss"] == pytest.approx(line_a["lm_loss"], rel=0.02)
        assert line_b["data_position"] == line_a["data_position"]
    assert read_metrics(out / "a-seed-1")[0]["lm_loss"] != read_metrics(out / "a")[0]["lm_loss"]

    # The first run is the one that `train` makes, and the second as well, though another came before it.
    finish(start_training(config, "run.name=fp32"))
    assert without_timings(out / "a") == without_timings(tmp_path / "fp32")
    finish(start_training(config, "run.name=bf16", 'precision.dtype="bf16"'))
    assert without_timings(out / "b") == without_timings(tmp_path / "bf16")

    again = finish(start(config, config, out, *bf16, "--limit", 0.0001), expect=3)
    assert "started" not in again
    assert "resumed" not in again
    assert numbers(out)["gap"] == found["gap"]
    refused = finish(
        start(config, config, out, "--set-b", "precision.dtype=bf16", "--set", "optimizer.moments=bf16"), expect=2
    )
    assert f'{out}/a holds a run with optimizer.moments = "fp32", but A has "bf16"' in refused
    assert "Traceback" not in refused


def test_equal_configurations_on_two_processes_have_no_gap(tmp_path: Path) -> None:
    config, out = write_run(tmp_path), tmp_path / "out"
    output = finish(start(config, config, out, processes=2))
    assert output.count("Within the limit: the gap is at most 0.000 %") == 1
    assert (numbers(out)["gap"], numbers(out)["noise"]) == (0, 0)


def stop_in(run: Path, process: subprocess.Popen[str]) -> int:
    """Asks for a stop once a run has made three steps; returns the steps that it has made in the end."""
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    finish(process, expect=75)
    return len(read_metrics(run))


def test_a_stopped_comparison_goes_on(tmp_path: Path) -> None:
    config, out = write_run(tmp_path), tmp_path / "out"
    steps = stop_in(out / "a", start(config, config, out, "--steps", 100000)) + 40
    assert stop_in(out / "b", start(config, config, out, "--steps", steps)) < steps
    assert not (out / "compare.json").exists()
    output = finish(start(config, config, out, "--steps", steps))
    assert f"{out}/a" not in output
    assert "resumed after step" in output
    for name in "ab":
        assert [line["step"] for line in read_metrics(out / name)] == list(range(1, steps + 1))
    assert numbers(out)["gap"] == 0
