"""The report of a run: what its metrics show, as one page of pictures with the numbers behind them."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import SupportsFloat

import numpy as np

from data.shards import write_atomically
from pretrain.config import parse_config
from pretrain.errors import UserError
from pretrain.planning.plan import pipeline_timeline
from pretrain.reports.page import Card, Facts, heat_maps, page
from pretrain.reports.plots import Line, Panel, draw_heat_map, draw_panels, draw_pipeline, heat_map_scale
from pretrain.reports.run_record import Column, RunRecord, read_record
from pretrain.units import short

REPORT = "report.html"
_MAX_MAPS = 24
_MIN_STEPS_TO_ZOOM = 50
_MAX_RANKS, _MAX_BATCH, _MAX_ROWS = 1_000_000, 1_000_000, 64


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html from RUN/metrics.jsonl and RUN/config.toml, and returns where it lies. Raises UserError if
    there is no run to report on."""
    record = read_record(run_folder)
    makers = (_loss, _late_loss, _gradient, _throughput, _schedule, _balance, _pipeline, _expert_load)
    content = page(
        title=record.name,
        subtitle=f"last step on {record.written:%d %B %Y at %H:%M (UTC%z)}",
        tiles=_tiles(record),
        cards=[card for make in makers if (card := make(record)).picture],
        config_text=record.config_text,
    )
    path = run_folder / REPORT
    write_atomically(path, content.encode("utf-8", errors="replace"))
    return path


def _tiles(record: RunRecord) -> Facts:
    columns = record.columns
    return list(
        _known(
            ("steps", f"{columns['step'][-1]:,.0f}"),
            ("tokens", short(columns["tokens"][-1])),
            ("loss", _last(columns["lm_loss"], "{:.4f}")),
            ("held-out loss", _last(columns["val_loss"], "{:.4f}")),
            ("tokens a second", _of(columns["tokens_per_s"], np.median, short)),
            ("time in steps", _of(columns["step_time_s"], np.sum, _duration)),
        )
    )


def _loss(record: RunRecord) -> Card:
    columns = record.columns
    facts = _known(
        ("next token, last step", _last(columns["lm_loss"], "{:.4f}")),
        ("next token, last 1 % of the run", _of(_tail(columns["lm_loss"]), np.mean, "{:.4f}".format)),
        ("multi-token prediction, last step", _last(_unless_zero(columns["mtp_loss"]), "{:.4f}")),
        ("held out, last", _last(columns["val_loss"], "{:.4f}")),
    )
    return Card("Loss", draw_panels(columns["tokens"], [_loss_panel(record, 0)]), list(facts))


def _late_loss(record: RunRecord) -> Card:
    columns = record.columns
    begin = len(columns["step"]) // 5
    if begin < _MIN_STEPS_TO_ZOOM // 5:
        return Card("", "", ())
    held_out = columns["val_loss"]
    facts = _known(
        ("next token, lowest step", _of(columns["lm_loss"], np.min, "{:.4f}".format)),
        ("held out, lowest", _of(held_out, np.min, "{:.4f}".format)),
        ("held out, last as perplexity", _of(held_out, lambda values: math.exp(min(values[-1], 700)), "{:.4g}".format)),
    )
    picture = draw_panels(columns["tokens"][begin:], [_loss_panel(record, begin)])
    return Card("Loss after the first fifth", picture, list(facts))


def _loss_panel(record: RunRecord, begin: int) -> Panel:
    columns = record.columns
    lines = [
        Line("next token", columns["lm_loss"][begin:]),
        Line("multi-token prediction", _unless_zero(columns["mtp_loss"])[begin:]),
        Line("held out", columns["val_loss"][begin:], points=True),
    ]
    return Panel("nats a token", lines)


def _schedule(record: RunRecord) -> Card:
    columns = record.columns
    panels = [
        Panel("learning rate", [Line("learning rate", columns["lr"])], from_zero=True),
        Panel("batch size, sequences", [Line("batch size", columns["batch_size"])], from_zero=True, whole=True),
    ]
    facts = _known(
        ("learning rate, highest", _of(columns["lr"], np.max, "{:.3g}".format)),
        ("learning rate, last", _last(columns["lr"], "{:.3g}")),
        ("batch, first", _of(columns["batch_size"], lambda values: values[0], "{:,.0f}".format)),
        ("batch, last", _last(columns["batch_size"], "{:,.0f}")),
    )
    return Card("Learning rate and batch", draw_panels(columns["tokens"], panels), list(facts))


def _gradient(record: RunRecord) -> Card:
    norm, skipped = record.columns["grad_norm"], record.columns["skipped"]
    clip = _clip(record)
    limit = (clip, f"clipped at {clip:g}") if clip else None
    panel = Panel("norm before clipping", [Line("gradient norm", norm)], log=True, limit=limit)
    facts = _known(
        ("median", _of(norm, np.median, "{:.3g}".format)),
        ("median, last 1 % of the run", _of(_tail(norm), np.median, "{:.3g}".format)),
        ("largest", _of(norm, np.max, "{:.3g}".format)),
        ("steps clipped", _of(norm, lambda values: 100 * np.mean(values > clip), "{:.1f} %".format) if clip else ""),
        ("steps skipped", _last(skipped, "{:,.0f}")),
    )
    return Card("Gradient", draw_panels(record.columns["tokens"], [panel]), list(facts))


