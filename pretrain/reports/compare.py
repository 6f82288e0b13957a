"""What a comparison of two runs shows: a table, a page with pictures, and the numbers as JSON."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.shards import write_atomically
from pretrain.errors import UserError
from pretrain.loss_gap import (
    CONFIDENCE,
    MIN_STEPS,
    Estimate,
    Verdict,
    estimate_along,
    estimate_end,
    judge,
    last_steps,
    noise_floor,
    relative_gaps,
)
from pretrain.reports.config_values import differing, show_value
from pretrain.reports.page import Card, Facts, image_file, page
from pretrain.reports.pictures import picture
from pretrain.reports.plots import MAX_POINTS, Line, Panel, draw_panels
from pretrain.reports.run_record import RunRecord, read_record
from pretrain.reports.series import Column

PAGE, PICTURE, NUMBERS = "compare.html", "compare.svg", "compare.json"
_KIND = "Comparison of two runs"
_MAX_SEEDS_DRAWN = 3
# How far the axis of the gap reaches, in largest values.
_ROOM = 1.5


@dataclass(frozen=True)
class RunPair:
    """Where two runs lie that are to be compared, and what they are called. `seeds` are runs like A, but with other
    initial weights. Steps after number `last_step` do not count, if it is given; `limit` is a fraction."""

    name_a: str
    name_b: str
    folder_a: Path
    folder_b: Path
    seeds: Sequence[Path]
    last_step: int | None
    limit: float


@dataclass(frozen=True)
class Series:
    """Two runs over the steps that both have [T]: tokens seen after each, both losses of the next token."""

    steps: Column
    tokens: Column
    loss_a: Column
    loss_b: Column

    @property
    def gaps(self) -> Column:
        """The relative gap of each step [T]."""
        return relative_gaps(self.loss_a, self.loss_b)

    @property
    def end(self) -> Estimate:
        """The gap of the two runs."""
        return estimate_end(self.gaps)


@dataclass(frozen=True)
class LossGap:
    """All that is known of a pair: both records, A beside B, and A beside each run with other initial weights."""

    pair: RunPair
    record_a: RunRecord
    record_b: RunRecord
    series: Series
    seeds: Sequence[Series]

    @property
    def verdict(self) -> Verdict:
        """Whether the gap is within the limit."""
        return judge(self.series.end, self.pair.limit)

    @property
    def floor(self) -> float:
        """How far chance alone sets two such runs apart, NaN without other seeds."""
        return noise_floor([other.end.mean for other in self.seeds])

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """The keys in which the configurations differ, with both values, None for one that is not there."""
        found = differing(self.record_a.config, self.record_b.config)
        return {key: (a, b) for key, (a, b) in found.items()}

    @property
    def held_out(self) -> float | None:
        """The relative gap of the last held-out loss that both runs took at the same step."""
        a, b = (_held_out(record, self.pair.last_step) for record in (self.record_a, self.record_b))
        common = sorted(a.keys() & b.keys())
        return b[common[-1]] / a[common[-1]] - 1 if common else None


def measure(pair: RunPair) -> LossGap:
    """Reads the runs and lays them side by side. Raises UserError if one is missing, short, or saw other samples."""
    record_a, record_b = read_record(pair.folder_a), read_record(pair.folder_b)
    series = _align(record_a, record_b, pair.folder_b, pair)
    seeds = [_align(record_a, read_record(folder), folder, pair) for folder in pair.seeds]
    return LossGap(pair, record_a, record_b, series, seeds)


def write_comparison(gap: LossGap, out: Path) -> None:
    """Writes compare.html, compare.svg and compare.json to `out`, and prints the table."""
    panels = [_gap_panel(gap), _loss_panel(gap, 0)]
    drawing = draw_panels(gap.series.tokens, panels)
    config_text = f"# A\n{gap.record_a.config_text}\n# B\n{gap.record_b.config_text}"
    content = page(
        title=f"{gap.pair.name_a} against {gap.pair.name_b}",
        subtitle=f"{_which_steps(gap)}; A is {gap.pair.folder_a}, B is {gap.pair.folder_b}",
        tiles=_tiles(gap),
        cards=list(_cards(gap)),
        config_text=config_text,
        kind=_KIND,
    )
    for name, text in ((PAGE, content), (PICTURE, image_file(drawing)), (NUMBERS, _to_json(gap))):
        write_atomically(out / name, text.encode("utf-8", errors="replace"))
    _print_table(gap)
    print(_conclude(gap))
    print(out / PAGE)


def _align(a: RunRecord, b: RunRecord, folder_b: Path, pair: RunPair) -> Series:
    steps, in_a, in_b = np.intersect1d(a.columns["step"], b.columns["step"], return_indices=True)
    if pair.last_step is not None:
        count = int(np.searchsorted(steps, pair.last_step, side="right"))
        steps, in_a, in_b = steps[:count], in_a[:count], in_b[:count]
    if len(steps) < MIN_STEPS:
        raise UserError(
            f"{pair.folder_a} and {folder_b} have {len(steps)} steps in common; a gap and its noise need at least "
            f"{MIN_STEPS}: train longer, with --steps"
        )
    for key in ("tokens", "batch_size"):
        other = np.flatnonzero(a.columns[key][in_a] != b.columns[key][in_b])
        if len(other):
            row = int(other[0])
            raise UserError(
                f"step {steps[row]:.0f} has {key} = {a.columns[key][in_a[row]]:.0f} in {pair.folder_a}, but "
                f"{b.columns[key][in_b[row]]:.0f} in {folder_b}: the runs did not see the same samples; train them "
                "again with one timeline, into another --out"
            )
    return Series(steps, a.columns["tokens"][in_a], a.columns["lm_loss"][in_a], b.columns["lm_loss"][in_b])


def _held_out(record: RunRecord, last_step: int | None) -> dict[float, float]:
    pairs = zip(record.columns["step"].tolist(), record.columns["val_loss"].tolist(), strict=True)
    return {step: loss for step, loss in pairs if math.isfinite(loss) and step <= (last_step or math.inf)}


def _cards(gap: LossGap) -> Iterator[Card]:
    series = gap.series
    yield Card("Relative gap of the loss", picture(series.tokens, [_gap_panel(gap)]), _gap_facts(gap))
    begin = len(series.steps) - last_steps(len(series.steps))
    facts = [(f"{name}, {part}", f"{loss:.4f}") for name, part, loss in _losses(gap)]
    late = picture(series.tokens[begin:], [_loss_panel(gap, begin)])
    yield Card("Loss", picture(series.tokens, [_loss_panel(gap, 0)]), facts)
    yield Card("Loss over the last fifth", late, ())
    if gap.seeds:
        shown = [
            Line(f"seed {number}", _percent(_along(other)[0]), band=_band(*_along(other)))
            for number, other in enumerate(gap.seeds[:_MAX_SEEDS_DRAWN], 1)
        ]
        panel = Panel("gap to A in %, over the last fifth so far", shown, y_range=_y_range(gap))
        facts = [(f"seed {number}", _interval(other.end)) for number, other in enumerate(gap.seeds, 1)]
        facts += [("two such runs differ by (standard deviation)", f"{100 * gap.floor:.3f} %")]
        note = "Runs like A on the same samples, but with other initial weights: what chance alone does."
        yield Card("A with other seeds", picture(series.tokens, [panel]), facts, note=note)
    yield Card("What differs", "", _told_differences(gap) or [("all keys", "the same")])


def _gap_panel(gap: LossGap) -> Panel:
    series = gap.series
    along = _along(series)
    lines = [
        Line("each step", _percent(series.gaps), faint=True),
        Line("last fifth so far, 95 %", _percent(along[0]), band=_band(*along)),
    ]
    limit = (100 * gap.pair.limit, f"limit, {100 * gap.pair.limit:g} %")
    return Panel("gap (B − A) / A in %", lines, limit=limit, mirrored=True, y_range=_y_range(gap), legend_below=True)


def _loss_panel(gap: LossGap, begin: int) -> Panel:
    series = gap.series
    return Panel("nats a token", [Line("A", series.loss_a[begin:]), Line("B", series.loss_b[begin:])])


def _along(series: Series) -> tuple[Column, Column]:
    """The estimate as it would have been at each point that is drawn, and its noise."""
    return estimate_along(series.gaps, -(-len(series.steps) // MAX_POINTS))


def _band(mean: Column, noise: Column) -> tuple[Column, Column]:
    return _percent(mean - noise), _percent(mean + noise)


def _y_range(gap: LossGap) -> tuple[float, float]:
    """Room for the limit, and for the interval after the first fifth; single steps may lie outside."""
    mean, noise = (column[len(column) // 5 :] for column in _along(gap.series))
    bounds = [gap.pair.limit, *(np.abs(mean) + noise), *(other.end.bound for other in gap.seeds)]
    top = 100 * _ROOM * float(np.nanmax(bounds))
    return -top, top


def _tiles(gap: LossGap) -> Facts:
    end = gap.series.end
    tiles = [
        ("gap", f"{100 * end.mean:+.3f} %"),
        (f"noise, {100 * CONFIDENCE:.0f} %", f"± {100 * end.noise:.3f} %"),
        ("limit", f"{100 * gap.pair.limit:g} %"),
        ("verdict", gap.verdict.value),
    ]
    return tiles + ([("noise floor of seeds", f"{100 * gap.floor:.3f} %")] if gap.seeds else [])


def _gap_facts(gap: LossGap) -> Facts:
    gaps = gap.series.gaps
    known = gaps[np.isfinite(gaps)]
    facts = [("gap over the last fifth", _interval(gap.series.end)), ("may be as large as", _bound(gap))]
    if len(known):
        facts += [
            ("single steps, standard deviation", f"{100 * known.std():.3f} %"),
            ("single steps, largest", f"{100 * known[np.abs(known).argmax()]:+.3f} %"),
        ]
    if gap.held_out is not None:
        facts.append(("held out, last", f"{100 * gap.held_out:+.3f} %"))
    skipped = [record.columns["skipped"][-1] for record in (gap.record_a, gap.record_b)]
    if np.nan_to_num(skipped).any():
        facts.append(("steps skipped, A and B", " and ".join(f"{count:.0f}" for count in skipped)))
    return facts


def _losses(gap: LossGap) -> Iterator[tuple[str, str, float]]:
    count = last_steps(len(gap.series.steps))
    for name, loss in (("A", gap.series.loss_a), ("B", gap.series.loss_b)):
        yield name, "last fifth", float(loss[-count:].mean())
        yield name, "last step", float(loss[-1])


def _told_differences(gap: LossGap) -> Facts:
    return [(key, f"{show_value(a)} → {show_value(b)}") for key, (a, b) in gap.differences.items()]


def _which_steps(gap: LossGap) -> str:
    steps = gap.series.steps
    first = steps[-last_steps(len(steps))]
    return f"mean of steps {first:,.0f} to {steps[-1]:,.0f}"


def _print_table(gap: LossGap) -> None:
    table = Table(title=f"A: {gap.pair.name_a}, B: {gap.pair.name_b}; {_which_steps(gap)}", title_justify="left")
    for heading in ("loss of the next token", "value", "noise, 95 %"):
        table.add_column(heading, justify="left" if heading.startswith("loss") else "right")
    for name, part, loss in _losses(gap):
        if part != "last step":
            table.add_row(f"{name}, nats a token", f"{loss:.4f}", "")
    end = gap.series.end
    table.add_row("gap (B − A) / A", f"{100 * end.mean:+.3f} %", f"± {100 * end.noise:.3f} %")
    if gap.held_out is not None:
        table.add_row("gap of the last held-out loss", f"{100 * gap.held_out:+.3f} %", "")
    for number, other in enumerate(gap.seeds, 1):
        table.add_row(
            f"A with seed {number}, to A", f"{100 * other.end.mean:+.3f} %", f"± {100 * other.end.noise:.3f} %"
        )
    if gap.seeds:
        table.add_row("two runs like A differ by (deviation)", f"{100 * gap.floor:.3f} %", "")
    table.add_row("limit", f"{100 * gap.pair.limit:g} %", "")
    Console().print(table)
    for key, values in _told_differences(gap):
        print(f"differs: {key}: {values}")


def _conclude(gap: LossGap) -> str:
    """The verdict in a sentence, with what to do about it."""
    bound, limit = _bound(gap), f"{100 * gap.pair.limit:g} %"
    sentences = {
        Verdict.WITHIN: f"Within the limit: the gap is at most {bound}, below {limit}.",
        Verdict.BEYOND: f"Beyond the limit: the gap is {_interval(gap.series.end)}, the limit {limit}.",
        Verdict.UNDECIDED: f"Too noisy to tell: the gap may be {bound}, the limit is {limit}; compare more steps.",
        Verdict.NOT_FINITE: "Beyond the limit: a loss of the last fifth is not finite.",
    }
    return sentences[gap.verdict]


def _interval(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:+.3f} ± {100 * estimate.noise:.3f} %"


def _bound(gap: LossGap) -> str:
    return f"{100 * gap.series.end.bound:.3f} %"


def _percent(values: Column) -> Column:
    return 100 * values


def _to_json(gap: LossGap) -> str:
    """Numbers that are not finite become null."""
    end, steps = gap.series.end, gap.series.steps
    numbers = {
        "a": {"name": gap.pair.name_a, "folder": str(gap.pair.folder_a)},
        "b": {"name": gap.pair.name_b, "folder": str(gap.pair.folder_b)},
        "differences": {key: {"a": a, "b": b} for key, (a, b) in gap.differences.items()},
        "steps": len(steps),
        "last_step": int(steps[-1]),
        "tokens": int(gap.series.tokens[-1]),
        "steps_averaged": last_steps(len(steps)),
        "loss_a": _finite(float(gap.series.loss_a[-last_steps(len(steps)) :].mean())),
        "loss_b": _finite(float(gap.series.loss_b[-last_steps(len(steps)) :].mean())),
        "gap": _finite(end.mean),
        "noise": _finite(end.noise),
        "confidence": CONFIDENCE,
        "limit": gap.pair.limit,
        "verdict": gap.verdict.name.lower(),
        "held_out_gap": gap.held_out,
        "seed_gaps": [_finite(other.end.mean) for other in gap.seeds],
        "noise_floor": _finite(gap.floor),
    }
    return json.dumps(numbers, indent=2) + "\n"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
