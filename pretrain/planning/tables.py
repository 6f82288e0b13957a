"""The tables that `plan` prints, and the drawing of the pipeline."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel.simulate import Timeline
from parallel.timeline_drawing import ascii_timeline
from pretrain.planning.memory import DEVICE_OVERHEAD, GIB, Part, total
from pretrain.planning.plan import Layout, Plan
from pretrain.units import short

_MAX_WIDTH = 160
_MAX_ROWS = 32


def render(planned: Plan, console: Console) -> None:
    """Prints the tables of a plan."""
    ranks = planned.layout.world_size
    console.print(Text(f"{planned.name} on {ranks:,} rank{'s' if ranks > 1 else ''}", style="bold"), "")
    for table in (_model(planned), _layout(planned), _timeline(planned)):
        console.print(table, "")
    pipeline = planned.pipeline()
    if pipeline is not None:
        _draw_pipeline(pipeline, console)
    console.print(_memory(planned), "")
    if len(planned.memories) > 1:
        console.print(_places(planned), "")


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


def _draw_pipeline(timeline: Timeline, console: Console) -> None:
    """The whole timeline, or the ranks from both ends of it that there is room for."""
    schedule = timeline.schedule
    share = timeline.bubble / timeline.makespan
    console.print(Text("Pipeline", style="bold"))
    console.print(
        Text(
            f"  of a step of {schedule.num_micro_batches} micro-batches, where B = 2 F and W = F: the bubble is "
            f"{100 * share:.1f} %, and at most {max(timeline.peak_activations)} are alive on a rank"
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
    on_device = f"{(memory.peak + DEVICE_OVERHEAD) / GIB:.2f}"
    table.add_row("on a GPU, about", on_device, "with its driver and allocator", style="bold")
    if memory.on_host:
        table.add_row("on the host", f"{memory.on_host / GIB:.2f}", "masters and moments, of every rank")
    return table


def _places(planned: Plan) -> Table:
    """The ranks along the pipeline, equal neighbours together."""
    table = _table("Memory along the pipeline, in GiB")
    for name in ("pipeline rank", "held", "activations", "live", "peak"):
        table.add_column(name, justify="right")
    rows = [
        (*(f"{total(parts) / GIB:.2f}" for parts in (memory.held, memory.activations)), f"{memory.live}",
         f"{memory.peak / GIB:.2f}")
        for memory in planned.memories
    ]  # fmt: skip
    first = 0
    for row, same in groupby(rows):
        last = first + len(list(same)) - 1
        table.add_row(f"{first}" if first == last else f"{first} to {last}", *row)
        first = last + 1
    return table


def _add_parts(table: Table, heading: str, parts: tuple[Part, ...], note: str = "") -> None:
    table.add_row(heading, f"{total(parts) / GIB:.2f}", note, style="italic")
    for part in parts:
        table.add_row(f"  {part.name}", f"{part.bytes / GIB:.2f}", part.what)
    table.add_section()


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
