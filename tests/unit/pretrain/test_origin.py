"""A run says which file, base and overrides it was made from, and the report what that changed."""

import json
from pathlib import Path

import pytest
import torch
from run_config import RUN

from pretrain.config import Config, dump_config, load_config
from pretrain.errors import UserError
from pretrain.origin import find_origin, write_origin
from pretrain.reports.config_values import default_values, differing, flatten
from pretrain.reports.run_record import read_record

CHILD = """
base = "{base}"
[train]
steps = 7
[timeline]
learning_rate = [{{ value = 1e-3, until = 10 }}, {{ value = 1e-4 }}]
"""


def write_run(folder: Path, config: Config) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "lm_loss": 4.0}\n')
    return folder


def differences(folder: Path) -> str:
    from pretrain.reports.config_cards import differences as card

    return card(read_record(folder)).picture


def test_a_run_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text(RUN)
    (tmp_path / "child.toml").write_text(CHILD.format(base="parent.toml"))
    overrides = ["train.batch_size=16"]
    folder = write_run(tmp_path / "run", load_config(tmp_path / "child.toml", overrides))
    write_origin(folder, find_origin(tmp_path / "child.toml", overrides), torch.device("cpu"))
    written = json.loads((folder / "origin.json").read_text())
    assert written["file"] == str(tmp_path / "child.toml")
    assert (written["overrides"], written["device"], written["device_memory_gib"]) == (overrides, "cpu", None)
    shown = differences(folder)
    assert "3 keys differ from parent.toml" in shown
    assert all(key in shown for key in ("train.steps", "train.batch_size", "timeline.learning_rate"))
    assert "model." not in shown


def test_a_base_that_is_no_whole_configuration(tmp_path: Path) -> None:
    head, _, rest = RUN.partition("[data]")
    (tmp_path / "model.toml").write_text(head)
    (tmp_path / "run.toml").write_text(f'base = "model.toml"\n[data]{rest}')
    folder = write_run(tmp_path / "run", load_config(tmp_path / "run.toml"))
    write_origin(folder, find_origin(tmp_path / "run.toml", ()), torch.device("cpu"))
    shown = differences(folder)
    assert "differ from model.toml" in shown
    assert "train.seq_len" in shown
    assert "model.hidden_size" not in shown


def test_without_a_base_the_defaults_count(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    folder = write_run(tmp_path / "run", load_config(tmp_path / "run.toml"))
    for wrong in (None, "[]", "torn {", '{"base": 3}', '{"base": {"values": 3}}'):
        if wrong is not None:
            (folder / "origin.json").write_text(wrong)
        shown = differences(folder)
        assert "differ from the defaults" in shown
        assert "model.hidden_size" in shown
        assert "optimizer." not in shown


def test_defaults_are_those_of_a_resolved_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    resolved, defaults = (
        flatten(read_record(write_run(tmp_path / "run", load_config(tmp_path / "run.toml"))).config),
        (default_values()),
    )
    given = {"train", "model", "run", "data", "timeline"}
    assert {
        key for key, value in resolved.items() if defaults.get(key) != value if key.split(".")[0] not in given
    } == set()
    assert defaults["checkpoint.async"] is False


def test_values_that_differ() -> None:
    a, b = {"x": {"y": 1, "z": 2}, "run": {"name": "a"}}, {"x": {"y": 1}, "run": {"name": "b"}}
    assert differing(a, b) == {"x.z": (2, None)}
    assert differing(a, a, b) == {"x.z": (2, 2, None)}


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        find_origin(tmp_path / "none.toml", ())
