"""Timelines are pure functions of tokens: their pieces meet, stay between their ends, and give the report's numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PROJECT

from pretrain.config import load_config
from pretrain.planning.steps import stretches
from pretrain.timeline import Piece, Timeline, TimelineConfig, value_at

WARM_UP_END = 28_032_630_784
PIECES = (
    Piece(shape="linear", start=0.0, value=4.0, until=100),
    Piece(value=4.0, until=200),
    Piece(shape="cosine", value=1.0, until=300),
    Piece(value=0.5),
)


def report() -> Timeline:
    return load_config(PROJECT / "configs" / "dsv3_671b.toml").full_timeline


@pytest.mark.parametrize(
    ("tokens", "value"),
    [(0, 0.0), (25, 1.0), (100, 4.0), (199, 4.0), (200, 4.0), (250, 2.5), (300, 0.5), (10**15, 0.5)],
)
def test_pieces_follow_one_another(tokens: int, value: float) -> None:
    assert value_at(PIECES, tokens) == pytest.approx(value)


def test_a_cosine_leaves_and_arrives_flat() -> None:
    quarter = 1.0 + 3.0 * (1 + math.cos(math.pi / 4)) / 2
    assert value_at(PIECES, 225) == pytest.approx(quarter)
    assert 4.0 - value_at(PIECES, 201) < 0.001
    assert value_at(PIECES, 299) - 1.0 < 0.001


def test_a_number_holds_for_ever() -> None:
    assert value_at(0.25, 0) == value_at(0.25, 10**15) == 0.25


def test_after_a_last_piece_with_an_end_its_value_holds() -> None:
    assert value_at((Piece(shape="linear", start=0.0, value=2.0, until=10),), 11) == 2.0


ends = st.integers(1, 10**13)
values = st.floats(0, 1e6)
shapes = st.sampled_from(["constant", "linear", "cosine"])


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Piece, ...]:
    untils = sorted(draw(st.lists(ends, min_size=1, max_size=5, unique=True)))
    changing = [Piece(value=draw(values), until=until, shape=draw(shapes)) for until in untils]
    if changing[0].shape != "constant":
        changing[0] = replace(changing[0], start=changing[0].value)
    return (*changing, Piece(value=draw(values)))


@settings(deadline=None)
@given(pieces(), st.integers(0, 2 * 10**13))
def test_no_value_leaves_the_range_of_the_pieces(timeline: tuple[Piece, ...], tokens: int) -> None:
    TimelineConfig(learning_rate=timeline)
    ends = [piece.value for piece in timeline]
    slack = 1e-9 * max(ends)
    assert min(ends) - slack <= value_at(timeline, tokens) <= max(ends) + slack


@settings(deadline=None)
@given(pieces())
def test_linear_and_cosine_pieces_begin_where_the_one_before_ended(timeline: tuple[Piece, ...]) -> None:
    for before, piece in pairwise(timeline):
        assert before.until is not None
        expected = piece.value if piece.shape == "constant" else before.value
        assert value_at(timeline, before.until) == pytest.approx(expected)


@settings(deadline=None)
@given(pieces(), st.integers(0, 2 * 10**13))
def test_values_hold_still_or_move_one_way_between_boundaries(timeline: tuple[Piece, ...], tokens: int) -> None:
    schedule = Timeline(TimelineConfig(learning_rate=timeline), 1, 1)
    boundaries = schedule.boundaries()
    end = next((boundary for boundary in boundaries if boundary > tokens), tokens + 100)
    first, middle, last = (value_at(timeline, point) for point in (tokens, (tokens + end - 1) // 2, end - 1))
    slack = 1e-9 * max(piece.value for piece in timeline)
    assert min(first, last) - slack <= middle <= max(first, last) + slack


def test_boundaries_are_the_first_tokens_of_new_pieces() -> None:
    config = TimelineConfig(
        learning_rate=(Piece(value=1.0, until=10.5), Piece(value=2.0)),
        mtp_weight=(Piece(value=1.0, until=7), Piece(value=2.0)),
        batch_size=(Piece(value=1.0, until=10), Piece(value=2.0)),
    )
    timeline = Timeline(config, None, 8)
    assert timeline.boundaries() == [7, 10, 11]
    assert timeline.at(10).learning_rate == 1.0
    assert timeline.at(11).learning_rate == 2.0


def test_a_ramp_of_the_batch_is_rounded_to_its_multiple() -> None:
    ramp = (Piece(shape="linear", start=8, value=64, until=1000), Piece(value=64))
    timeline = Timeline(TimelineConfig(learning_rate=1.0, batch_size=ramp, batch_size_multiple=8), None, 16)
    sizes = [timeline.at(tokens).batch_size for tokens in range(0, 1200, 10)]
    assert sizes == sorted(sizes)
    assert set(sizes) == set(range(8, 65, 8))


def test_a_batch_is_never_empty() -> None:
    ramp = (Piece(shape="linear", start=1, value=64, until=1000), Piece(value=64))
    timeline = Timeline(TimelineConfig(learning_rate=1.0, batch_size=ramp, batch_size_multiple=8), None, 16)
    assert timeline.at(0).batch_size == 8


def test_sizes_of_train_hold_where_the_timeline_gives_none() -> None:
    values = Timeline(TimelineConfig(learning_rate=1.0, batch_size_multiple=8), 3, 16).at(0)
    assert (values.batch_size, values.seq_len) == (3, 16)


def test_a_sequence_length_may_grow() -> None:
    config = TimelineConfig(learning_rate=1.0, seq_len=(Piece(value=16, until=100), Piece(value=64)))
    timeline = Timeline(config, 1, 16)
    assert [timeline.at(tokens).seq_len for tokens in (0, 99, 100)] == [16, 16, 64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": ()}, r"learning_rate = \[\] must hold at least one piece, such as \{ value = 1e-4 \}"),
        ({"learning_rate": (Piece(value=1.0), Piece(value=2.0))}, r"learning_rate, piece 1: `until` is missing"),
        ({"learning_rate": (Piece(value=1.0, shape="linear"),)}, r"learning_rate, piece 1: `until` is missing"),
        ({"mtp_weight": (Piece(value=1.0, until=0),)}, r"mtp_weight, piece 1: until = 0 must be above 0 tokens"),
        ({"mtp_weight": (Piece(value=1.0, until=5, start=2.0),)}, r'start = 2\.0 needs shape = "linear" or "cosine"'),
        ({"mtp_weight": math.nan}, r"mtp_weight = nan must be a finite number, not below 0"),
        ({"bias_update_speed": -1.0}, r"bias_update_speed = -1\.0 must be a finite number, not below 0"),
        ({"seq_len": math.inf}, r"seq_len = inf must be a whole number, at least 1"),
        ({"batch_size_multiple": 0}, r"batch_size_multiple = 0 must be at least 1"),
        ({"seq_len": (Piece(start=1, value=2.0, until=5, shape="linear"),)}, r"seq_len must be made of constant"),
    ],
)  # fmt: skip
def test_timelines_that_make_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimelineConfig(**{"learning_rate": 1.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "learning_rate", "bias_update_speed", "mtp_weight"),
    [
        (0, 0.0, 0.001, 0.3),
        (WARM_UP_END // 2, 1.1e-4, 0.001, 0.3),
        (WARM_UP_END, 2.2e-4, 0.001, 0.3),
        (10**13 - 1, 2.2e-4, 0.001, 0.3),
        (10**13, 2.2e-4, 0.001, 0.1),
        (12_150 * 10**9, (2.2e-4 + 2.2e-5) / 2, 0.001, 0.1),
        (14_300 * 10**9 - 1, 2.2e-5, 0.001, 0.1),
        (14_300 * 10**9, 2.2e-5, 0.0, 0.1),
        (14_632 * 10**9, 2.2e-5, 0.0, 0.1),
        (14_700 * 10**9, 7.3e-6, 0.0, 0.1),
    ],
)
def test_the_report_s_schedule(tokens: int, learning_rate: float, bias_update_speed: float, mtp_weight: float) -> None:
    values = report().at(tokens)
    assert values.learning_rate == pytest.approx(learning_rate, rel=1e-9)
    assert (values.bias_update_speed, values.mtp_weight) == (bias_update_speed, mtp_weight)


def test_the_report_s_cosine_is_that_of_its_formula() -> None:
    progress = (12 - 10) / 4.3
    expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * progress)) / 2
    assert report().at(12 * 10**12).learning_rate == pytest.approx(expected, rel=1e-9)


def test_the_report_s_last_stretches_are_333_and_167_billion_tokens() -> None:
    assert report().boundaries()[-2:] == [14_300 * 10**9, 14_633 * 10**9]
    assert 14_633 * 10**9 - 14_300 * 10**9 == 333 * 10**9
    assert 14_800 * 10**9 - 14_633 * 10**9 == 167 * 10**9


@pytest.mark.parametrize(
    ("tokens", "batch_size"),
    [(0, 3072), (234_500_000_000, 9216), (469_000_000_000, 15360), (14_799_000_000_000, 15360)],
)
def test_the_report_s_batch(tokens: int, batch_size: int) -> None:
    values = report().at(tokens)
    assert (values.batch_size, values.seq_len) == (batch_size, 4096)


def test_the_report_s_warm_up_takes_2000_steps() -> None:
    timeline, tokens = report(), 0
    for _ in range(2000):
        values = timeline.at(tokens)
        tokens += values.batch_size * values.seq_len
    assert tokens == WARM_UP_END
    assert timeline.at(tokens).learning_rate == 2.2e-4
    assert values.learning_rate < 2.2e-4


@pytest.mark.parametrize("name", ["small", "dsv3_2b", "dsv3_16b"])
def test_the_smaller_models_warm_up_takes_2000_steps_too(name: str) -> None:
    config = load_config(PROJECT / "configs" / f"{name}.toml")
    first = next(stretches(config.full_timeline, config.train))
    assert first.tokens_per_step * 2000 == config.full_timeline.boundaries()[0]


@pytest.mark.parametrize("batch_size", [6, (Piece(value=4, until=10), Piece(value=6))])
def test_batches_that_would_be_rounded_are_refused(batch_size: object) -> None:
    with pytest.raises(ValueError, match=r"batch_size = 6 must be a multiple of batch_size_multiple = 4"):
        TimelineConfig(learning_rate=1e-3, batch_size=batch_size, batch_size_multiple=4)
