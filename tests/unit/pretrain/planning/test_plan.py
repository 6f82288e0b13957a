"""A plan counts what a run does: its parameters, its steps one by one, its layout and the pipeline."""

import io
import shlex
import time

import pytest
from rich.console import Console
from support import PROJECT

from pretrain.__main__ import main
from pretrain.config import Config, TrainConfig, load_config
from pretrain.errors import UserError
from pretrain.planning.memory import GIB
from pretrain.planning.plan import check_memory, plan
from pretrain.planning.steps import stretches
from pretrain.planning.tables import render
from pretrain.timeline import Piece, Timeline, TimelineConfig
from pretrain.units import short

GB = 10**9


def shipped(name: str, *overrides: str) -> Config:
    return load_config(PROJECT / "configs" / f"{name}.toml", overrides)


RANKS = {"dsv3_671b": 2048}


def printed(name: str, *overrides: str, ranks: int | None = None, width: int = 80) -> str:
    file = io.StringIO()
    planned = plan(shipped(name, *overrides), ranks or RANKS.get(name, 1))
    render(planned, Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "total_count", "active", "mtp"),
    [
        ("dsv3_671b", 671_026_404_352, 36_625_603_584, 11_610_067_968),
        ("dsv3_16b", 15_816_584_704, 2_506_485_248, 593_242_624),
        ("dsv3_2b", 2_773_124_608, 516_589_056, 0),
        ("small", 472_967_168, 142_141_440, 45_323_776),
    ],
)
def test_parameters_of_the_shipped_models(name: str, total_count: int, active: int, mtp: int) -> None:
    counts = plan(shipped(name), RANKS.get(name, 1)).counts
    assert (counts.total, counts.active, counts.mtp) == (total_count, active, mtp)


def test_the_report_s_sizes_are_printed() -> None:
    text = printed("dsv3_671b")
    assert "671B, of which a token uses 36.6B" in text
    assert "98.2 % less than the 32,768 of multi-head attention" in text
    assert "2,048: dp 128, pp 16, ep 64, cp 1" in text
    assert "dualpipe over 16 stages" in text
    assert "4 × 14, 5, 0; the last has the head too" in text
    assert "24 to 120 in each pipeline, of 1 sequence" in text
    assert "the bubble is 23.4 % (3.7 % of one of 120)" in " ".join(text.split())


def test_the_report_s_bubble_is_the_formula_s() -> None:
    timeline = plan(shipped("dsv3_671b"), 2048).pipeline(-1)
    assert timeline is not None
    assert timeline.schedule.num_micro_batches == 120
    # (PP / 2 - 1)(F&B + B - 3W), where F&B takes F + B, B = 2F and W = F.
    assert timeline.bubble == (16 / 2 - 1) * (3 + 2 - 3)


