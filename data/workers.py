"""Workers: numbered pieces of work spread over forked processes that never outlive their parent.

The standard pools hang when a worker is killed and leave orphans when the parent is. Here every worker has its own
pipe: the parent sees a worker die as the end of that pipe, and a worker sees its parent die the next time it reports.
"""

import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import cast

from data.errors import DataError

Report = Callable[[int], None]
Work = Callable[[int, Report], None]
_TICK_S = 0.5
_STOP_SIGNALS = signal.SIGINT, signal.SIGTERM


def run_work(make_work: Callable[[], Work], numbers: Sequence[int], processes: int, report: Report) -> None:
    """Calls `make_work()(number, report)` for every number, in up to `processes` processes, in no certain order.

    `make_work` runs once in each process. What the work reports is passed to `report` in this one, which is also called
    with 0 at least twice a second. Raises what the work
    raises, and DataError when a worker is killed; every worker has ended when this returns.
    """
    waiting = iter(numbers)
    workers: dict[Connection, ForkProcess] = {}
    try:
        for _ in range(min(processes, len(numbers))):
            ours, theirs = get_context("fork").Pipe()
            worker = get_context("fork").Process(target=_serve, args=(make_work, theirs, [*workers, ours]), daemon=True)
            with _held():
                worker.start()
                workers[ours] = worker
            theirs.close()
            _give(ours, waiting, workers)
        while workers:
            for ours in cast(list[Connection], connection.wait(list(workers), _TICK_S)):
                _take(ours, waiting, workers, report)
            report(0)
    finally:
        for ours, worker in workers.items():
            worker.kill()
            worker.join()
            ours.close()


@contextmanager
def _held() -> Iterator[None]:
    """Signals that ask for a stop come after the block, and to a process forked in it when it says so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take(ours: Connection, waiting: Iterator[int], workers: dict[Connection, ForkProcess], report: Report) -> None:
    """Receives one message: a number is progress, None asks for more work, an exception ends everything."""
    try:
        message = ours.recv()
    except (EOFError, ConnectionError):
        workers[ours].join()
        raise DataError(
            f"a worker process died (exit status {workers[ours].exitcode}), most likely for lack of memory; "
            "run the same command again to go on, with fewer --processes"
        ) from None
    if isinstance(message, BaseException):
        raise message
    if message is None:
        _give(ours, waiting, workers)
    else:
        report(message)


def _give(ours: Connection, waiting: Iterator[int], workers: dict[Connection, ForkProcess]) -> None:
    number = next(waiting, None)
    if number is not None:
        # A worker that cannot take it has said why, or died: the next receipt tells.
        with suppress(ConnectionError):
            ours.send(number)
        return
    worker = workers.pop(ours)
    ours.close()
    worker.join()


def _serve(make_work: Callable[[], Work], theirs: Connection, inherited: list[Connection]) -> None:
    # A copy of the parent's ends would keep the pipes open after its death.
    for ours in inherited:
        ours.close()
    # Sent to the whole process group, they are for the parent to answer.
    for each in _STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    try:
        work = make_work()
        while (number := _next_number(theirs)) is not None:
            work(number, theirs.send)
            theirs.send(None)
    except ConnectionError:
        return
    except Exception as error:
        if not isinstance(error, DataError | OSError):
            error.add_note("".join(traceback.format_exception(error)))
        theirs.send(error)


def _next_number(theirs: Connection) -> int | None:
    try:
        number: int = theirs.recv()
    except EOFError:
        return None
    return number
