"""Pictures for the report, drawn by matplotlib without a display and without its global state.

Lines become SVG that is part of the page: it is drawn in placeholder colours, which the page's style sheet replaces,
so the same picture serves light and dark. Colours are told apart by the colour-blind, and lines by their dashes too.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pretrain.reports.series import Column
from pretrain.units import short

MAX_POINTS = 500
# Inches of 72 units; a phone shows a unit as about a pixel.
_WIDTH, _PANEL_HEIGHT, _MARGIN = 4.3, 1.6, 0.55
_LEGEND_COLUMNS, _LEGEND_ROW = 3, 0.21

# Placeholders, and what the style sheet calls them.
_INK, _GRID = "#000001", "#000002"
_LINES = tuple(f"#00000{number}" for number in range(3, 9))
_STYLES = ("-", "--", ":", "-.", (0, (6, 1)), (0, (3, 1, 1, 1)))
_CSS_NAMES = {_INK: "--ink", _GRID: "--grid"} | {color: f"--line-{number}" for number, color in enumerate(_LINES, 1)}

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "hatch.linewidth": 0.6,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
}


@dataclass(frozen=True)
class Line:
    """One value over the run. `points` draws marks, for values that are rare. Around the line lies the spread of the
    values drawn as one, or the `band` between two columns, if given. A `faint` line is a background for others."""

    label: str
    values: Column
    points: bool = False
    band: tuple[Column, Column] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """A plot of lines over the same axis; `whole` says that they count something. `limit` is a level worth showing, and
    what it is; `mirrored` shows it below 0 too. `y_range` bounds what is shown. The legend is inside, or below all.
    `stacked` lines are areas on top of one another. `rows` names whole values from 0 on, for lines that only say
    when."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    from_zero: bool = False
    whole: bool = False
    limit: tuple[float, str] | None = None
    mirrored: bool = False
    y_range: tuple[float, float] | None = None
    legend_below: bool = False
    stacked: bool = False
    rows: tuple[str, ...] = ()

    @property
    def shown(self) -> list[Line]:
        """The lines with a value."""
        return [line for line in self.lines if np.isfinite(line.values).any()]


@dataclass(frozen=True)
class Mark:
    """A moment worth a vertical line, and what happens there."""

    tokens: float
    label: str


def draw_panels(tokens: Column, panels: Sequence[Panel], marks: Sequence[Mark] = ()) -> str:
    """Panels below one another over the tokens seen, as an `svg` element for a page. Lines without a value are left
    out; of panels without a line nothing is drawn, and of no panels an empty string comes back."""
    shown = [panel for panel in panels if panel.shown]
    if not shown:
        return ""
    names = _common_names(shown)
    with rc_context(_SETTINGS | {"svg.hashsalt": shown[0].title}):
        height = _PANEL_HEIGHT * (len(shown) if len(shown) > 1 else 1.5) + _MARGIN
        height += _LEGEND_ROW * -(-len(names) // _LEGEND_COLUMNS)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        for panel, axes in zip(shown, figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0], strict=True):
            _draw_panel(axes, tokens, panel, has_legend=not names)
            _draw_marks(axes, marks, has_labels=panel is shown[0])
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        if names:
            handles = {label: handle for ax in figure.axes for handle, label in zip(*_legend_of(ax), strict=True)}
            figure.legend(
                list(handles.values()),
                list(handles),
                loc="outside lower left",
                ncols=_LEGEND_COLUMNS,
                frameon=False,
                fontsize=9,
                columnspacing=1.0,
                handlelength=2.2,
            )
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _as_element(file.getvalue(), ", ".join(panel.title for panel in shown))


def _common_names(panels: Sequence[Panel]) -> list[str]:
    """The names of all lines, for one legend below, where a panel has too many for a legend inside or wants it."""
    if all(panel.rows for panel in panels):
        return []
    few = max(len(panel.shown) for panel in panels) <= _LEGEND_COLUMNS
    if few and not any(panel.stacked or panel.legend_below for panel in panels):
        return []
    return list(dict.fromkeys(line.label for panel in panels for line in panel.shown))


def _legend_of(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, [str(label) for label in labels]


def _draw_panel(axes: Axes, tokens: Column, panel: Panel, *, has_legend: bool) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    if panel.stacked:
        _draw_stack(axes, tokens, panel.shown)
    else:
        for number, line in enumerate(panel.lines):
            _draw_line(axes, tokens, line, number, has_rows=bool(panel.rows))
    if panel.limit:
        level, label = panel.limit
        axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)), label=label)
        if panel.mirrored:
            axes.axhline(-level, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)))
    _dress(axes, panel, has_legend=has_legend)


