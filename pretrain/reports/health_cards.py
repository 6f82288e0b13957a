"""What the parts of the model do, what FP8 costs, and what happened to the run."""

from datetime import UTC, datetime

import numpy as np

from pretrain.reports.facts import known, of
from pretrain.reports.findings import skipped_steps
from pretrain.reports.page import Card, table
from pretrain.reports.pictures import picture, show
from pretrain.reports.plots import Line, Panel
from pretrain.reports.run_record import Event, RunRecord

_MAX_EVENTS = 200
# Saves go well by the thousand; of these only the newest are listed.
_MAX_SAVES = 20
_MARKED = ("start", "resume", "stop", "finish", "skip", "spike", "rollback", "save_failed", "unequal")
_PART_METRICS = {
    "grad_norm": "norm of the gradient",
    "update_ratio": "norm of the update / norm of the weights",
    "grad_amax": "largest gradient",
    "weight_amax": "largest weight",
}


def parts(record: RunRecord) -> Card:
    """Gradient, update and magnitude of each part of the model."""
    series = record.parts
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in series.columns))
    panels = [
        Panel(
            title,
            [Line(name.replace("_", " "), _positive(series.of(f"{name}/{metric}"))) for name in names],
            log=True,
        )
        for metric, title in _PART_METRICS.items()
    ]
    return Card("Parts of the model", picture(series.tokens, panels), ())


def _positive(values: np.ndarray) -> np.ndarray:
    """NaN where an axis of logarithms has no place."""
    return np.where(values > 0, values, np.nan)


def fp8(record: RunRecord) -> Card:
    """What rounding to FP8 does to each kind of tensor."""
    series = record.fp8
    kinds = list(dict.fromkeys(key.rpartition("_")[2] for key in series.columns))

    def panel(what: str, title: str, factor: float, log: bool) -> Panel:
        columns = [factor * series.of(f"fp8_{what}_{kind}") for kind in kinds]
        lines = [Line(kind, _positive(values) if log else values) for kind, values in zip(kinds, columns, strict=True)]
        return Panel(title, lines, log=log, from_zero=not log)

    panels = [
        panel("underflow", "rounded to 0, % of the values that are not", 100, False),
        panel("overflow", "cut off, % of the values", 100, False),
        panel("amax", "largest magnitude", 1, True),
    ]
    facts = known(
        *(
            (
                f"{kind}, rounded to 0, median",
                of(100 * series.of(f"fp8_underflow_{kind}"), np.median, "{:.3g} %".format),
            )
            for kind in kinds
        )
    )
    return Card("FP8", picture(series.tokens, panels), facts)


def events(record: RunRecord) -> Card:
    """When steps were left out, saves failed and processes started again."""
    tokens, columns = record.columns["tokens"], record.columns
    skips = np.full(len(tokens), np.nan)
    skips[np.isin(columns["step"], skipped_steps(record))] = 1.0
    if not record.events and not np.isfinite(skips).any():
        return Card("", "", ())
    happened = {
        kind: np.array([record.tokens_at(event.step) for event in record.events if event.kind == kind])
        for kind in _MARKED
        if any(event.kind == kind for event in record.events) or (kind == "skip" and np.isfinite(skips).any())
    }
    lines = []
    for place, (kind, when) in enumerate(happened.items()):
        rows = np.searchsorted(tokens, when[np.isfinite(when)]).clip(0, len(tokens) - 1)
        values = np.full(len(tokens), np.nan)
        values[rows] = place
        if kind == "skip":
            values[np.isfinite(skips)] = place
        lines.append(Line(kind.replace("_", " "), values, points=True))
    panel = Panel("events", lines, rows=tuple(line.label for line in lines))
    kinds = list(dict.fromkeys(event.kind for event in record.events))
    facts = known(
        ("steps left out", f"{len(skipped_steps(record)):,}"),
        *((kind.replace("_", " "), f"{sum(event.kind == kind for event in record.events):,}") for kind in kinds),
    )
    shown = picture(tokens, [panel]) + (_list(record.events) if record.events else "")
    return Card("Events", shown, facts)


def _list(happened: tuple[Event, ...]) -> str:
    saves = [event for event in happened if event.kind == "save"][-_MAX_SAVES:]
    others = [event for event in happened if event.kind != "save"][-_MAX_EVENTS:]
    shown = sorted([*saves, *others], key=lambda event: np.nan_to_num(event.time))
    rows = [[_when(event.time), show(event.step), event.kind, event.text[:500]] for event in reversed(shown)]
    caption = (
        f"the newest {len(rows)} of {len(happened):,}, newest first" if len(rows) < len(happened) else "newest first"
    )
    listed = table(caption, ["time (UTC)", "step", "kind", "what"], rows, of_words=True)
    return f"<details{' open' if len(rows) <= 12 else ''}><summary>list of events</summary>{listed}</details>"


def _when(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "–"
