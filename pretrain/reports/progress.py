"""A bar on the terminal for what may take long, shown only when it does."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

# Nobody minds waiting so long without a word.
_PATIENCE_S = 2.0


@contextmanager
def slow_bar(what: str) -> Iterator[Callable[[float], None]]:
    """Gives a function that takes the share which is done. After some seconds a bar shows it on stderr, if that is a
    terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task, began = bar.add_task(what, total=1.0), time.monotonic()

    def tell(share: float) -> None:
        bar.update(task, completed=share)
        if sys.stderr.isatty() and not bar.live.is_started and time.monotonic() - began > _PATIENCE_S:
            bar.start()

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()
