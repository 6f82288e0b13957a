"""`pretrain watch RUN`: a run in the terminal, from another shell."""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pretrain.reports.facts import duration
from pretrain.reports.following import Follower, RunState, seconds_since
from pretrain.reports.run_record import Event
from pretrain.reports.series import as_number
from pretrain.units import short

_EVERY_S = 1.0
_PLOT_HEIGHT, _MOST_WIDTH = 8, 110
_NUM_EVENTS = 5
# A run that has written nothing for so long, and for so many of its steps, stands still, or has ended.
_QUIET_S, _QUIET_STEPS = 60.0, 20
_BAD = ("save_failed", "skip", "spike", "rollback", "unequal")
# The dots of a braille character [row, column], as bits.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def watch(folder: Path, *, once: bool) -> None:
    """Shows a run, anew each second until it is interrupted; one picture with `once`, or where there is no terminal.
    Raises UserError where there is no such folder."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console, follower = Console(), Follower(folder)
    try:
        if once or not console.is_terminal:
            console.print(draw(folder.name, follower.update(), console.width))
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(draw(folder.name, follower.update(), console.width), refresh=True)
                time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        pass
    finally:
        follower.close()


def draw(name: str, state: RunState, width: int) -> RenderableType:
    """A picture of a run, at most `width` characters wide."""
    inner = min(width, _MOST_WIDTH) - 4
    parts: list[RenderableType] = [_headline(state), _progress(state, inner), Text("")]
    if state.last:
        parts += [*_loss_plot(state, inner), Text(""), _numbers(state)]
    if state.events:
        parts += [Text(""), *_events(state.events[-_NUM_EVENTS:])]
    title = Text(_printable(name))
    return Panel(Group(*parts), title=title, title_align="left", box=box.ROUNDED, width=min(width, _MOST_WIDTH))


def plot(values: Sequence[float], width: int, height: int) -> list[str]:
    """Lines of characters of 2 × 4 dots, the least value at the bottom; neighbours that share a dot's column are all
    shown. NaN leaves a gap."""
    numbers = np.asarray(values, np.float64)
    known = np.flatnonzero(np.isfinite(numbers))
    cells = np.zeros((height, width), np.int64)
    if len(known):
        high = top_of_plot(values)
        numbers = np.minimum(numbers, high)
        low = numbers[known].min()
        columns = known * (2 * width - 1) // max(1, len(numbers) - 1)
        rows = ((high - numbers[known]) / max(high - low, 1e-12) * (4 * height - 1)).round().astype(int)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            cells[row // 4, column // 2] |= _DOTS[row % 4, column % 2]
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells.tolist()]


def top_of_plot(values: Sequence[float]) -> float:
    """The largest value that a plot shows: the start of a run, which would leave no room for the rest, is cut."""
    numbers = np.asarray(values, np.float64)
    late = numbers[len(numbers) // 10 :]
    late = late[np.isfinite(late)]
    known = late if len(late) else numbers[np.isfinite(numbers)]
    return float(known.max())


def _headline(state: RunState) -> Text:
    if not state.last:
        return Text("waiting for the first step", style="yellow")
    ago = seconds_since(state.written)
    kind = state.events[-1].kind if state.events else ""
    quiet = max(_QUIET_S, _QUIET_STEPS * _known(state.step_seconds))
    if kind in ("finish", "stop"):
        return Text({"finish": "finished", "stop": "stopped as asked"}[kind], style="green")
    unit, end = state.goal
    if state.number(unit) >= end:
        return Text("finished", style="green")
    if ago > quiet:
        return Text(f"no step for {duration(ago)}", style="bold red")
    return Text(f"last step {duration(ago)} ago", style="green")


def _progress(state: RunState, width: int) -> RenderableType:
    unit, end = state.goal
    done = state.number(unit)
    if not state.last or not math.isfinite(end) or end <= 0:
        return Text(f"step {_count(state.number('step'))}")
    left = state.seconds_left
    words = f" {_count(done)} of {_count(end)} {'steps' if unit == 'step' else 'tokens'}"
    words += f", {duration(left)} left" if math.isfinite(left) and done < end else ""
    bar = ProgressBar(total=end, completed=min(done, end), width=max(8, width - len(words) - 1))
    row = Table.grid()
    row.add_row(bar, Text(words))
    return row


def _loss_plot(state: RunState, width: int) -> Iterator[Text]:
    losses = [loss for _, loss in state.losses]
    if not any(map(math.isfinite, losses)):
        yield Text("no loss yet")
        return
    first, last = state.losses[0][0], state.losses[-1][0]
    yield Text(f"loss, from {short(first)} to {short(last)} tokens", style="bold")
    labels = [""] * _PLOT_HEIGHT
    labels[0] = f"{top_of_plot(losses):.3f} "
    labels[-1] = f"{min(filter(math.isfinite, losses)):.3f} "
    margin = max(map(len, labels))
    for label, line in zip(labels, plot(losses, max(8, width - margin), _PLOT_HEIGHT), strict=True):
        yield Text.assemble(label.rjust(margin), (line, "cyan"))


def _numbers(state: RunState) -> Table:
    table = Table.grid(padding=(0, 2))
    pairs = list(_pairs(state))
    for place in range(0, len(pairs), 3):
        cells = [Text.assemble((f"{name} ", "dim"), value) for name, value in pairs[place : place + 3]]
        table.add_row(*cells)
    return table


def _pairs(state: RunState) -> Iterator[tuple[str, str]]:
    yield "step", _count(state.number("step"))
    yield "tokens", short(state.number("tokens"))
    yield "loss", f"{state.number('lm_loss'):.4f}"
    yield "held out", f"{state.val_loss:.4f}"
    yield "lr", f"{state.number('lr'):.3g}"
    yield "gradient norm", f"{state.number('grad_norm'):.3g}"
    yield "tokens/s", short(state.tokens_per_second)
    yield "a step", f"{state.step_seconds:.3g} s"
    yield "MFU", f"{100 * state.number('mfu'):.1f} %" if math.isfinite(state.number("mfu")) else "unknown"
    yield "memory", f"{state.number('max_memory_gib'):.1f} GiB"
    yield "load violation", f"{state.number('load_max_violation'):.2f}{_worst_layer(state)}"
    yield "dead experts", f"{_count(state.number('dead_experts'))}{_dead_layers(state)}"
    if state.number("skipped") > 0:
        yield "skipped", _count(state.number("skipped"))


def _worst_layer(state: RunState) -> str:
    values = _of_layers(state, "max_violation")
    return f" (layer {max(values, key=lambda name: values[name])})" if values else ""


def _dead_layers(state: RunState) -> str:
    """The layers that have some, by the newest record of layers."""
    dead = [name for name, count in _of_layers(state, "dead_experts").items() if count > 0]
    more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
    return f" (layer{'s' * (len(dead) > 1)} {', '.join(dead[:3])}{more})" if dead else ""


def _of_layers(state: RunState, key: str) -> dict[str, float]:
    values = {name: as_number(row.get(key)) for name, row in state.moe.items() if isinstance(row, dict)}
    return {_printable(name): value for name, value in values.items() if math.isfinite(value)}


def _events(events: Sequence[Event]) -> Iterator[Text]:
    for event in events:
        words = _printable(" ".join(event.text.split()))[:300]
        style = "red" if event.kind in _BAD else ""
        line = Text.assemble((_clock(event.time), "dim"), " ", (f"{_printable(event.kind)[:20]:<11} {words}", style))
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds).astimezone():%H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return "--:--:--"


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else short(number) if math.isfinite(number) else "?"


def _known(number: float) -> float:
    return number if math.isfinite(number) else 0.0
