"""Plots for the page with the values behind them as a table, which can be read aloud and copied."""

import math
from collections.abc import Sequence

import numpy as np

from pretrain.reports.page import folded_table
from pretrain.reports.plots import Line, Mark, Panel, draw_panels, thin_out
from pretrain.reports.series import Column
from pretrain.units import short

_MAX_ROWS = 24


def picture(tokens: Column, panels: Sequence[Panel], marks: Sequence[Mark] = ()) -> str:
    """Panels over the tokens seen and a table of their lines; empty where no line has a value."""
    drawing = draw_panels(tokens, panels, marks)
    told = [panel for panel in panels if not panel.rows]
    return drawing + (_table(tokens, told) if told else "") if drawing else ""


def show(value: float) -> str:
    """A number of a table, a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:.4g}"


def _table(tokens: Column, panels: Sequence[Panel]) -> str:
    lines = [(panel, line) for panel in panels for line in panel.shown]
    head = ["tokens", *(_heading(panel, line) for panel, line in lines)]
    where = thin_out(tokens, tokens, _MAX_ROWS)[0]
    columns = [thin_out(tokens, line.values, _MAX_ROWS)[1] for _, line in lines]
    rows = [
        [short(seen), *(show(value) for value in values)] for seen, *values in np.stack([where, *columns], 1).tolist()
    ]
    size = -(-len(tokens) // _MAX_ROWS)
    caption = "each row is the mean from there to the next" if size > 1 else "all there are"
    return folded_table("values", f"{', '.join(panel.title for panel in panels if panel.shown)}: {caption}", head, rows)


def _heading(panel: Panel, line: Line) -> str:
    return (
        panel.title
        if len(panel.shown) == 1
        else f"{line.label} ({panel.title})"
        if len(panel.title) < 30
        else line.label
    )
