"""Benchmarks that need a GPU for their numbers still run, on a CPU and small."""

import asyncio
import email
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT, read_metrics, write_dataset


def run(*arguments: object, expect: int = 0) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", vocab_size=2048)


def test_step_speed_keeps_what_a_row_measured_before_it_failed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("benchmarks/step_speed.py", "--data", data, "--config", "configs/tiny.toml", "--out", out, "--only", "Eva")
    sizes = ("--batches", 1, 0, "--warm-up", 1, "--steps", 1)
    printed = run(*asked, "--eva", "fp32", *sizes)
    assert "| Eva | fp32 | 1 |" in printed
    assert [line["batch"] for line in map(json.loads, (out / "Eva-fp32.jsonl").read_text().splitlines()[1:])] == [1]
    assert printed == run(*asked, "--eva", "fp32", "--only-table") == (out / "table.md").read_text()


NARROW = """
base = "{project}/configs/tiny.toml"
[model]
hidden_size = 256                # two tiles, or there would be no tile before another
num_hidden_layers = 2
num_nextn_predict_layers = 0
initializer_range = 0.03
[train]
seq_len = 64
validation_samples = 8
"""


def test_a_broken_scale_is_seen_by_the_comparison(tmp_path: Path) -> None:
    data, out, config = tmp_path / "data", tmp_path / "out", tmp_path / "narrow.toml"
    # Not Eva's own text, which changes from day to day, and with it how much 40 steps show.
    sources = [Path(package.__file__).parent for package in (asyncio, email)]
    run("-m", "data", "prepare", *sources, "--include", "*.py", "--out", data, "--train-tokenizer", 512)
    config.write_text(NARROW.format(project=PROJECT))
    asked = ("benchmarks/fp8_loss.py", "--data", data, "--out", out, "--config", config, "--learning-rate", 3e-3)
    printed = run(*asked, "--batch", 8, "--common-steps", 20, "--steps", 40, "--planted-steps", 40, "--limit", 1)
    found = json.loads((out / "summary.json").read_text())
    assert found["planted"]["gap"] > 0.01 > abs(found["healthy"]["gap"])
    assert found["healthy"]["gap"] == found["FP8"]["gap"]
    a, *others = (read_metrics(out / run) for run in ("a", "b", "planted/b"))
    for other in others:
        same = [one["loss"] == two["loss"] for one, two in zip(a, other, strict=True)]
        assert same == [True] * 20 + [False] * 40, "all runs are one for the first steps"
    assert "passed: limit 1.0 %" in printed
    for folder in (out, out / "planted", out / "healthy"):
        assert (folder / "compare.svg").is_file()


@pytest.mark.parametrize("layout", [("--ep", 1), ("--ep", 2, "--peers")])
def test_sides_of_the_overlap_agree(layout: tuple[object, ...]) -> None:
    """Where rows go to their own rank, and on two ranks, with torch's schedule and DeepSpeed's engine beside."""
    asked = ("benchmarks/overlap_speed.py", *layout, "--device", "cpu", "--rounds", 1, "--micro-batches", 4)
    printed = run(*asked, "--micro-batch-size", 1)
    assert "on all sides" in printed
    assert "BUT" not in printed
    assert printed.count("| pairs in turns") == 2
    assert printed.count("DualPipeV") == (2 if "--peers" in layout else 0)
