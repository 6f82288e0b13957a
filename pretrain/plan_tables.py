"""The tables that `plan` prints."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pretrain.memory import DEVICE_OVERHEAD, GIB, Part, total
from pretrain.plan import Plan
from pretrain.units import short


def render(planned: Plan, console: Console) -> None:
    """Prints the tables of a plan."""
    ranks = planned.layout.world_size
    console.print(Text(f"{planned.name} on {ranks:,} rank{'s' if ranks > 1 else ''}", style="bold"), "")
    for table in (_model(planned), _layout(planned), _timeline(planned), _memory(planned)):
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
    layout = planned.layout
    table = _facts("Layout")
    axes = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in ("dp", "pp", "ep", "cp"))
    table.add_row("ranks", f"{layout.world_size:,}: {axes}")
    share = layout.dp * planned.micro_batch_size
    counts = sorted({milestone.values.batch_size // share for milestone in planned.milestones})
    numbers = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    sequences = "sequence" if planned.micro_batch_size == 1 else "sequences"
    table.add_row("micro-batches a step", f"{numbers} on each rank, of {planned.micro_batch_size} {sequences}")
    return table


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
    table = _table("Memory of a rank")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("")
    _add_parts(table, "held all the time", memory.held)
    _add_parts(table, "in a micro-batch", memory.micro_batch, "estimated")
    _add_parts(table, "at the end of a step", memory.step)
    table.add_row("peak", f"{memory.peak / GIB:.2f}", "the first and the larger of the others", style="bold")
    on_device = f"{(memory.peak + DEVICE_OVERHEAD) / GIB:.2f}"
    table.add_row("on a GPU, about", on_device, "with its driver and allocator", style="bold")
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
