"""`pretrain report A B` lays runs side by side that are there already."""

import json
from pathlib import Path

import pytest
from run_records import Faults, Recipe, write_synthetic_run

from pretrain.__main__ import main
from pretrain.errors import UserError
from pretrain.reports.side_by_side import write_side_by_side


def runs(folder: Path) -> list[Path]:
    longer = Recipe(num_steps=200, total_tokens=1_500_000, overrides=("train.batch_size=64", "optimizer.clip=0.5"))
    a = write_synthetic_run(folder / "a")
    b = write_synthetic_run(folder / "b", Recipe(seed=1), Faults(dead=(("1", 0, 0),)))
    return [a, b, write_synthetic_run(folder / "c", longer)]


def test_three_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = runs(tmp_path)
    assert main(["report", *map(str, folders)]) == 0
    path = tmp_path / "compare-a-b-c.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = path.read_text(encoding="utf-8")
    assert "b: Dead expert: layer 1, expert 0" in text
    for title in ("In numbers", "Loss", "Difference of the losses", "Throughput", "What differs"):
        assert f"<h2>{title}</h2>" in text
    assert "optimizer.clip" in text
    # Of the same tokens the noise is known, of others it is not.
    assert "±" in text.partition("b, last fifth")[2][:60]
    assert "±" not in text.partition("c, last fifth")[2][:60]
    assert "<script" not in text


def test_the_difference_is_that_of_the_losses(tmp_path: Path) -> None:
    a = write_synthetic_run(tmp_path / "a")
    b = write_synthetic_run(tmp_path / "b")
    lines = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["lm_loss"] += 0.25
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_side_by_side([a, b], tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "+0.2500 nats" in text


def test_runs_with_nothing_in_common(tmp_path: Path) -> None:
    folders = []
    for name, first in (("a", 1), ("b", 1000)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        (folders[-1] / "config.toml").write_text("")
        steps = range(first, first + 20)
        lines = [json.dumps({"step": step, "tokens": 10 * step, "lm_loss": 2.0}) for step in steps]
        (folders[-1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "no tokens in common" in write_side_by_side(folders, None).read_text(encoding="utf-8")


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_synthetic_run(tmp_path / above / "run", Recipe(num_steps=20)) for above in ("x", "y")]
    text = write_side_by_side(folders, None).read_text(encoding="utf-8")
    assert "<h1>x/run · y/run</h1>" in text


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_synthetic_run(tmp_path / "a", Recipe(num_steps=20))
    with pytest.raises(UserError, match="name each folder once"):
        write_side_by_side([run, tmp_path / "b" / ".." / "a"], None)
    with pytest.raises(UserError, match="at most 6 runs, as many as can be told apart; 7 are named"):
        write_side_by_side([tmp_path / str(number) for number in range(7)], None)
    with pytest.raises(UserError, match="cannot be written"):
        write_side_by_side([run, write_synthetic_run(tmp_path / "b", Recipe(num_steps=20))], run / "config.toml" / "x")
    assert main(["report", str(run), "--out", "x.html"]) == 2
    assert main(["report", str(run), str(tmp_path / "absent")]) == 2
    assert "train first" in capsys.readouterr().err