def test_the_report_s_run_in_steps() -> None:
    began = time.process_time()
    planned = plan(shipped("dsv3_671b"), 2048)
    assert time.process_time() - began < 4
    assert [(milestone.step, milestone.tokens // GB) for milestone in planned.milestones] == [
        (0, 0),
        (2000, 28),
        (15_003, 469),
        (166_495, 10_000),
        (234_841, 14_300),
        (240_134, 14_633),
    ]
    assert (planned.num_steps, planned.num_tokens // GB) == (242_789, 14_800)
    assert [milestone.values.batch_size for milestone in planned.milestones] == [3072, 3840, *[15_360] * 4]


def test_the_report_s_run_fits_its_gpus() -> None:
    planned = plan(shipped("dsv3_671b"), 2048)
    check_memory(shipped("dsv3_671b"), planned, 80e9 / GIB)
    assert len(planned.memories) == 16
    memory = planned.memory
    assert memory.on_device - memory.peak == pytest.approx(GIB + memory.outboxes + 0.03 * memory.peak, abs=1)


def test_memory_is_shown_by_part_and_place() -> None:
    lines = printed("dsv3_671b", width=100).split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("Memory along the pipeline"))
    names, rows = lines[first + 1].split(), [line.split() for line in lines[first + 3 : first + 18]]
    assert names == ["rank", "weights", "grads", "optim", "wait", "loss", "back", "kept", "peak", "GPU"]
    assert [row[0] for row in rows] == [*map(str, range(7)), "7-8", *map(str, range(9, 16))]
    for row in rows:
        numbers = [float(number) for number in row[1:]]
        assert sum(numbers[:-2]) == pytest.approx(numbers[-2], abs=0.4)
        assert numbers[-1] > numbers[-2]
    assert max(float(row[-1]) for row in rows) == float(rows[7][-1])


def count_one_by_one(timeline: Timeline, train: TrainConfig) -> list[tuple[int, int, int]]:
    """Step, tokens before it and its size, for every step."""
    found: list[tuple[int, int, int]] = []
    step, tokens = 0, 0
    while (step < train.steps) if train.steps is not None else (tokens < (train.tokens or 0)):
        values = timeline.at(tokens)
        found.append((step, tokens, values.batch_size * values.seq_len))
        step, tokens = step + 1, tokens + values.batch_size * values.seq_len
    return found


@pytest.mark.parametrize("stop", [{"steps": 500}, {"tokens": 123_456}, {"steps": 1}, {"tokens": 1}])
@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_stretches_are_the_steps_of_the_loop(stop: dict[str, int], multiple: int, shape: str) -> None:
    batch = (
        Piece(value=16.0, until=999.5),
        Piece(shape=shape, value=64.0, until=30_000),  # type: ignore[arg-type]
        Piece(value=32.0, until=60_000),
        Piece(shape="linear", start=64.0, value=16.0, until=90_000),
        Piece(value=48.0),
    )
    lengths = (Piece(value=8, until=50_000), Piece(value=16))
    config = TimelineConfig(learning_rate=1.0, batch_size=batch, batch_size_multiple=multiple, seq_len=lengths)
    timeline = Timeline(config, None, 8)
    train = TrainConfig(seq_len=8, micro_batch_size=1, **stop)
    steps = [
        (stretch.step + index, stretch.tokens + index * stretch.tokens_per_step, stretch.tokens_per_step)
        for stretch in stretches(timeline, train)
        for index in range(stretch.num_steps)
    ]
    assert steps == count_one_by_one(timeline, train)


def test_flops_of_the_run_are_those_of_its_tokens() -> None:
    planned = plan(shipped("dsv3_2b"), 1)
    assert planned.flops == pytest.approx(planned.flops_per_token * planned.num_tokens)
    assert planned.flops_per_token == pytest.approx(6 * 516_589_056, rel=0.2)


ALONE = ("parallel.max_expert_rows=0", "parallel.pp=1", "parallel.ep=1", "parallel.schedule=1f1b")
LARGER = ("train.micro_batch_size=2", "optimizer.moments=fp32")
MASTERS = "masters and moments, 31.0 GiB; the nearest layout that fits: "


@pytest.mark.parametrize(
    ("name", "overrides", "gib", "message"),
    [
        ("dsv3_2b", LARGER, 53, f"{MASTERS}--set train.micro_batch_size=1"),
        ("dsv3_2b", LARGER, 51, f"{MASTERS}--set parallel.recompute='[\"block\"]'"),
        ("dsv3_2b", LARGER, 32, f"{MASTERS}--world-size 2 --set"),
        ("dsv3_671b", ALONE, 80, "masters and moments, 5086.0 GiB; the nearest layout that fits: --world-size 256 "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(
    name: str, overrides: tuple[str, ...], gib: float, message: str
) -> None:
    config = shipped(name, *overrides)
    planned = plan(config, 1)
    with pytest.raises(UserError) as caught:
        check_memory(config, planned, gib)
    needed = planned.memory.on_device / GIB
    assert str(caught.value).startswith(
        f"a rank needs {needed:.1f} GiB, more than --device-memory {gib}; the largest part is {message}"
    )
    check_memory(config, planned, needed + 0.01)
    ranks, changes = parse_change(str(caught.value), 1)
    changed = shipped(name, *overrides, *changes)
    check_memory(changed, plan(changed, ranks), gib)


def parse_change(message: str, ranks: int) -> tuple[int, list[str]]:
    """The ranks and the values of --set that a message gives, as a shell reads them."""
    words = shlex.split(message.rpartition(": ")[2])
    options = dict(zip(words[::2], words[1::2], strict=True)) if "--world-size" in words else {}
    return int(options.get("--world-size", ranks)), [
        value for option, value in zip(words[::2], words[1::2], strict=True) if option == "--set"
    ]


def test_no_layout_fits_into_nothing() -> None:
    config = shipped("tiny")
    with pytest.raises(UserError, match="no layout of any number of ranks fits"):
        check_memory(config, plan(config, 1), 0.5)


@pytest.mark.parametrize(
    ("name", "ranks", "overrides", "reason"),
    [
        ("dsv3_2b", 7, (), "train.batch_size = 320 must be a multiple of"),
        ("dsv3_2b", 8, ("parallel.ep=3",), "parallel.ep = 3 must divide"),
        ("dsv3_671b", 2048, ("parallel.pp=15",), "2048 ranks cannot be divided"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(
    name: str, ranks: int, overrides: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--set={override}" for override in overrides]
    path = str(PROJECT / "configs" / f"{name}.toml")
    assert main(["plan", path, "--world-size", str(ranks), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"pretrain: {reason}")
    assert "the nearest layout that divides: " in said
    better, changes = parse_change(said, ranks)
    plan(shipped(name, *overrides, *changes), better)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(PROJECT / "configs" / "dsv3_2b.toml")
    assert main(["plan", config, "--device-memory", "80"]) == 0
    assert "2.77B, of which a token uses 517M" in capsys.readouterr().out
    assert main(["plan", config, "--device-memory", "40"]) == 2
    assert "the nearest layout that fits: " in capsys.readouterr().err
    assert main(["plan", config, "--hardware", "nothing"]) == 2
    assert "there is no such file; shipped are h100, h200, h800" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "dsv3_671b"])
def test_tables_fit_a_terminal_of_80_columns(name: str) -> None:
    narrow, wide = (printed(name, width=width).split("\n") for width in (80, 200))
    assert max(map(len, narrow)) <= 80
    tables = [[line.rstrip() for line in text if line.startswith(" ") and "|" not in line] for text in (narrow, wide)]
    assert tables[0][:12] == tables[1][:12]
    assert {"parameters", "ranks", "peak"} <= {line.split()[0] for line in narrow if line.strip()}


def pipeline_rows(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.lstrip()[:1].isdigit() and "|" in line]


@pytest.mark.parametrize(
    ("schedule", "layers", "bubble", "alive"),
    [
        ("1f1b", 3, 27.3, 4),
        ("zb1p", 3, 11.1, 4),
        ("zbv", 7, 5.9, 8),
        ("dualpipe", 3, 7.7, 5),
        ("dualpipev", 7, 11.1, 9),
    ],
)
def test_a_pipeline_is_drawn(schedule: str, layers: int, bubble: float, alive: int) -> None:
    text = printed(
        "tiny",
        "parallel.pp=4",
        f"parallel.schedule={schedule}",
        f"model.num_hidden_layers={layers}",
        "train.micro_batch_size=1",
        ranks=4,
    )
    assert f"the bubble is {bubble} %" in " ".join(text.split())
    assert f"at most {alive} are alive on a rank" in " ".join(text.split())
    assert len(pipeline_rows(text)) == 4


def test_no_pipeline_no_drawing_but_two_stages_on_one_rank_are_drawn() -> None:
    assert pipeline_rows(printed("tiny")) == []
    assert len(pipeline_rows(printed("tiny", "parallel.schedule=dualpipev"))) == 1


def test_of_many_ranks_some_are_drawn() -> None:
    text = printed(
        "dsv3_671b", *ALONE, "parallel.pp=60", "train.micro_batch_size=64", "parallel.max_expert_rows=0", ranks=60
    )
    assert len(pipeline_rows(text)) == 32
    assert "28 ranks more" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1.00K"), (1000, "1.00K"), (9_996, "10.0K"), (99_960, "100K"),
     (516_589_056, "517M"), (36_625_603_584, "36.6B"), (671_026_404_352, "671B"), (14.8e12, "14.8T"), (3e15, "3000T")],
)  # fmt: skip
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text
