from dataclasses import replace
from itertools import pairwise
from typing import get_args
from xml.etree import ElementTree

import pytest

from parallel.schedule import ScheduleName, make_schedule
from parallel.simulate import Costs, Timeline, simulate
from parallel.timeline_drawing import ascii_timeline, svg_timeline

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: ScheduleName, num_ranks: int, num_micro_batches: int, costs: Costs | None = None) -> Timeline:
    schedule = make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    return simulate(schedule, costs or Costs(1, 2, 1))


def test_text_of_1f1b() -> None:
    lines = ascii_timeline(timeline("1f1b", 2, 2), width=40).splitlines()
    rows = [line for line in lines if "|" in line]
    assert rows == [
        "0 |F0--F1--........B0------....B1------",
        "1 |....F0--B0------F1--B1------........",
    ]
    assert " ".join(lines[:3]).startswith("1f1b: 2 stages on 2 ranks, 2 micro-batches; time 9, bubble 3 (33.3%)")


def test_text_of_overlapped_steps_and_second_stages() -> None:
    lines = ascii_timeline(timeline("dualpipev", 1, 2), width=60).splitlines()
    assert [line for line in lines if "|" in line] == [
        "0 |F0--f0--1&0---------1&0---------b1------I1--W1--",
    ]


@pytest.mark.parametrize("width", [20, 33, 80, 200])
@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_text_fits_the_width(name: ScheduleName, width: int) -> None:
    for costs in (Costs(1, 2, 1), Costs(0.0013, 0.0029, 0.0011, 0.0035, send=0.0002)):
        lines = ascii_timeline(timeline(name, 12, 30, costs), width=width).splitlines()
        assert max(map(len, lines)) <= width
        rows = [line for line in lines if "|" in line]
        assert len(rows) == 12
        assert len({len(row) for row in rows}) == 1


def test_a_width_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="width = 3 leaves no room beside the labels of 12 ranks; use 40 or more"):
        ascii_timeline(timeline("1f1b", 12, 2), width=3)


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_svg_has_every_step_with_its_times(name: ScheduleName) -> None:
    shown = timeline(name, 4, 10)
    root = ElementTree.fromstring(svg_timeline(shown))
    titles = [title.text for title in root.iterfind(f"{SVG}g/{SVG}title")]
    assert len(titles) == sum(map(len, shown.spans))
    assert "forward of micro-batch 0 in stage 0, 0 to 1" in titles
    assert not [element for element in root.iter() if element.tag.endswith(("script", "image", "use"))]


def test_svg_escapes_texts() -> None:
    shown = timeline("1f1b", 2, 2)
    odd = replace(shown, schedule=replace(shown.schedule, name="<script>&"))  # type: ignore[arg-type]
    svg = svg_timeline(odd)
    assert "<script" not in svg
    assert "&lt;script&gt;&amp;" in svg
    ElementTree.fromstring(svg)


def test_svg_steps_lie_in_the_row_of_their_rank_and_do_not_overlap() -> None:
    root = ElementTree.fromstring(svg_timeline(timeline("dualpipe", 4, 8)))
    rows: dict[float, list[tuple[float, float]]] = {}
    for rect in root.iterfind(f"{SVG}g/{SVG}rect"):
        x, width = float(rect.attrib["x"]), float(rect.attrib["width"])
        rows.setdefault(float(rect.attrib["y"]), []).append((x, x + width))
    assert len(rows) == 4
    for spans in rows.values():
        assert all(one[1] <= two[0] + 0.02 for one, two in pairwise(spans))
