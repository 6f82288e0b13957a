"""Damaged checkpoints: what Eva, torch's distributed checkpoint and DeepSpeed's own format do with the same faults.

    python benchmarks/checkpoint_faults.py                 # about two minutes
    python benchmarks/checkpoint_faults.py --faults 70

The same tensors are saved in each format, twice, as an older and a newer step. Then, again and again, one file of a
copy of the newer one is damaged (tests/file_faults.py), and the copy is loaded the usual way. A fault counts as

    refused, named      an error whose message names the file that was damaged
    refused             another error
    loaded, as saved    no error, and every value is right: the fault hit bytes that nothing depends on
    loaded, wrong       no error, and values differ from those that were saved

and whatever happens, code of the file's own may have been run. Loading that takes longer than 20 s, or more than 4 GB
of memory, counts as refused.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

from file_faults import KINDS, damage  # noqa: E402

from parallel.zero import load_deepspeed  # noqa: E402
from pretrain.checkpoints.checkpoint import CheckpointReader, CheckpointWriter, step_folder  # noqa: E402

OUTCOMES = ("refused, named", "refused", "loaded, as saved", "loaded, wrong")
LONGEST_S = 20
MOST_BYTES = 4 << 30
STEPS = (10, 20)


class Format(Protocol):
    """Saves the tensors of a step below a folder, and loads those of the newer one from what `save` made."""

    name: str

    def save(self, folder: Path, step: int) -> Path:
        """Returns the folder of files."""

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Raises what the format raises."""


def tensors(step: int) -> dict[str, Tensor]:
    """A small state of two layers with Adam's moments, other values at each step."""
    torch.manual_seed(step)
    return {
        f"{kind}/{layer}.weight": torch.randn(64, 64) for kind in ("param", "exp_avg", "exp_avg_sq") for layer in "01"
    }


class EvaFormat:
    name = "Eva"

    def save(self, folder: Path, step: int) -> Path:
        writer = CheckpointWriter(step_folder(folder, step))
        writer.begin()
        files = writer.write_tensors(0, {f"{key}@0": tensor.flatten() for key, tensor in tensors(step).items()})
        shapes = {"0.weight": (64, 64), "1.weight": (64, 64)}
        config = f"[train]\nsteps = {step}\n".encode()
        writer.commit(files=files, shapes=shapes, state={"step": step}, texts={"config.toml": config})
        return writer.folder

    def load(self, folder: Path) -> dict[str, Tensor]:
        reader = CheckpointReader(folder)
        reader.verify()
        loaded = {key: reader.tensor(key) for key in tensors(STEPS[1])}
        return {key: tensor.view(64, 64) for key, tensor in loaded.items() if tensor is not None}


class TorchFormat:
    name = f"torch DCP {torch.__version__.partition('+')[0]}"

    def save(self, folder: Path, step: int) -> Path:
        dcp.save(tensors(step), checkpoint_id=folder / f"step-{step}", no_dist=True)
        return folder / f"step-{step}"

    def load(self, folder: Path) -> dict[str, Tensor]:
        state = {key: torch.zeros_like(tensor) for key, tensor in tensors(STEPS[1]).items()}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        return state


class DeepSpeedFormat:
    name = f"DeepSpeed {version('deepspeed')}"

    def __init__(self) -> None:
        deepspeed = load_deepspeed()
        logging.disable(logging.WARNING)
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        self._engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
        self._train(1)

    def _train(self, seed: int) -> None:
        torch.manual_seed(seed)
        loss = self._engine(torch.randn(1, 64)).sum()
        self._engine.backward(loss)
        self._engine.step()

    def _state(self) -> dict[str, Tensor]:
        """The live optimizer, which holds the masters."""
        optimizer = self._engine.optimizer
        flat = optimizer.single_partition_of_fp32_groups[0]
        moments = optimizer.optimizer.state[flat]
        return {"param": flat.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}

    def save(self, folder: Path, step: int) -> Path:
        self._train(step)
        # The same tag, so that files of the two steps have the same names.
        self._engine.save_checkpoint(str(folder / str(step)), tag="newest", client_state={"step": step})
        self.saved = {key: tensor.clone() for key, tensor in self._state().items()}
        return folder / str(step)

    def load(self, folder: Path) -> dict[str, Tensor]:
        for tensor in self._state().values():
            # What is not loaded must not look right because it was there.
            tensor.zero_()
        path, _ = self._engine.load_checkpoint(str(folder))
        if path is None:
            raise FileNotFoundError("load_checkpoint found nothing to load")
        return self._state()


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes too long, and keeps quiet what is printed meanwhile."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def limit_memory() -> None:
    """Damaged sizes make some readers ask for more memory than any machine has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def outcome(side: Format, folder: Path, damaged: Path, expected: dict[str, Tensor]) -> str:
    """What a format does with a damaged copy."""
    try:
        with limited():
            loaded = side.load(folder)
    except (Exception, CheckpointException) as error:
        chain: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            chain.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        return "refused, named" if damaged.name in " ".join(chain) else "refused"
    right = loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)
    return "loaded, as saved" if right else "loaded, wrong"


def try_faults(side: Format, folder: Path, count: int) -> tuple[dict[str, dict[str, int]], int]:
    """Of each kind of fault, how often each outcome; and how often code of a file's own was run."""
    with limited():
        older, newer = (side.save(folder / "saved", step) for step in STEPS)
    expected = getattr(side, "saved", None) or tensors(STEPS[1])
    canary, copy, choose = folder / "canary", folder / "copy" / newer.name, random.Random(0)
    table = {kind: dict.fromkeys(OUTCOMES, 0) for kind in KINDS}
    runs = 0
    for number in range(count):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(newer, copy)
        kind = KINDS[number % len(KINDS)]
        damaged = damage(kind, copy, older, canary, choose)
        table[kind][outcome(side, copy, damaged, expected)] += 1
        runs += canary.exists()
        canary.unlink(missing_ok=True)
    return table, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=500, metavar="N", help="faults for each format (default: 500)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("LOCAL_RANK", "0")
    torch.set_num_threads(1)
    makers: tuple[Callable[[], Any], ...] = (EvaFormat, TorchFormat, DeepSpeedFormat)
    print(f"{date.today()}, Python {platform.python_version()}, {arguments.faults} faults for each format\n")
    print("| format | fault | " + " | ".join(OUTCOMES) + " | code run |")
    print("|---|---" + "|---" * len(OUTCOMES) + "|---|")
    for maker in makers:
        if maker is DeepSpeedFormat:
            load_deepspeed()
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
        with limited():
            side: Format = maker()
        with tempfile.TemporaryDirectory() as folder:
            limit_memory()
            table, runs = try_faults(side, Path(folder), arguments.faults)
        for kind, counts in table.items():
            print(f"| {side.name} | {kind} | " + " | ".join(str(counts[name]) for name in OUTCOMES) + " | |")
        totals = [sum(counts[name] for counts in table.values()) for name in OUTCOMES]
        print(f"| **{side.name}** | **all** | " + " | ".join(f"**{total}**" for total in totals) + f" | **{runs}** |")


if __name__ == "__main__":
    main()