def _throughput(record: RunRecord) -> Card:
    columns = record.columns
    panel = Panel("tokens a second", [Line("tokens a second", columns["tokens_per_s"])], from_zero=True)
    facts = _known(
        ("median", _of(columns["tokens_per_s"], np.median, lambda value: f"{short(value)} tokens/s")),
        ("step, median", _of(columns["step_time_s"], np.median, "{:.3g} s".format)),
        ("per device, median", _of(columns["tflops_per_gpu"], np.median, "{:.3g} TFLOP/s".format)),
        ("of the device's peak", _of(100 * columns["mfu"], np.median, "{:.1f} %".format)),
        ("memory, highest", _of(columns["max_memory_gib"], np.max, "{:.1f} GiB".format)),
    )
    return Card("Throughput", draw_panels(columns["tokens"], [panel]), list(facts))


def _balance(record: RunRecord) -> Card:
    violation, dead = record.columns["load_max_violation"], record.columns["dead_experts"]
    panels = [
        Panel("largest load / mean load − 1, worst layer", [Line("violation", violation)], from_zero=True),
        Panel("experts without a token", [Line("dead experts", dead)], from_zero=True, whole=True),
    ]
    facts = _known(
        ("violation, largest", _of(violation, np.max, "{:.2f}".format)),
        ("violation, last 1 % of the run", _of(_tail(violation), np.mean, "{:.2f}".format)),
        ("experts without a token, most", _of(dead, np.max, "{:,.0f}".format)),
        ("experts without a token, last", _last(dead, "{:,.0f}")),
    )
    return Card("Balance of the experts", draw_panels(record.columns["tokens"], panels), list(facts))


def _expert_load(record: RunRecord) -> Card:
    loads = record.loads
    names = list(loads.layers)
    chosen = (
        [names[index] for index in np.unique(np.linspace(0, len(names) - 1, _MAX_MAPS).astype(int))] if names else []
    )
    maps = [
        (f"layer {name}: {loads.layers[name].shape[1]} experts", draw_heat_map(loads.layers[name])) for name in chosen
    ]
    if not maps:
        return Card("Load of the experts", "", ())
    which = "every layer" if len(chosen) == len(names) else f"{len(chosen)} of the {len(names)} layers"
    return Card(
        "Load of the experts",
        heat_maps(maps, heat_map_scale()),
        (),
        is_wide=True,
        note=f"One map for {which} with experts: a row for each expert, time from left to right, from "
        f"{short(loads.tokens[0])} to {short(loads.tokens[-1])} tokens.",
    )


def _pipeline(record: RunRecord) -> Card:
    """The last step, by the schedule; nothing where there is no pipeline, or the run does not say how it was laid
    out."""
    nothing = Card("", "", ())
    world_size, batch_size = (record.columns[key][-1] for key in ("world_size", "batch_size"))
    if not (1 <= world_size <= _MAX_RANKS and 1 <= batch_size <= _MAX_BATCH):
        return nothing
    try:
        config = parse_config(record.config)
        parallel, shape = config.parallel, config.parallel.mesh_shape(int(world_size))
        number = int(batch_size) // (shape.dp * config.train.micro_batch_size)
        if parallel.pp > _MAX_ROWS:
            return nothing
        timeline, drawn = (pipeline_timeline(parallel, count) for count in (number, min(number, 4 * parallel.pp)))
    except (UserError, ValueError):
        return nothing
    if timeline is None or drawn is None:
        return nothing
    facts = (
        ("schedule", f"{parallel.schedule}, {timeline.schedule.num_stages} stages on {shape.pp} ranks"),
        ("pipelines", f"{shape.batch_ranks:,}"),
        ("micro-batches", f"{number:,}"),
        ("bubble", f"{100 * timeline.bubble / timeline.makespan:.1f} %"),
        ("micro-batches alive on a rank, most", f"{max(timeline.peak_activations)}"),
    )
    shown = drawn.schedule.num_micro_batches
    part = f"; drawn with {shown} micro-batches" if shown < number else ""
    return Card(
        "Pipeline",
        draw_pipeline(drawn),
        facts,
        is_wide=True,
        note="The last step as scheduled, not as measured: backward passes take twice as long as forward passes, half "
        f"of it for the gradients of weights{part}.",
    )


def _clip(record: RunRecord) -> float:
    """The norm above which gradients were clipped, 0 if none."""
    optimizer = record.config.get("optimizer")
    clip = optimizer.get("clip", 0) if isinstance(optimizer, dict) else 0
    return float(clip) if isinstance(clip, int | float) and 0 < clip < math.inf else 0.0


def _known(*facts: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Those that say something."""
    return (fact for fact in facts if fact[1])


def _of(values: Column, reduce: Callable[[Column], SupportsFloat], show: Callable[[float], str]) -> str:
    """What `reduce` makes of the known values, empty where there is none."""
    known = values[np.isfinite(values)]
    return show(float(reduce(known))) if len(known) else ""


def _last(values: Column, template: str) -> str:
    return _of(values, lambda known: known[-1], template.format)


def _tail(values: Column) -> Column:
    """The last hundredth of the run."""
    return values[-max(1, len(values) // 100) :]


def _unless_zero(values: Column) -> Column:
    """NaN throughout where nothing but zeros was recorded."""
    return values if np.nan_to_num(values).any() else np.full_like(values, math.nan)


def _duration(seconds: float) -> str:
    """Two units: 3 d 4 h, 2 h 5 min, 7 min 30 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((index for index, (_, size) in enumerate(units) if seconds >= size), len(units) - 1)
    parts = []
    for name, size in units[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)
