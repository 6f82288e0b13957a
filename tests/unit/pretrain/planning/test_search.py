"""The search finds the fastest layouts that fit, as trying all of them would, and soon."""

import time
from pathlib import Path

import pytest
from support import PROJECT

from pretrain.__main__ import main
from pretrain.config import Config, check_layout, load_config
from pretrain.errors import UserError
from pretrain.planning.footprint import memories_of
from pretrain.planning.hardware import load_hardware
from pretrain.planning.search import _predict, describe_change, layouts, nearest, search

H100 = load_hardware(Path("h100"))


def shipped(name: str, *overrides: str) -> Config:
    return load_config(PROJECT / "configs" / f"{name}.toml", overrides)


def divides(config: Config, ranks: int) -> bool:
    try:
        check_layout(config, ranks)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("limit", [30e9, 80e9])
def test_it_finds_what_trying_all_finds(limit: float) -> None:
    config = shipped("dsv3_2b", "train.batch_size=32", "parallel.schedule=1f1b")
    every = list(layouts(config, 2))
    fitting = [
        layout
        for layout in every
        if divides(layout, 2) and max(memory.on_device for memory in memories_of(layout, 2)) <= limit
    ]
    speeds = sorted((_predict(layout, 2, H100).tokens_per_s for layout in fitting), reverse=True)
    found = search(config, 2, H100, limit=limit)
    assert [layout.tokens_per_s for layout in found] == pytest.approx(speeds[:10])
    assert 10 == len(found) < len(fitting) < len(every)
    for layout in found:
        assert layout.memory.on_device <= limit


def test_all_that_may_vary_varies() -> None:
    parallels = [layout.parallel for layout in layouts(shipped("dsv3_671b"), 2048)]
    # On shorter pipelines the batch of 256 sequences more does not divide over the data ranks.
    assert {parallel.pp for parallel in parallels} == {8, 16, 32}
    assert {parallel.ep for parallel in parallels} == {1 << power for power in range(9)}
    assert {parallel.schedule for parallel in parallels} == {"1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"}
    assert {layout.parallel.zero_stage for layout in layouts(shipped("dsv3_2b"), 8)} == {0, 1, 2, 3}
    assert len({parallel.recompute for parallel in parallels}) > 3
    assert {parallel.cp for parallel in parallels} == {1}
    assert {layout.parallel.cp for layout in layouts(shipped("dsv3_671b_32k"), 2048)} == {1, 2, 4, 8}
    assert {layout.train.micro_batch_size for layout in layouts(shipped("dsv3_2b"), 1)} == {1, 2, 4, 8, 16}


def test_the_671b_on_2048_ranks_within_a_minute() -> None:
    config, seen = shipped("dsv3_671b"), [0, 0]

    def tick(done: int, total: int) -> None:
        seen[:] = done, total

    began = time.process_time()
    found = search(config, 2048, H100, limit=80e9, tick=tick)
    assert time.process_time() - began < 60
    assert 0 < seen[0] <= seen[1]
    speeds = [layout.tokens_per_s for layout in found]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[0] > _predict(config, 2048, H100).tokens_per_s
    for layout in found:
        check_layout(layout.config, 2048)
        assert layout.memory.on_device <= 80e9


def test_the_command_prints_the_best_ten(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(PROJECT / "configs" / "dsv3_2b.toml")
    assert main(["plan", path, "--world-size", "8", "--search"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.split("\n") if line.strip()[:1].isdigit()]
    assert len(rows) == 10
    first = text.strip().split("\n")[-1].removeprefix("The first: ")
    options = [word for word in first.split(" --set ") if word]
    overrides = [option.removeprefix("--set ").replace("'", "") for option in options]
    best = _predict(shipped("dsv3_2b", *overrides), 8, H100)
    assert f"{best.tokens_per_s:,.0f}" == rows[0][0]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dsv3_671b", ["--world-size", "8"], "no layout of 8 ranks divides and fits into 74.5 GiB; use more ranks"),
        ("tiny", [], 'set precision.dtype = "bf16"'),
    ],
)
def test_a_search_in_vain(name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PROJECT / "configs" / f"{name}.toml"), "--search", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_nearest_to_a_layout_that_works_is_itself() -> None:
    config = shipped("dsv3_671b")
    found = nearest(config, 2048, 80e9)
    assert found is not None
    assert (found[0].parallel, found[1]) == (config.parallel, 2048)
    assert describe_change(config, *found, world_size=2048) == ""
