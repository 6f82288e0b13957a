"""A progress bar that shows itself only on a terminal, and only when the work takes longer than two seconds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE_S = 2.0


@contextmanager
def progress(description: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on stderr over `total` bytes, `done` of them behind us; gives the function that adds to it.

    Nothing is drawn, and no thread started, before that function is called for the first time after two seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=total, completed=done)
    shows_from = time.monotonic() + _PATIENCE_S

    def report(amount: int) -> None:
        bar.advance(task, amount)
        if not bar.live.is_started and time.monotonic() > shows_from:
            bar.start()

    try:
        yield report
    finally:
        bar.stop()
