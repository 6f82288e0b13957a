"""How fast a run is, where its time goes, and how much memory it takes."""

import numpy as np

from pretrain.reports.facts import known, of
from pretrain.reports.heat_maps import color_scale, gathered, png_address
from pretrain.reports.page import Card, Figure, color_legend, figures, folded_table
from pretrain.reports.pictures import picture, show
from pretrain.reports.plots import Line, Panel
from pretrain.reports.rank_times import busy_seconds
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import as_number
from pretrain.units import short

# In the order of a step, with their names on the page.
_PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "all_to_all": "all-to-all, waited for",
    "pipeline": "pipeline, waited for",
    "optimizer": "optimizer",
    "other": "other",
    "save": "save",
}
_MAX_RANK_ROWS = 24


def throughput(record: RunRecord) -> Card:
    """Tokens a second and the share of the device's peak."""
    columns = record.columns
    panels = [
        Panel("tokens a second", [Line("tokens a second", columns["tokens_per_s"])], from_zero=True),
        Panel("MFU, % of the device's peak", [Line("MFU", 100 * columns["mfu"])], from_zero=True),
    ]
    facts = known(
        ("median", of(columns["tokens_per_s"], np.median, lambda value: f"{short(value)} tokens/s")),
        ("step, median", of(columns["step_time_s"], np.median, "{:.3g} s".format)),
        ("per device, median", of(columns["tflops_per_gpu"], np.median, "{:.3g} TFLOP/s".format)),
        ("of the device's peak", of(100 * columns["mfu"], np.median, "{:.1f} %".format)),
    )
    return Card("Throughput", picture(columns["tokens"], panels), facts)


def memory(record: RunRecord) -> Card:
    """The most memory so far."""
    used, size = record.columns["max_memory_gib"], as_number(record.origin.get("device_memory_gib"))
    limit = (size, f"the device's {size:.1f} GiB") if 0 < size < 1e9 else None
    panel = Panel("most so far on the first rank, GiB", [Line("memory", used)], from_zero=True, limit=limit)
    facts = known(
        ("memory, highest", of(used, np.max, "{:.1f} GiB".format)),
        ("device", str(record.origin.get("device", ""))[:100]),
        ("of the device", of(100 * used / limit[0], np.max, "{:.0f} %".format) if limit else ""),
    )
    return Card("Memory", picture(record.columns["tokens"], [panel]), facts)


def phases(record: RunRecord) -> Card:
    """Where the time of a step goes on the first rank."""
    series = record.phases
    names = [*_PHASES, *(name for name in series.columns if name not in _PHASES)]
    lines = [Line(_PHASES.get(name, name), series.of(name)) for name in names if np.nan_to_num(series.of(name)).any()]
    total = np.nansum(series.matrix([name for name in names if name in series.columns]), 1)
    facts = known(
        *(
            (
                line.label,
                f"{100 * np.nansum(line.values) / total.sum():.1f} %, median {np.nanmedian(line.values):.3g} s",
            )
            for line in lines
        )
    )
    panel = Panel("seconds of a step, stacked", lines, stacked=True, from_zero=True)
    return Card("Time by phase", picture(series.tokens, [panel]), facts, note="On the first rank.")


def ranks(record: RunRecord) -> Card:
    """How long each rank computes, as a map: a slow one is a bright row."""
    steps, busy = busy_seconds(record)
    if busy.shape[1] < 2:
        return Card("", "", ())
    tokens = np.array([record.tokens_at(step) for step in steps])
    middle = np.median(busy, 1)
    lines = [Line("slowest", busy.max(1)), Line("median", middle), Line("fastest", busy.min(1))]
    relative = gathered(busy, np.maximum) / np.maximum(gathered(middle, np.maximum), 1e-12)[:, None]
    now = np.median(busy[-20:], 0)
    order = np.argsort(-now)[:_MAX_RANK_ROWS]
    rows = [[str(rank), f"{now[rank]:.4g}", f"{now[rank] / np.median(now):.3f}"] for rank in order]
    table = folded_table("values by rank", "the slowest, newest records", ["rank", "busy s", "of the median"], rows)
    figure = Figure(
        address=png_address(relative.T, 0.75, 1.5),
        height=max(60, min(4 * busy.shape[1], 320)),
        caption=f"{busy.shape[1]} ranks, rank 0 on top; time from left to right",
        description=f"Busy time of each rank over the run beside the median; slowest now is rank {order[0]}",
        below=table,
    )
    panel = Panel("seconds a rank computes in a step", lines, from_zero=True)
    legend = color_legend("0.75 of the median", color_scale(), "1.5 and more")
    shown = picture(tokens, [panel]) + figures([figure], large=True) + legend
    facts = known(
        ("slowest rank now", f"{order[0]}, {show(float(now[order[0]] / np.median(now)))} of the median"),
        ("records", f"{len(steps):,}"),
    )
    return Card("Ranks", shown, facts, note="Waiting for others is left out: the slowest rank sets the pace of all.")
