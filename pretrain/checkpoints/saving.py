"""Saving while a run goes on: by a thread of each rank, all parts in parallel, with nothing but files between them.

    rank r    writes rank-r.safetensors, then leaves rank-r.part beside it: its entry and shapes, sealed
    rank 0    waits for the parts of all, then writes the manifest and gives the folder its name

A collective in a thread could meet another of the main thread's, so there is none. What fails for one rank, such as a
full disk, fails that save alone: what was written is removed, the older checkpoints stay, the run goes on. The main
threads agree on it before the next save, and at the end.

Saved in the background, the step waits only until its tensors are copied to memory of the host.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import DataError
from data.shards import read_sealed_json, sealed_json
from parallel.launch import gather_texts
from pretrain.checkpoints.checkpoint import CheckpointWriter, FileEntry, remove_old_checkpoints, step_folder
from pretrain.checkpoints.host_copies import HostCopies
from pretrain.checkpoints.tensor_files import write_small_file
from pretrain.errors import SharedError

_LOOK_EVERY_S = 0.05
_MOST_LOOKS = 1200


@dataclass(frozen=True)
class Snapshot:
    """What is saved: this rank's ranges by `kind/name@start`, the shapes of the whole parameters that some of them
    belong to, and what the manifest and the small files say, which only the first rank needs."""

    step: int
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    texts: Mapping[str, bytes]


@dataclass(frozen=True)
class News:
    """A line for the log; `step` is that of the checkpoint, if it tells how saving that ended."""

    line: str
    is_failure: bool = False
    step: int | None = None


class Saver:
    """Saves checkpoints of a run, one at a time. All ranks call `save` and `finish` at the same point.

    `failed` counts the saves that failed, as far as this rank knows. With `in_background`, `save` returns when the
    tensors are copied; without, when the checkpoint is there or has failed.
    """

    def __init__(
        self, run_folder: Path, *, rank: int, world_size: int, keep: int, keep_every: int, in_background: bool
    ) -> None:
        self._run_folder, self._rank, self._world_size = run_folder, rank, world_size
        self._keep, self._keep_every, self._in_background = keep, keep_every, in_background
        self._copies = HostCopies()
        self._job: _Job | None = None
        self._error = ""
        self._news: list[News] = []
        self.failed = 0

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Lets a thread take the memory for copies of such tensors, which would make the first save slow. For saves in
        the background only."""
        if self._in_background:
            self._copies.prepare(tensors)

    def save(self, step: int, make: Callable[[], Snapshot]) -> None:
        """Saves what `make` gives, after the save before has ended. A failure is counted and told, not raised."""
        self._settle()
        began = time.perf_counter()
        jobs: list[_Job] = []
        error = _first(gather_texts(_try(lambda: jobs.append(self._begin(step, make)))))
        if error:
            self._fail(step, error)
            return
        self._job = jobs[0]
        self._job.start()
        if not self._in_background and not self._settle():
            self._tell_saved(step, f"in {time.perf_counter() - began:.1f} s")

    def news(self) -> list[News]:
        """What happened since the last call. Waits for nothing."""
        job = self._job
        if job is not None and job.ended.is_set() and not job.is_told:
            if job.error:
                self._fail(job.snapshot.step, job.error)
                job.is_told = True
            elif self._rank == 0:
                self._tell_saved(job.snapshot.step, f"in {job.seconds:.1f} s in the background")
                job.is_told = True
        news, self._news = self._news, []
        return news

    def finish(self) -> None:
        """Waits for the last save. Raises SharedError if it failed."""
        self._settle()
        if self._error:
            raise SharedError(f"{self._error}; what was trained since the last good checkpoint is not saved")

    def _begin(self, step: int, make: Callable[[], Snapshot]) -> "_Job":
        writer = CheckpointWriter(step_folder(self._run_folder, step))
        if self._rank == 0:
            writer.begin()
        snapshot = make()
        if self._in_background:
            snapshot = replace(snapshot, tensors=self._copies.begin(snapshot.tensors))
            self._copies.wait()
        return _Job(writer, snapshot, rank=self._rank, world_size=self._world_size, after=self._remove_old)

    def _settle(self) -> str:
        """Waits until the pending save has ended on all ranks, and agrees with them on how: what went wrong."""
        job, self._job = self._job, None
        if job is None:
            return ""
        job.written.wait()
        error = _first(gather_texts(job.error))
        job.wake(cancel=bool(error))
        job.ended.wait()
        error = error or _first(gather_texts(job.error))
        if error and self._rank == 0:
            # By now no rank writes any more.
            job.writer.discard()
        if error and not (job.error and job.is_told):
            self._fail(job.snapshot.step, error)
        elif not error:
            self._error = ""
            if self._in_background and not job.is_told:
                self._tell_saved(job.snapshot.step, f"in {job.seconds:.1f} s in the background")
        return error

    def _fail(self, step: int, error: str) -> None:
        self.failed += 1
        self._error = f"the checkpoint of step {step:,} could not be saved: {error}"
        self._news.append(News(f"{self._error}; older ones stay", is_failure=True, step=step))

    def _tell_saved(self, step: int, how: str) -> None:
        self._news.append(News(f"saved step {step:,} {how}", step=step))

    def _remove_old(self) -> None:
        error = _try(lambda: remove_old_checkpoints(self._run_folder, self._keep, self._keep_every))
        if error:
            self._news.append(News(f"old checkpoints could not be removed: {error}", is_failure=True))