def _draw_line(axes: Axes, tokens: Column, line: Line, number: int, *, has_rows: bool) -> None:
    known = np.isfinite(line.values)
    if not known.any():
        return
    # Lines beyond the colours take them again, with other dashes.
    color = _LINES[number % len(_LINES)]
    style = _STYLES[(number + number // len(_LINES)) % len(_STYLES)]
    if line.points or known.sum() == 1:
        x, mean, _, _ = thin_out(tokens[known], line.values[known])
        axes.plot(x, mean, color=color, marker="o", markersize=4, linewidth=0 if has_rows else 1, label=line.label)
        return
    x, mean, low, high = thin_out(tokens, line.values)
    if line.band:
        low, high = (thin_out(tokens, edge)[1] for edge in line.band)
    opacity, width = (0.35, 0.8) if line.faint else (1.0, 1.6)
    if line.band or len(x) < len(tokens):
        axes.fill_between(x, low, high, color=color, alpha=0.2 * opacity, linewidth=0)
    axes.plot(x, mean, color=color, linestyle=style, linewidth=width, alpha=opacity, label=line.label)


def _draw_stack(axes: Axes, tokens: Column, lines: Sequence[Line]) -> None:
    """Areas on top of one another, the first at the bottom; those that take a colour again are hatched."""
    thinned = [thin_out(tokens, line.values) for line in lines]
    x = thinned[0][0]
    below = np.zeros(len(x))
    for number, (line, (_, mean, _, _)) in enumerate(zip(lines, thinned, strict=True)):
        above = below + np.nan_to_num(mean)
        hatch = "////" if number >= len(_LINES) else None
        color = _LINES[number % len(_LINES)]
        axes.fill_between(
            x, below, above, facecolor=color, edgecolor=_INK, linewidth=0.3, hatch=hatch, label=line.label
        )
        below = above


def _draw_marks(axes: Axes, marks: Sequence[Mark], *, has_labels: bool) -> None:
    low, high = axes.get_xlim()
    for mark in marks:
        if low < mark.tokens < high:
            axes.axvline(mark.tokens, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)))
            if has_labels:
                axes.text(
                    mark.tokens,
                    0.97,
                    mark.label,
                    transform=axes.get_xaxis_transform(),
                    rotation=90,
                    ha="right",
                    va="top",
                    fontsize=8.5,
                    clip_on=True,
                    parse_math=False,
                )
    axes.set_xlim(low, high)


def _dress(axes: Axes, panel: Panel, *, has_legend: bool) -> None:
    axes.grid(color=_GRID, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=panel.whole))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.tick_params(which="both", length=0)
    if panel.rows:
        axes.set_yticks(range(len(panel.rows)), panel.rows)
        axes.set_ylim(len(panel.rows) - 0.5, -0.5)
        return
    if panel.y_range:
        axes.set_ylim(panel.y_range)
    if panel.from_zero:
        top = max(axes.get_ylim()[1], 1.05 if panel.whole else 0.0)
        axes.set_ylim(-0.03 * top, top)
    count = len(axes.get_legend_handles_labels()[0])
    if has_legend and count > 1:
        axes.legend(frameon=False, fontsize=9, loc="best")


def _tick(value: float, _position: int) -> str:
    """A number on an axis: 12K, 1.5e-4."""
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    shown = short(abs(value))
    digits = shown.rstrip("TBMK")
    plain = digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits
    return ("−" if value < 0 else "") + plain + shown[len(digits) :]


def thin_out(x: Column, values: Column, most: int = MAX_POINTS) -> tuple[Column, Column, Column, Column]:
    """At most `most` points of a line: where, and the mean, least and largest value there. Neighbours are put
    together so that no spike is lost; a point with no known value at all is NaN."""
    size = -(-len(x) // most)
    if size <= 1:
        return x, values, values, values
    starts = np.arange(0, len(x), size)
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        mean = np.add.reduceat(np.where(known, values, 0.0), starts) / counts
    low = np.minimum.reduceat(np.where(known, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, values, -np.inf), starts)
    none = counts == 0
    return x[starts], mean, np.where(none, np.nan, low), np.where(none, np.nan, high)


def _as_element(svg: str, label: str) -> str:
    """The bare `svg` element: without what only a file needs and without names that nothing refers to, in the page's
    colours, and with a label for those who cannot see it."""
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', head)
    body = body.replace("xlink:href=", "href=")
    used = set(re.findall(r"#([\w.-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r' d="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    for placeholder, name in _CSS_NAMES.items():
        body = body.replace(placeholder, f"var({name})")
    return f'<svg role="img" aria-label="{escape(label)}" {view_box[0] if view_box else ""}>{body}'
