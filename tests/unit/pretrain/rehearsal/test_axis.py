from dataclasses import replace

import pytest
from support import PROJECT

from pretrain.config import Config, load_config
from pretrain.rehearsal.axis import Axis, boundaries, end_of, make_axis, zones
from pretrain.timeline import Piece, TimelineConfig


@pytest.fixture
def report() -> Config:
    return load_config(PROJECT / "configs" / "dsv3_671b.toml")


def with_rate(config: Config, *pieces: Piece, tokens: int) -> Config:
    timeline = TimelineConfig(learning_rate=pieces)
    train = replace(config.train, tokens=tokens, batch_size=8)
    return replace(config, timeline=timeline, train=train)


def test_the_boundaries_of_the_report(report: Config) -> None:
    assert boundaries(report) == (28_032_630_784, 469e9, 10e12, 14.3e12, 14.633e12, 14.8e12)
    assert [list(zone) for zone in zones(report, boundaries(report))] == [[0, 1], [2], [3], [4], [5]]


def test_a_run_without_boundaries_stops_in_its_middle() -> None:
    config = load_config(PROJECT / "configs" / "tiny.toml", ["timeline.learning_rate=1e-3"])
    assert end_of(config) == 500 * 8 * 256
    assert boundaries(config) == (end_of(config) / 2, end_of(config))


def test_what_comes_after_the_end_is_no_boundary(report: Config) -> None:
    config = with_rate(report, Piece(value=1.0, until=10), Piece(value=2.0, until=90), Piece(value=3.0), tokens=50)
    assert boundaries(config) == (10, 50)


def test_stretches_inside_of_a_decay_have_one_scale(report: Config) -> None:
    config = with_rate(report, Piece(value=1.0, until=100), Piece(value=0.1, until=500, shape="cosine"), tokens=600)
    timeline = replace(config.timeline, mtp_weight=(Piece(value=0.3, until=120), Piece(value=0.1)))
    config = replace(config, timeline=timeline)
    ends = boundaries(config)
    assert ends == (100, 120, 500, 600)
    assert [list(zone) for zone in zones(config, ends)] == [[0], [1, 2], [3]]
    axis = make_axis(config, ends, [64] * 4)
    assert axis.rehearsed == (0, 64, 128, 64 + 64 * 20, 64 + 64 * 20 + 64)


def test_a_decay_that_the_run_does_not_end_is_one_zone(report: Config) -> None:
    config = with_rate(report, Piece(value=1.0, until=10), Piece(value=0.1, until=500, shape="cosine"), tokens=60)
    assert [list(zone) for zone in zones(config, boundaries(config))] == [[0], [1]]


def test_to_the_run_and_back() -> None:
    axis = Axis((0.0, 28e9, 14e12), (0.0, 300.5, 1000.0))
    assert [axis.to_original(tokens) for tokens in (0, 300.5, 1000)] == [0, 28e9, 14e12]
    assert [axis.to_rehearsed(tokens) for tokens in (0, 28e9, 14e12)] == [0, 300.5, 1000]
    for tokens in (1, 299, 301, 999, 1200):
        assert axis.to_rehearsed(axis.to_original(tokens)) == pytest.approx(tokens, rel=1e-12)
    assert axis.to_original(300) < 28e9 < axis.to_original(301)
