"""How long a save holds up a run: Eva with and without checksums, and in the background beside torch's async_save.

    python benchmarks/checkpoint_speed.py                       # 1 GB on /dev/shm, 7 rounds, about two minutes
    python benchmarks/checkpoint_speed.py --gigabytes 0.1 --rounds 3

One process saves the same fp32 tensors (weights and two moments of equal layers, 16 MB each) to the same folder in
memory, so that no disk is measured. Rounds are interleaved, so that a busy machine is busy for all; the table gives
medians.

    whole    until the checkpoint is complete
    stall    until training can go on: tensors may be changed

torch's async_save is measured as it comes, and with a `DefaultStager`, which keeps its copies from one save to the next
as Eva does. The first round, in which memory is taken, is not counted.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pretrain.checkpoints import tensor_files
from pretrain.checkpoints.saving import Saver, Snapshot

LAYER = (2048, 2048)


class Times(NamedTuple):
    """Seconds."""

    stall: float
    whole: float


def make_state(gigabytes: float) -> dict[str, Tensor]:
    """Weights and moments of so many layers."""
    layers = max(1, round(gigabytes * 1e9 / (3 * 4 * LAYER[0] * LAYER[1])))
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return {f"{kind}/{layer}.weight": torch.randn(LAYER) for layer in range(layers) for kind in kinds}


def no_checksum(_: object) -> str:
    """As long as a checksum, in no time."""
    return "0" * 32


class EvaSide:
    def __init__(self, state: dict[str, Tensor], folder: Path, *, in_background: bool, verified: bool = True) -> None:
        self._tensors = {f"{key}@0": tensor.view(-1) for key, tensor in state.items()}
        self._shapes = {key.partition("/")[2]: LAYER for key in state if key.startswith("param")}
        self._saver = Saver(folder, rank=0, world_size=1, keep=1, keep_every=0, in_background=in_background)
        self._verified = verified
        self._step = 0

    def save(self) -> Times:
        self._step += 1
        checksum = tensor_files.checksum
        if not self._verified:
            tensor_files.checksum = no_checksum
        try:
            began = time.perf_counter()
            self._saver.save(
                self._step, lambda: Snapshot(self._step, self._tensors, self._shapes, {}, {"config.toml": b""})
            )
            stall = time.perf_counter() - began
            self._saver.finish()
            return Times(stall, time.perf_counter() - began)
        finally:
            tensor_files.checksum = checksum


class TorchSide:
    def __init__(self, state: dict[str, Tensor], folder: Path, *, in_background: bool, keeps_copies: bool = False):
        self._state, self._folder, self._in_background = state, folder, in_background
        plain = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(plain) if keeps_copies else None
        self._step = 0

    def save(self) -> Times:
        self._step += 1
        path = self._folder / str(self._step)
        began = time.perf_counter()
        if not self._in_background:
            dcp.save(self._state, storage_writer=FileSystemWriter(path))
            stall = time.perf_counter() - began
        else:
            writer = FileSystemWriter(path)
            pending: Any = dcp.async_save(self._state, storage_writer=writer, async_stager=self._stager)
            stall = time.perf_counter() - began
            getattr(pending, "upload_completion", pending).result()
        times = Times(stall, time.perf_counter() - began)
        shutil.rmtree(path)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to save (default: /dev/shm)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    state = make_state(arguments.gigabytes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folders = iter(Path(name) / str(number) for number in range(9))
        sides: dict[str, Callable[[], Times]] = {
            "Eva": EvaSide(state, next(folders), in_background=False).save,
            "Eva without checksums": EvaSide(state, next(folders), in_background=False, verified=False).save,
            "torch save": TorchSide(state, next(folders), in_background=False).save,
            "Eva in the background": EvaSide(state, next(folders), in_background=True).save,
            "torch async_save": TorchSide(state, next(folders), in_background=True).save,
            "torch async_save, copies kept": TorchSide(
                state, next(folders), in_background=True, keeps_copies=True
            ).save,
        }
        times: dict[str, list[Times]] = {side: [] for side in sides}
        for number in range(arguments.rounds + 1):
            for side, save in sides.items():
                taken = save()
                if number:
                    times[side].append(taken)
    size = sum(tensor.nbytes for tensor in state.values()) / 1e9
    print(f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}, {size:.2f} GB in ", end="")
    print(f"{arguments.folder}, {os.cpu_count()} cores, medians of {arguments.rounds} (fastest to slowest)\n")
    print("| save | stall, s | whole, s |\n|---|---|---|")
    middle = {}
    for side, taken in times.items():
        stalls, wholes = ([item[place] for item in taken] for place in (0, 1))
        middle[side] = Times(median(stalls), median(wholes))
        cells = (f"{median(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in (stalls, wholes))
        print(f"| {side} | {' | '.join(cells)} |")
    ratio = median(a.whole / b.whole for a, b in zip(times["Eva"], times["Eva without checksums"], strict=True))
    print(f"\nwith checksums / without: {middle['Eva'].whole / middle['Eva without checksums'].whole:.2f}", end="")
    print(f" (median of the rounds' ratios: {ratio:.2f})")
    for side in ("torch async_save", "torch async_save, copies kept"):
        print(f"stall / that of {side}: {middle['Eva in the background'].stall / middle[side].stall:.2f}")


if __name__ == "__main__":
    main()