class _Job:
    """One save on one rank, in a thread of its own. `written` is set when this rank has written its part or failed,
    `ended` when nothing is left to do; `error` says why it failed."""

    def __init__(
        self,
        writer: CheckpointWriter,
        snapshot: Snapshot,
        *,
        rank: int,
        world_size: int,
        after: Callable[[], None],
    ) -> None:
        self.writer, self.snapshot = writer, snapshot
        self._rank, self._world_size, self._after = rank, world_size, after
        self.written, self.ended = threading.Event(), threading.Event()
        self._woken, self._cancelled = threading.Event(), False
        self.error = ""
        self.is_told = False
        self.seconds = 0.0

    def start(self) -> None:
        # A daemon: a process that ends because another was lost must not wait for its part.
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def wake(self, *, cancel: bool) -> None:
        """All ranks have written, or failed, which cancels the save."""
        self._cancelled = cancel
        self._woken.set()

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            self.error = _try(self._write_part)
            if self.error:
                self._leave_failure()
            self.written.set()
            if self._rank == 0:
                self.error = self.error or _try(self._commit)
                if self.error:
                    self.writer.discard()
                else:
                    self._after()
        finally:
            self.seconds = time.perf_counter() - began
            self.written.set()
            self.ended.set()

    def _write_part(self) -> None:
        files = self.writer.write_tensors(self._rank, self.snapshot.tensors)
        part = {"files": {name: asdict(entry) for name, entry in files.items()}, "shapes": dict(self.snapshot.shapes)}
        path = self._part_of(self._rank)
        write_small_file(path.with_suffix(".unfinished"), sealed_json(part))
        os.rename(path.with_suffix(".unfinished"), path)

    def _leave_failure(self) -> None:
        """Makes room at once, and lets the first rank know early, if that is possible."""
        for path in self.writer.partial.glob(f"rank-{self._rank:05d}.*"):
            _try(path.unlink)
        _try(lambda: self._part_of(self._rank).with_suffix(".failed").write_text(self.error, encoding="utf-8"))

    def _commit(self) -> None:
        files: dict[str, FileEntry] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(self._world_size):
            part = self._wait_for_part(rank)
            files |= {name: FileEntry(**entry) for name, entry in part["files"].items()}
            shapes |= {name: tuple(shape) for name, shape in part["shapes"].items()}
        for rank in range(self._world_size):
            self._part_of(rank).unlink()
        self.writer.commit(files=files, shapes=shapes, state=self.snapshot.state, texts=self.snapshot.texts)

    def _wait_for_part(self, rank: int) -> dict[str, Any]:
        path = self._part_of(rank)
        looks_left = _MOST_LOOKS
        while looks_left:
            if self._cancelled:
                raise OSError("another rank could not write its part")
            try:
                return read_sealed_json(path)
            except (FileNotFoundError, DataError):
                failure = path.with_suffix(".failed")
                if failure.exists():
                    raise OSError(f"rank {rank}: {failure.read_text(encoding='utf-8')}") from None
            if self._woken.wait(_LOOK_EVERY_S):
                # It is written, but this machine may see it later.
                time.sleep(_LOOK_EVERY_S)
                looks_left -= 1
        raise OSError(f"{path} does not appear, though it was written")

    def _part_of(self, rank: int) -> Path:
        return self.writer.partial / f"rank-{rank:05d}.part"


def _try(function: Callable[[], Any]) -> str:
    """Calls a function and returns what went wrong, if anything."""
    try:
        function()
    except Exception as error:
        return f"{error}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return ""


def _first(texts: list[str]) -> str:
    """What the first of the ranks that failed says."""
    return next((f"rank {rank}: {text}" if len(texts) > 1 else text for rank, text in enumerate(texts) if text), "")
