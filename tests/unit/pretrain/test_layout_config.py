"""Layouts that ranks, layers, experts or batches do not fit are refused with the rule and what would fit."""

from pathlib import Path

import pytest
from run_config import RUN

from pretrain.__main__ import main
from pretrain.config import Config, check_layout, load_config
from pretrain.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


EVEN = ("model.num_hidden_layers=8", "train.micro_batch_size=1")
LAYOUTS = {
    "ranks and pipeline": (
        ["parallel.pp=4"],
        6,
        "6 ranks cannot be divided into parallel.pp × parallel.cp = 4 × 1 = 4; use a multiple of it, or lower "
        "one of them",
    ),
    "ranks and experts": (
        ["parallel.ep=4"],
        6,
        "parallel.ep = 4 must divide the dp × cp = 6 × 1 = 6 ranks that 6 ranks with parallel.pp = 1 have for each "
        "part of the layers; use 3 or 6",
    ),
    "experts": (
        ["parallel.ep=3"],
        3,
        "parallel.ep = 3 must divide model.n_routed_experts = 8; lower it",
    ),
    "heads and positions": (
        ["parallel.cp=4"],
        4,
        "parallel.cp = 4 must divide model.num_attention_heads = 2; lower it",
    ),
    "positions": (
        ["parallel.cp=2", "train.seq_len=63"],
        2,
        "train.seq_len = 63 must be a multiple of parallel.cp = 2, among whose ranks positions are divided; change one "
        "of them",
    ),
    "layers": (
        ["parallel.pp=8"],
        8,
        "model.num_hidden_layers = 3 are too few for 8 pipeline stages, which need 7; lower parallel.pp, or take a "
        "parallel.schedule with one stage a rank",
    ),
    "layers of two stages a rank": (
        ["parallel.pp=4", "parallel.schedule=zbv"],
        4,
        "model.num_hidden_layers = 3 are too few for 8 pipeline stages, which need 7; lower parallel.pp, or take a "
        "parallel.schedule with one stage a rank",
    ),
    "an odd pipeline of two directions": (
        [*EVEN, "parallel.pp=3", "parallel.schedule=dualpipe"],
        3,
        'parallel.pp = 3 must be even for parallel.schedule = "dualpipe", where ranks hold the stages in pairs; change '
        'it, or use "dualpipev"',
    ),
    "an odd number of micro-batches": (
        [*EVEN, "train.batch_size=9", "parallel.pp=4", "parallel.schedule=dualpipe"],
        4,
        "a batch of 9 sequences is 9 micro-batches of 1 for each of 1 data ranks: schedule "
        '"dualpipe" has 9 micro-batches; it needs an even number, since one half goes each way: use 10, or "dualpipev"',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "ranks", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_cannot_be(run: Path, overrides: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(load(run, *overrides), ranks)
    assert str(caught.value) == message


def test_a_layout_that_cannot_be_ends_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run), "--world-size", "6", "--set", "parallel.pp=4"]) == 2
    assert "6 ranks cannot be divided" in capsys.readouterr().err


def test_layouts_that_can_be(run: Path) -> None:
    for overrides, ranks in (
        (["parallel.pp=4"], 4),
        (["parallel.pp=2", "parallel.ep=4"], 8),
        (["parallel.ep=8", "train.micro_batch_size=1"], 8),
        ([*EVEN, "parallel.pp=4", "parallel.schedule=dualpipe"], 4),
        ([*EVEN, "parallel.pp=4", "parallel.schedule=dualpipe"], 8),
        ([*EVEN, "parallel.pp=4", "parallel.schedule=zbv"], 4),
    ):
        check_layout(load(run, *overrides), ranks)


def test_every_batch_of_the_timeline_must_divide(run: Path) -> None:
    run.write_text(RUN.replace("batch_size = 8\n", "", 1))
    constant = "timeline.batch_size=[{value=8, until=1e6}, {value=12}]"
    check_layout(load(run, constant), 2)
    with pytest.raises(UserError, match=r"timeline\.batch_size = 12 must be a multiple of .* = 2 × 4 = 8"):
        check_layout(load(run, constant), 4)
    ramp = "timeline.batch_size=[{shape='linear', start=8, value=64, until=1e6}, {value=64}]"
    with pytest.raises(UserError, match=r"timeline\.batch_size_multiple = 1 must be a multiple of .* = 2 × 2 = 4"):
        check_layout(load(run, ramp), 2)
    check_layout(load(run, ramp, "timeline.batch_size_multiple=4"), 2)
