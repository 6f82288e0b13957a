"""Names the rank that was lost, on all the others, so that none waits for it in vain.

A collective says at best that some connection closed; where the peer is frozen, or with NCCL, it may say nothing and
wait. So a thread of every rank beats in the store through which the processes met, and watches the beats of the next
few ranks. What it finds it writes where all read it. Silence is counted in the watcher's own rounds, never by comparing
clocks: a watcher that was suspended itself accuses nobody. The threads beat while the main thread computes, so a long
step is no silence; only code that keeps Python's lock for `Pace.limit` seconds would be.

Traffic is constant per rank: each round writes one key and reads a few, on a connection of its own.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from torch import distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from parallel.launch import Place

LOST_RANK_STATUS = 76
# More than the ranks of a usual machine: when a whole one is lost, the rank before it names them all at once.
NUM_WATCHED = 9
ENDED = "ended"
REMEDY = "the run cannot go on without it; the same command resumes it from its newest checkpoint"


class LostRankError(RuntimeError):
    """A rank stopped answering, or failed; the message names it."""


@dataclass(frozen=True)
class Pace:
    """A beat every `interval` seconds; a rank is lost after `limit` seconds without one. All others have ended at most
    seven intervals later: two until it is written down, two until all have read it, three for the guard."""

    interval: float = 1.0
    limit: float = 18.0


@contextmanager
def watch_ranks(
    place: Place, pace: Pace | None = None, before_end: Callable[[str], None] = lambda verdict: None
) -> Iterator[None]:
    """While the block runs, the loss of any rank ends it on all others: with LostRankError where the block fails
    because of it, else by ending the process with LOST_RANK_STATUS, after `before_end` has heard why. A block that ends
    well waits for those of the others. Processes must have been joined through a TCPStore."""
    if place.world_size == 1:
        yield
        return
    heartbeat = _Heartbeat(place, pace or Pace(), before_end)
    try:
        yield
    except BaseException as error:
        heartbeat.fail(error)
        raise
    else:
        heartbeat.finish()
    finally:
        heartbeat.stop()


def end_process(message: object, rank: int) -> NoReturn:
    """Ends this process at once: leaving the group in order would wait for the lost rank."""
    sys.stdout.flush()
    print(f"pretrain: rank {rank}: {message}", file=sys.stderr, flush=True)
    os._exit(LOST_RANK_STATUS)


class Silence:
    """For how long a value has not changed, as far as this process was awake to see it."""

    def __init__(self, most_per_look: float) -> None:
        self._most_per_look = most_per_look
        self._value: object = None
        self._looked = time.monotonic()
        self.seconds = 0.0

    def look(self, value: object) -> float:
        now = time.monotonic()
        passed = min(now - self._looked, self._most_per_look)
        self.seconds = self.seconds + passed if value == self._value else 0.0
        self._value, self._looked = value, now
        return self.seconds


class _Heartbeat:
    """Two threads: the pulse talks with the store; the guard ends the process even while the pulse waits for a store
    that is frozen and the main thread for a collective."""

    def __init__(self, place: Place, pace: Pace, before_end: Callable[[str], None]) -> None:
        self._rank, self._num_ranks, self._pace = place.rank, place.world_size, pace
        self._before_end = before_end
        store = _get_default_store().clone()  # type: ignore[attr-defined]
        # A group may watch more than one block, one after another; what was said about the last must not count again.
        number = store.add(f"heartbeat/blocks of rank {place.rank}", 1)
        self._store = dist.PrefixStore(f"heartbeat/{number}", store)
        # torchrun keeps the store itself; else the process of rank 0 does.
        self._keeps_store = place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        steps = range(1, min(NUM_WATCHED + 1, place.world_size))
        self._watched = {(place.rank + step) % place.world_size: Silence(2 * pace.interval) for step in steps}
        self._name = f"pid {os.getpid()} on {socket.gethostname()}"
        self._rounds = 0
        self._found: list[str] = []
        self._last_words = ""
        self._wake, self._ending, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._all_ended, self._decided, self._said = threading.Event(), threading.Event(), threading.Event()
        self._verdict = ""
        for target in (self._pulse, self._guard):
            threading.Thread(target=target, name=f"heartbeat-{target.__name__}", daemon=True).start()

    def finish(self) -> None:
        """Waits until the blocks of all ranks have ended. Raises LostRankError if one is lost meanwhile."""
        self._ending.set()
        self._wake.set()
        while not self._all_ended.wait(self._pace.interval / 4):
            if self._decided.is_set():
                self._raise_verdict(None)
        if self._keeps_store:
            # Others still ask for the last end; torch complains at length of a store that is gone.
            time.sleep(self._pace.interval)

    def fail(self, error: BaseException) -> None:
        """Raises LostRankError if the loss of a rank explains `error`; else tells the others that this rank failed."""
        if _is_of_communication(error):
            if self._decided.wait(self._pace.limit + 7 * self._pace.interval):
                self._raise_verdict(error)
            error.add_note("all ranks answer one another; this is no loss of a rank")
        lines = str(error).splitlines()
        self._last_words = f"rank {self._rank} ({self._name}) failed with {type(error).__name__}: {''.join(lines[:1])}"
        self._wake.set()
        self._said.wait(2 * self._pace.interval)
        self._let_others_read()

    def stop(self) -> None:
        self._stopped.set()
        self._wake.set()

    def _raise_verdict(self, error: BaseException | None) -> NoReturn:
        self._let_others_read()
        raise LostRankError(self._verdict) from error

    def _let_others_read(self) -> None:
        if self._keeps_store:
            time.sleep(2 * self._pace.interval)

    def _pulse(self) -> None:
        keys = [*(f"beat/{rank}" for rank in self._watched), "lost"]
        has_begun = has_ended = False
        while not self._stopped.is_set():
            try:
                if not has_begun:
                    for key in keys:
                        # Creates what is not there yet: reading would wait for it.
                        self._append(key, "")
                    has_begun = True
                self._exchange(keys)
                if self._ending.is_set():
                    count, has_ended = 0 if has_ended else 1, True
                    if self._store.add(ENDED, count) == self._num_ranks:
                        self._all_ended.set()
                self._rounds += 1
            except RuntimeError:
                # Whoever keeps the store leaves after all have ended. Before that, the guard counts the silence.
                if has_ended:
                    self._all_ended.set()
            self._wake.wait(self._pace.interval / 4 if has_ended else self._pace.interval)
            self._wake.clear()

    def _exchange(self, keys: list[str]) -> None:
        beat = ENDED if self._ending.is_set() else f"{self._name}|{self._rounds}"
        self._store.set(f"beat/{self._rank}", beat)
        *beats, lost = (value.decode() for value in self._store.multi_get(keys))
        if lost:
            # Those found a round ago, and those that others have found since.
            if self._found:
                self._decide("; ".join(_first_of_each_rank(lost.splitlines())))
            self._found = lost.splitlines()
        last_words = self._last_words
        findings = [last_words] if last_words else []
        # Ranks are often lost together: half the limit is enough for who comes after the first.
        limit = self._pace.limit / 2 if lost else self._pace.limit
        for (rank, silence), value in zip(self._watched.items(), beats, strict=True):
            if silence.look(value) >= limit and value != ENDED:
                name = value.partition("|")[0] or "never seen"
                findings.append(f"rank {rank} ({name}) has not answered for {limit:g} s")
        for finding in findings:
            if finding not in self._found:
                self._append("lost", f"{finding}\n")
        if last_words:
            self._said.set()

    def _append(self, key: str, value: str) -> None:
        self._store.append(key, value)  # type: ignore[attr-defined]

    def _guard(self) -> None:
        silence = Silence(self._pace.interval)
        told = 0.0
        while not self._stopped.wait(self._pace.interval / 2):
            if silence.look(self._rounds) >= self._pace.limit:
                self._decide(self._describe_store())
            if self._decided.is_set():
                told += self._pace.interval / 2
            # By then the main thread would have ended, if it could. One that failed by itself has more to say.
            if told >= 3 * self._pace.interval and not self._last_words:
                self._before_end(self._verdict)
                end_process(self._verdict, self._rank)

    def _describe_store(self) -> str:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = "torchrun" if is_agents else "rank 0"
        return f"{keeper} at {address}, which keeps the store of the run, has not answered for {self._pace.limit:g} s"

    def _decide(self, finding: str) -> None:
        if not self._decided.is_set():
            self._verdict = f"{finding}; {REMEDY}"
            self._decided.set()


def _first_of_each_rank(findings: Sequence[str]) -> list[str]:
    """What was found first of each rank: "rank 3 (pid 7 on host) ..."."""
    first: dict[str, str] = {}
    for finding in findings:
        first.setdefault(finding.partition(")")[0], finding)
    return list(first.values())


def _is_of_communication(error: BaseException) -> bool:
    """Whether a collective failed: gloo's errors are known by the file that they name."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
