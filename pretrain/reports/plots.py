"""Pictures for the report, drawn by matplotlib without a display and without its global state.

Lines become SVG that is part of the page: it is drawn in placeholder colours, which the page's style sheet replaces,
so the same picture serves light and dark. Heat maps become PNG. Colours are told apart by the colour-blind, and lines
by their dashes too.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from parallel.simulate import Timeline
from parallel.timeline_drawing import svg_timeline
from pretrain.reports.run_record import Column
from pretrain.units import short

MAX_POINTS = 500
_MAX_MOMENTS = 160
_WIDTH, _PANEL_HEIGHT, _MARGIN = 5.2, 1.75, 0.55
_HEAT_MAP = "cividis"
_LOAD_SHOWN = 2.0

# Placeholders, and what the style sheet calls them.
_INK, _GRID = "#000001", "#000002"
_LINES = ("#000003", "#000004", "#000005")
_STYLES = ("-", "--", ":")
_CSS_NAMES = {_INK: "--ink", _GRID: "--grid", _LINES[0]: "--line-1", _LINES[1]: "--line-2", _LINES[2]: "--line-3"}

_SETTINGS: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
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
    what it is; `mirrored` shows it below 0 too. `y_range` bounds what is shown. The legend is a column, or a row."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    from_zero: bool = False
    whole: bool = False
    limit: tuple[float, str] | None = None
    mirrored: bool = False
    y_range: tuple[float, float] | None = None
    legend_in_row: bool = False


def draw_panels(tokens: Column, panels: Sequence[Panel]) -> str:
    """Panels below one another over the tokens seen, as an `svg` element for a page. Lines without a value are left
    out; of panels without a line nothing is drawn, and of no panels an empty string comes back."""
    shown = [panel for panel in panels if any(np.isfinite(line.values).any() for line in panel.lines)]
    if not shown:
        return ""
    with rc_context(_SETTINGS | {"svg.hashsalt": shown[0].title}):
        height = _PANEL_HEIGHT * (len(shown) if len(shown) > 1 else 1.5) + _MARGIN
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        for panel, axes in zip(shown, figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0], strict=True):
            _draw_panel(axes, tokens, panel)
        axes.set_xlabel("tokens")
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _as_element(file.getvalue(), ", ".join(panel.title for panel in shown))


def _draw_panel(axes: Axes, tokens: Column, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    for line, color, style in zip(panel.lines, _LINES, _STYLES, strict=False):
        known = np.isfinite(line.values)
        if not known.any():
            continue
        if line.points or known.sum() == 1:
            x, mean, _, _ = thin_out(tokens[known], line.values[known])
            axes.plot(x, mean, color=color, marker="o", markersize=4, linewidth=1, label=line.label)
        else:
            x, mean, low, high = thin_out(tokens, line.values)
            if line.band:
                low, high = (thin_out(tokens, edge)[1] for edge in line.band)
            opacity, width = (0.35, 0.8) if line.faint else (1.0, 1.6)
            axes.fill_between(x, low, high, color=color, alpha=0.2 * opacity, linewidth=0)
            axes.plot(x, mean, color=color, linestyle=style, linewidth=width, alpha=opacity, label=line.label)
    if panel.limit:
        level, label = panel.limit
        axes.axhline(level, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)), label=label)
        if panel.mirrored:
            axes.axhline(-level, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)))
    _dress(axes, panel)


def _dress(axes: Axes, panel: Panel) -> None:
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
    if panel.y_range:
        axes.set_ylim(panel.y_range)
    if panel.from_zero:
        top = max(axes.get_ylim()[1], 1.05 if panel.whole else 0.0)
        axes.set_ylim(-0.03 * top, top)
    count = len(axes.get_legend_handles_labels()[0])
    if count > 1:
        columns = count if panel.legend_in_row else 1
        axes.legend(frameon=False, fontsize=9, loc="best", ncols=columns, columnspacing=1.2)


def _tick(value: float, _position: int) -> str:
    """A number on an axis: 12K, 1.5e-4."""
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    shown = short(abs(value))
    digits = shown.rstrip("TBMK")
    plain = digits.rstrip("0").rstrip(".") if "." in digits and "e" not in digits else digits
    return ("−" if value < 0 else "") + plain + shown[len(digits) :]


def thin_out(x: Column, values: Column) -> tuple[Column, Column, Column, Column]:
    """At most `MAX_POINTS` points of a line: where, and the mean, least and largest value there. Neighbours are put
    together so that no spike is lost; a point with no known value at all is NaN."""
    size = -(-len(x) // MAX_POINTS)
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
    return f'<svg role="img" aria-label="{label}" {view_box[0] if view_box else ""}>{body}'


def draw_pipeline(timeline: Timeline) -> str:
    """The steps of every rank as an `svg` element for a page, without what only a file needs."""
    return svg_timeline(timeline).replace(' xmlns="http://www.w3.org/2000/svg"', "")


def draw_heat_map(load: Column) -> str:
    """The load of a layer's experts over time, [moments, experts], as a `data:` address of a PNG: one row an expert,
    one column a moment, from no load to twice the mean and more."""
    moments = -(-len(load) // _MAX_MOMENTS)
    summed = np.add.reduceat(load, np.arange(0, len(load), moments))
    relative = summed / np.maximum(summed.mean(1, keepdims=True), 1e-12)
    file = io.BytesIO()
    imsave(file, relative.T, format="png", cmap=_HEAT_MAP, vmin=0.0, vmax=_LOAD_SHOWN)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def heat_map_scale() -> str:
    """The heat map's colours from no load to twice the mean, as a CSS gradient."""
    stops = colormaps[_HEAT_MAP](np.linspace(0, 1, 9))[:, :3]
    colors = ["#" + np.round(255 * stop).astype(np.uint8).tobytes().hex() for stop in stops]
    return f"linear-gradient(to right, {', '.join(colors)})"
