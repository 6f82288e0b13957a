"""How the experts share the tokens: numbers of the worst layer, maps of all layers, and each expert of each layer."""

from dataclasses import dataclass

import numpy as np

from pretrain.reports.facts import known, last, of, tail
from pretrain.reports.heat_maps import LOAD_SHOWN, color_scale, draw_load, gathered, png_address
from pretrain.reports.page import Card, Figure, color_legend, figures, folded_table
from pretrain.reports.pictures import picture, show
from pretrain.reports.plots import Line, Panel
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import Column
from pretrain.units import short

_MAX_LAYERS = 128
_TABLE_ROWS = 8
# A pixel for each expert, that a dead one is a line of its own; few experts get more.
_LEAST_HEIGHT, _MOST_HEIGHT = 110, 256


@dataclass(frozen=True)
class _LayerMap:
    """A metric of the layers: its key, its name, how neighbours in time are joined, and which value is a bad one."""

    key: str
    name: str
    join: np.ufunc
    bad_is_high: bool = True


_LAYER_MAPS = (
    _LayerMap("max_violation", "largest load / mean load − 1", np.maximum),
    _LayerMap("dead_experts", "experts without a token", np.maximum),
    _LayerMap("entropy", "entropy of the load (1 is even)", np.minimum, bad_is_high=False),
    _LayerMap("bias_range", "range of the biases, highest − lowest", np.maximum),
)


def balance(record: RunRecord) -> Card:
    """The worst layer over the run."""
    columns = record.columns
    violation, dead = columns["load_max_violation"], columns["dead_experts"]
    panels = [
        Panel("largest load / mean load − 1, worst layer", [Line("violation", violation)], from_zero=True),
        Panel("experts without a token", [Line("dead experts", dead)], from_zero=True, whole=True),
    ]
    facts = known(
        ("violation, largest", of(violation, np.max, "{:.2f}".format)),
        ("violation, last 1 % of the run", of(tail(violation), np.mean, "{:.2f}".format)),
        ("experts without a token, most", of(dead, np.max, "{:,.0f}".format)),
        ("experts without a token, last", last(dead, "{:,.0f}")),
    )
    return Card("Balance of the experts", picture(columns["tokens"], panels), facts)


def received(record: RunRecord) -> Card:
    """What reaches the ranks that hold the experts: memory follows the fullest."""
    series = record.received
    rows = [Line("fullest rank", series.of("max")), Line("mean rank", series.of("mean"))]
    panels = [
        Panel("rows that arrive at a rank's experts in a step", rows, from_zero=True),
        Panel("rounds of dispatch, most", [Line("rounds", series.of("rounds_max"))], from_zero=True, whole=True),
    ]
    ratio = series.of("max") / np.where(series.of("mean") > 0, series.of("mean"), np.nan)
    facts = known(
        ("fullest rank, of the mean", of(ratio, np.max, "{:.2f}".format)),
        ("fullest rank, rows", of(series.of("max"), np.max, "{:,.0f}".format)),
        ("rounds, most", of(series.of("rounds_max"), np.max, "{:,.0f}".format)),
    )
    return Card("Rows received", picture(series.tokens, panels), facts)


def layers(record: RunRecord) -> Card:
    """Metrics of the layers over time: a map each, with a row for each layer."""
    series = record.moe
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in series.columns))[:_MAX_LAYERS]
    shown, values = [], {}
    for layer_map in _LAYER_MAPS:
        values[layer_map.key] = _of_layers(record, names, layer_map.key)
        if np.isfinite(values[layer_map.key]).any():
            shown.append(_layer_figure(layer_map, names, values[layer_map.key]))
    if not shown:
        return Card("", "", ())
    rows = [
        [name, *(show(value) for key in values for value in _newest_and_worst(values[key][:, place], key))]
        for place, name in enumerate(names)
    ]
    head = ["layer", *(f"{layer_map.name}, {when}" for layer_map in _LAYER_MAPS for when in ("last", "worst"))]
    table = folded_table("values by layer", "last and worst value of each layer", head, rows)
    span = f"from {short(series.tokens[0])} to {short(series.tokens[-1])} tokens"
    return Card(
        "Layers",
        figures(shown, large=True) + table,
        (),
        is_wide=True,
        note=f"A row for each layer with experts, {names[0]} on top, {names[-1]} at the bottom; time from left to "
        f"right, {span}.",
    )


