"""What the cards of the page are made of: bitmaps, the measured pipeline beside the simulated, marks, tables."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from run_records import Faults, Recipe, write_synthetic_run

from pretrain.reports import expert_cards, health_cards, loss_cards, pipeline_cards, speed_cards
from pretrain.reports.heat_maps import MAX_MOMENTS, gathered, png_address
from pretrain.reports.pictures import picture, show
from pretrain.reports.pipeline_cards import read_measured
from pretrain.reports.pipeline_drawing import Box, Pipeline, draw
from pretrain.reports.plots import Line, Panel
from pretrain.reports.run_record import RunRecord, read_record


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    faults = Faults(skipped=(7,), resumed=(40,), spikes={200: 2.0})
    return read_record(write_synthetic_run(tmp_path_factory.mktemp("runs") / "run", faults=faults))


def pixels(address: str) -> np.ndarray:
    return imread(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_shades_rise_with_values_and_what_is_unknown_is_clear() -> None:
    values = np.array([[0.0, 1.0, 2.0, 9.0, np.nan, -1.0]])
    (row,) = pixels(png_address(values, 0.0, 2.0))
    lightness = row[:, :3].sum(-1)
    assert lightness[0] < lightness[1] < lightness[2] == lightness[3]
    assert lightness[5] == lightness[0]
    assert row[:, 3].tolist() == [1, 1, 1, 1, 0, 1]
    assert pixels(png_address(np.full((3, 2), 5.0), 5.0, 5.0)).shape[:2] == (3, 2)


def test_a_map_has_no_more_columns_than_moments_fit() -> None:
    assert len(gathered(np.ones((MAX_MOMENTS, 3)), np.add)) == MAX_MOMENTS
    joined = gathered(np.ones((3 * MAX_MOMENTS + 1, 2)), np.add)
    assert (len(joined), joined[0, 0], joined[-1, 0]) == (121, 4.0, 1.0)


def test_timeline_boundaries_are_marked(record: RunRecord) -> None:
    marks = loss_cards.boundaries(record)
    assert [(mark.tokens, mark.label) for mark in marks] == [(100_000, "learning rate"), (1_024_000, "learning rate")]
    card = loss_cards.loss(record)
    assert card.picture.count(">learning rate</text>") == 2
    assert "where a piece of the timeline ends" in card.note


def test_marks_close_together_share_a_label(tmp_path: Path) -> None:
    gamma = "timeline.bias_update_speed=[{ value = 1e-3, until = 1_030_000 }, { value = 0.0 }]"
    record = read_record(write_synthetic_run(tmp_path / "run", Recipe(overrides=(gamma, "parallel.ep=2"))))
    assert [mark.label for mark in loss_cards.boundaries(record)] == ["learning rate", "learning rate, γ"]


def test_a_table_holds_the_values_of_a_plot() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.5])
    text = picture(np.array([0.0, 1e6, 2e6, 3e6]), [Panel("things", [Line("a", values), Line("b", 2 * values)])])
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text)
    assert cells[:3] == ["tokens", "a (things)", "b (things)"]
    assert cells[-9:] == ["1.00M", "2", "4", "2.00M", "–", "–", "3.00M", "4.5", "9"]
    assert picture(np.array([0.0]), [Panel("nothing", [Line("a", np.array([np.nan]))])]) == ""


def test_a_long_plot_has_a_short_table() -> None:
    text = picture(np.arange(10_000.0), [Panel("things", [Line("a", np.arange(10_000.0))])])
    assert text.count("<tr>") == 25
    assert "each row is the mean" in text


@pytest.mark.parametrize(("value", "text"), [(3.0, "3"), (1234567.0, "1,234,567"), (0.00012346, "0.0001235")])
def test_numbers_of_tables(value: float, text: str) -> None:
    assert show(value) == text
    assert show(float("nan")) == "–"


def test_every_card_of_a_full_record_has_a_picture(record: RunRecord) -> None:
    for make in (speed_cards.phases, speed_cards.ranks, speed_cards.memory, expert_cards.received, expert_cards.layers):
        assert make(record).picture, make
    for make in (expert_cards.loads, health_cards.parts, health_cards.fp8, health_cards.events):
        assert make(record).picture, make
    events = health_cards.events(record)
    assert ("resume", "1") in events.facts
    assert "resumed after step 40" in events.picture
    assert dict(speed_cards.phases(record).facts).keys() >= {"forward", "all-to-all, waited for"}


def test_measured_beside_simulated(record: RunRecord) -> None:
    measured = read_measured(record.pipeline)
    assert measured is not None
    # Sends take time in what was measured; the simulation has the same steps without.
    facts = dict(pipeline_cards.pipeline(record).facts)
    assert float(facts["bubble, measured"].rstrip(" %")) > float(facts["bubble, simulated"].rstrip(" %")) > 0
    assert facts["micro-batches"] == "8"
    assert {box.kind for row in measured.rows for box in row} == set("FBIW&")
    assert measured.rows[0][0] == Box("F", 0.0, 0.01, "0")
    drawing = pipeline_cards.pipeline(record).picture
    assert "measured: 0.499 s" in drawing
    assert "simulated: 0.4" in drawing


def test_idle_time_of_rows() -> None:
    rows = ((Box("F", 0, 1), Box("B", 1, 3)), (Box("F", 1, 2), Box("B", 1, 2), Box("W", 3, 4)))
    pipeline = Pipeline("p", rows)
    assert [pipeline.idle(rank) for rank in (0, 1)] == [1, 2]
    assert pipeline.bubble == 0.5
    assert Pipeline("none", ((),)).bubble == 0
    assert "<svg" in draw([pipeline, Pipeline("<none>", ((),))], "s")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"spans": 3},
        {"spans": []},
        {"spans": [[]]},
        {"spans": [3]},
        {"spans": [[["F", 0, 0, 1]]]},
        {"spans": [[["F", 0, 0, 2, 1]]]},
        {"spans": [[["F", 0, None, 0, 1]]]},
        {"spans": [[["F", 0, 0, -1, 1]]]},
        {"spans": [[["F", 0, 0, 0, "x"]]]},
        {"spans": [[["F", 0, 0, 0, 0]]]},
        {"spans": [[["F", 0, 0, 0, 1]]] * 65},
    ],
)
def test_what_is_no_pipeline(table: dict[str, Any]) -> None:
    assert read_measured(table) is None


def test_a_pipeline_nobody_knows_is_drawn_as_it_was(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    spans = [[["<b>", 0, 0, 0.0, 1.0], ["F", 0, 1e300, 1, 2]], [["F", 1, 0, 1.0, 2.0]]]
    for schedule, number in (("none", 2), ("1f1b", 10**12), ("1f1b", 0), (None, None), ("dualpipe", 3)):
        table = {"spans": spans, "schedule": schedule, "num_micro_batches": number, "step": "x"}
        (folder / "pipeline.json").write_text(json.dumps(table))
        card = pipeline_cards.pipeline(read_record(folder))
        assert "measured: 2 s" in card.picture
        assert "simulated:" not in card.picture
