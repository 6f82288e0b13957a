"""The tables that `plan` prints, and the drawing of the pipeline."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel.simulate import Timeline
from parallel.timeline_drawing import ascii_timeline
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.planning.forecast import Forecast
from pretrain.planning.hardware import Hardware
from pretrain.planning.memory import GIB, Memory, Part, total
from pretrain.planning.plan import Layout, Plan
from pretrain.planning.search import Clock, describe_change, search
from pretrain.units import short

_MAX_WIDTH = 160
_MAX_ROWS = 32
_SHORT_NAMES = {
    "weights": "weights",
    "gradients": "grads",
    "gradient sums": "grads",
    "own gradients": "grads",
    "reduction": "grads",
    "masters and moments": "optim",
    "routed experts": "experts",
    "deferred": "wait",
    "loss": "loss",
    "weights in FP8": "FP8",
    "backward pass": "back",
}
_PARTS_OF_TIME = {
    "dense": "products in bf16",
    "dense fp8": "products in FP8",
    "grouped": "experts in bf16",
    "grouped fp8": "experts in FP8",
    "memory": "norms, SwiGLU, permutation and the like",
    "context": "context exchange",
    "exposed all-to-all": "all-to-all, as far as not hidden",
    "optimizer": "AdamW",
}


def render(planned: Plan, console: Console) -> None:
    """Prints the tables of a plan."""
    ranks = planned.layout.world_size
    console.print(Text(f"{planned.name} on {ranks:,} rank{'s' if ranks > 1 else ''}", style="bold"), "")
    for table in (_model(planned), _layout(planned), _timeline(planned)):
        console.print(table, "")
    pipeline = planned.pipeline()
    if pipeline is not None:
        _draw_pipeline(pipeline, planned.pipeline(-1) or pipeline, console)
    console.print(_memory(planned), "")
    if len(planned.memories) > 1:
        console.print(_places(planned), "")
    if planned.hardware is not None and planned.forecasts:
        for table in _forecast(planned.forecasts, planned.hardware):
            console.print(table, "")


def _model(planned: Plan) -> Table:
    counts, (latent, plain) = planned.counts, planned.cache
    table = _facts("Model")
    table.add_row("parameters", f"{short(counts.total)}, of which a token uses {short(counts.active)}")
    if counts.mtp:
        uses = f"{short(counts.mtp)} more, of which a token uses {short(counts.mtp_active)}"
        table.add_row("multi-token prediction", uses)
    table.add_row("training", f"{planned.flops_per_token:.3g} FLOPs a token, {planned.flops:.3g} in all")
    table.add_row("decoding cache", f"{latent:,} values a token and layer,")
    table.add_row("", f"{100 * planned.cache_saving:.1f} % less than the {plain:,} of multi-head attention")
    return table


def _layout(planned: Plan) -> Table:
    layout, parallel = planned.layout, planned.layout.parallel
    table = _facts("Layout")
    table.add_row(
        "ranks", f"{layout.world_size:,}: dp {layout.dp}, pp {parallel.pp}, ep {parallel.ep}, cp {parallel.cp}"
    )
    if len(layout.stages) > 1:
        table.add_row("schedule", f"{parallel.schedule} over {len(layout.stages)} stages")
        table.add_row("layers of a stage", f"{_stages(layout)}; the last has the head too")
    offload = ", masters and moments in the CPU's memory" if parallel.optimizer_offload else ""
    table.add_row("ZeRO", f"stage {parallel.zero_stage}{offload}")
    if parallel.recompute:
        table.add_row("recomputed", ", ".join(parallel.recompute))
    counts = planned.num_micro_batches
    numbers = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    where = "in each pipeline" if parallel.pp > 1 else "on each rank"
    sequences = "sequence" if planned.micro_batch_size == 1 else "sequences"
    table.add_row("micro-batches a step", f"{numbers} {where}, of {planned.micro_batch_size} {sequences}")
    return table


def _stages(layout: Layout) -> str:
    """How many main layers the stages have, equal neighbours together."""
    words = []
    for size, same in groupby(map(len, layout.stages)):
        count = len(list(same))
        words.append(f"{size} × {count}" if count > 1 else f"{size}")
    return ", ".join(words)


def _draw_pipeline(timeline: Timeline, longest: Timeline, console: Console) -> None:
    """The whole timeline, or the ranks from both ends of it that there is room for; of the `longest` its bubble."""
    schedule, most = timeline.schedule, longest.schedule.num_micro_batches
    share, least = (line.bubble / line.makespan for line in (timeline, longest))
    with_most = f" ({100 * least:.1f} % of one of {most})" if most > schedule.num_micro_batches else ""
    console.print(Text("Pipeline", style="bold"))
    console.print(
        Text(
            f"  of a step of {schedule.num_micro_batches} micro-batches, where B = 2 F and W = F: the bubble is "
            f"{100 * share:.1f} %{with_most}, and at most {max(timeline.peak_activations)} are alive on a rank"
        )
    )
    console.print()
    drawing = ascii_timeline(timeline, width=min(console.width, _MAX_WIDTH)).split("\n")
    console.print(Text("\n".join(_shortened(drawing, schedule.num_ranks)), no_wrap=True, overflow="crop"))
    console.print()


def _shortened(drawing: Sequence[str], num_ranks: int) -> Iterator[str]:
    """The rows and the legend of a drawing."""
    first = next(number for number, line in enumerate(drawing) if line.lstrip().startswith("0 "))
    for rank, line in enumerate(drawing[first:]):
        if num_ranks <= _MAX_ROWS or not _MAX_ROWS // 2 <= rank < num_ranks - _MAX_ROWS // 2:
            yield line
        elif rank == _MAX_ROWS // 2:
            yield f"… {num_ranks - _MAX_ROWS} ranks more"


def _timeline(planned: Plan) -> Table:
    table = _table("Timeline")
    for name in ("step", "tokens", "learning rate", "batch", "tokens a step", "γ", "MTP"):
        table.add_column(name, justify="right")
    for milestone in planned.milestones:
        values = milestone.values
        table.add_row(
            f"{milestone.step:,}",
            short(milestone.tokens),
            f"{values.learning_rate:.3g}",
            f"{values.batch_size:,}",
            f"{values.batch_size * values.seq_len:,}",
            f"{values.bias_update_speed:g}",
            f"{values.mtp_weight:g}",
        )
    table.add_row(f"{planned.num_steps:,}", short(planned.num_tokens), "end", style="bold")
    return table


def _memory(planned: Plan) -> Table:
    memory = planned.memory
    table = _table("Memory of a rank" if len(planned.memories) == 1 else "Memory of the rank that needs most")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("")
    _add_parts(table, "held all the time", memory.held)
    live = "in a micro-batch" if memory.live == 1 else f"of {memory.live} micro-batches"
    _add_parts(table, live, memory.activations, "estimated")
    if memory.step:
        _add_parts(table, "at the end of a step", memory.step)
    table.add_row("peak", f"{memory.peak / GIB:.2f}", "the first and the larger of the others", style="bold")
    _add_rows(table, memory.allowance)
    table.add_row("on a GPU, about", f"{memory.on_device / GIB:.2f}", "", style="bold")
    if memory.on_host:
        table.add_row("on the host", f"{memory.on_host / GIB:.2f}", "masters and moments, of every rank")
    return table


def _places(planned: Plan) -> Table:
    """The ranks along the pipeline by part, equal neighbours together."""
    table = _table("Memory along the pipeline, in GiB")
    rows = [_columns(memory) for memory in planned.memories]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if any(row.get(name) for row in rows)]
    table.add_column("rank", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    shown = [tuple(f"{row.get(name, 0) / GIB:.1f}" for name in names) for row in rows]
    first = 0
    for row, same in groupby(shown):
        last = first + len(list(same)) - 1
        table.add_row(f"{first}" if first == last else f"{first}-{last}", *row)
        first = last + 1
    return table


def _columns(memory: Memory) -> dict[str, int]:
    """Bytes by what fits into the width of a terminal; attention and the like are "kept"."""
    columns = {_SHORT_NAMES.get(part.name, "kept"): 0 for part in memory.parts}
    for part in memory.parts:
        columns[_SHORT_NAMES.get(part.name, "kept")] += part.bytes
    return {name: columns.get(name, 0) for name in (*dict.fromkeys(_SHORT_NAMES.values()), "kept")} | {
        "peak": memory.peak,
        "GPU": memory.on_device,
    }


def _forecast(forecasts: Sequence[Forecast], hardware: Hardware) -> Iterator[Table]:
    """The last step by what its time goes to, and what a rank sends in it."""
    table = _table(f"Predicted on {hardware.name}")
    table.add_column("of the last step, in seconds")
    for forecast in forecasts:
        table.add_column(forecast.precision, justify="right")
    for name in dict.fromkeys(name for forecast in forecasts for name in forecast.last.parts):
        parts = [forecast.last.parts.get(name, 0.0) for forecast in forecasts]
        if any(parts):
            table.add_row(f"  {_PARTS_OF_TIME.get(name, name)}", *(f"{seconds:.3f}" for seconds in parts))
    table.add_section()
    rows: dict[str, Callable[[Forecast], str]] = {
        "a step": lambda forecast: f"{forecast.last.seconds:.3f}",
        "tokens a second and GPU": lambda forecast: f"{forecast.last_tokens_per_s:,.0f}",
        "MFU of the bf16 peak": lambda forecast: f"{100 * forecast.mfu:.1f} %",
        "waiting, mean over ranks": lambda forecast: f"{100 * forecast.last.bubble:.1f} %",
        "in the whole run, tokens a second and GPU": lambda forecast: f"{forecast.tokens_per_s:,.0f}",
        "GPU-hours": lambda forecast: short(forecast.gpu_hours),
        "days": lambda forecast: f"{forecast.seconds / 86400:.1f}",
    }
    for name, show in rows.items():
        table.add_row(name, *map(show, forecasts))
    yield table
    if any(forecast.traffic for forecast in forecasts):
        yield _traffic(forecasts)


def _traffic(forecasts: Sequence[Forecast]) -> Table:
    table = _table("Sent by a rank in the last step, in GB, on the mean")
    table.add_column("")
    for forecast in forecasts:
        for link in ("in node", "between nodes"):
            table.add_column(f"{forecast.precision}, {link}", justify="right")
    purposes = dict.fromkeys(purpose for forecast in forecasts for purpose, _ in forecast.traffic)
    for purpose in purposes:
        sizes = [forecast.traffic.get((purpose, link), 0) for forecast in forecasts for link in ("node", "network")]
        table.add_row(purpose, *(f"{size / 1e9:.1f}" for size in sizes))
    return table


def render_search(
    config: Config, world_size: int, hardware: Hardware | None, device_memory_gib: float | None, console: Console
) -> None:
    """Prints the fastest layouts that fit. Raises UserError where none does."""
    if hardware is None:
        raise UserError(
            "plan --search needs --hardware FILE: rates to predict with, such as configs/hardware/h100.toml"
        )
    limit = hardware.memory_gb * 1e9 if device_memory_gib is None else device_memory_gib * GIB
    clock = Clock(Console(stderr=True))
    try:
        found = search(config, world_size, hardware, limit=limit, tick=clock.tick)
    finally:
        clock.stop()
    if not found:
        raise UserError(f"no layout of {world_size} ranks divides and fits into {limit / GIB:.1f} GiB; use more ranks")
    table = _table(f"Fastest layouts on {world_size:,} ranks: {hardware.name}")
    has_cp = any(layout.config.parallel.cp > 1 for layout in found)
    for name in ("tokens/s", "MFU", "GiB", "waits", "pp", "ep", *(["cp"] if has_cp else []), "ZeRO", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("schedule", no_wrap=True)
    table.add_column("recomputed")
    for layout in found:
        parallel = layout.config.parallel
        again = [*parallel.recompute, *([f"rounds of {parallel.max_expert_rows}"] if parallel.max_expert_rows else [])]
        table.add_row(
            f"{layout.tokens_per_s:,.0f}",
            f"{100 * layout.mfu:.1f}%",
            f"{layout.memory.on_device / GIB:.1f}",
            f"{100 * layout.step.bubble:.1f}%",
            *map(str, (parallel.pp, parallel.ep, *([parallel.cp] if has_cp else []), parallel.zero_stage)),
            str(layout.config.train.micro_batch_size),
            parallel.schedule,
            ", ".join(again),
        )
    console.print(table, "")
    change = describe_change(config, found[0].config, world_size, world_size=world_size)
    console.print(Text(f"The first: {change}" if change else "The first is the layout of the configuration."))


def _add_parts(table: Table, heading: str, parts: tuple[Part, ...], note: str = "") -> None:
    table.add_row(heading, f"{total(parts) / GIB:.2f}", note, style="italic")
    _add_rows(table, parts)
    table.add_section()


def _add_rows(table: Table, parts: tuple[Part, ...]) -> None:
    for part in parts:
        table.add_row(f"  {part.name}", f"{part.bytes / GIB:.2f}", part.what)


def _facts(title: str) -> Table:
    """Names and what there is to say of them."""
    table = _table(title, show_header=False)
    table.add_column(style="dim")
    table.add_column()
    return table


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=show_header, show_edge=False
    )