def _of_layers(record: RunRecord, names: list[str], key: str) -> Column:
    """A metric [moments, layers]."""
    if key == "bias_range":
        high, low = (record.moe.matrix([f"{name}/{edge}" for name in names]) for edge in ("bias_max", "bias_min"))
        return high - low
    return record.moe.matrix([f"{name}/{key}" for name in names])


def _layer_figure(layer_map: _LayerMap, names: list[str], values: Column) -> Figure:
    with np.errstate(invalid="ignore"):
        joined = gathered(values, layer_map.join)
    low, high = float(np.nanmin(joined)), float(np.nanmax(joined))
    worst = np.nanmax(np.where(np.isfinite(values), values, -np.inf), 0) * (1 if layer_map.bad_is_high else -1)
    place = int(np.argmax(worst)) if layer_map.bad_is_high else int(np.argmin(np.nanmin(values, 0)))
    return Figure(
        address=png_address(joined.T, low, high if high > low else low + 1),
        height=max(60, min(5 * len(names), 305)),
        caption=layer_map.name,
        description=f"{layer_map.name}: each layer over the run, from {show(low)} to {show(high)}; worst in layer "
        f"{names[place]}",
        below=color_legend(show(low), color_scale(), show(high)),
    )


def _newest_and_worst(values: Column, key: str) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan
    return float(finite[-1]), float(finite.min() if key == "entropy" else finite.max())


def loads(record: RunRecord) -> Card:
    """The load of each expert over time: a map for each layer."""
    history = record.loads
    names = list(history.layers)[:_MAX_LAYERS]
    if not names:
        return Card("", "", ())
    shown = [_load_figure(record, name) for name in names]
    count = f"all {len(names)} layers" if len(names) > 1 else "the one layer"
    more = f", the first of {len(history.layers)}" if len(names) < len(history.layers) else ""
    return Card(
        "Load of the experts",
        figures(shown, ("idle", color_scale(), f"{LOAD_SHOWN:g} times the mean load and more")),
        (),
        is_wide=True,
        note=f"One map for each of {count} with experts{more}: a row for each expert, number 0 on top, time from left "
        f"to right, from {short(history.tokens[0])} to {short(history.tokens[-1])} tokens. A dark line is an expert "
        "without tokens.",
    )


def _load_figure(record: RunRecord, name: str) -> Figure:
    load = record.loads.layers[name]
    relative = load / np.maximum(load.mean(1, keepdims=True), 1e-12)
    fullest, num_experts = int(np.argmax(relative[-1])), load.shape[1]
    where = np.unique(np.linspace(0, len(load) - 1, _TABLE_ROWS).astype(int))
    rows = [
        [
            short(record.loads.tokens[row]),
            *(f"{value:.2f}" for value in np.quantile(relative[row], (0, 0.5, 1))),
            f"{int((load[row] == 0).sum())}",
        ]
        for row in where
    ]
    return Figure(
        address=draw_load(load),
        height=max(_LEAST_HEIGHT, min(num_experts, _MOST_HEIGHT)),
        caption=f"layer {name}: {num_experts} experts",
        description=f"Load of the {num_experts} experts of layer {name} over the run; at the end expert {fullest} has "
        f"most, {relative[-1].max():.2f} of the mean, and {int((load[-1] == 0).sum())} have none",
        below=folded_table(
            "values", "of the mean load, by moment", ["tokens", "least", "median", "most", "idle"], rows
        ),
    )
