"""The peak that a plan gives is the peak of a real step, counted: every storage that is alive after each operator."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROJECT, run_ranks, write_dataset
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.loader import BatchLoader
from parallel.launch import Place
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.config import Config, load_config
from pretrain.loop import plan_batches
from pretrain.planning.footprint import memories_of
from pretrain.state import first_state
from pretrain.step import train_step


class Alive(TorchDispatchMode):
    """The bytes of all storages that operators touched and that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        gone = [key for key, (ref, _) in self._alive.items() if ref.expired()]
        for key in gone:
            del self._alive[key]
        self.peak = max(self.peak, self.now())
        return out

    def see(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor from now on, but not of those without memory that dry runs left behind."""
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def now(self) -> int:
        """Bytes alive."""
        return sum(size for _, size in self._alive.values())


def see_all(alive: Alive) -> None:
    """Counts what is there already."""
    gc.collect()
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):
            alive.see(item)
            if item.is_leaf and item.grad is not None:
                alive.see(item.grad)


def measure_peak(rank: int, config: Config) -> float:
    """Of the second step: the first makes what stays."""
    before = Alive()
    see_all(before)
    place = Place(rank, 1, rank, torch.device("cpu"))
    run = assemble(config, place, open_data(config))
    state = first_state(run)
    with BatchLoader(
        run.stream, plan_batches(run.timeline, run.stream, state, config.train), dp_rank=0, dp_size=1
    ) as batches:
        take_step(run, next(batches))
        batch = next(batches)
        alive = Alive()
        see_all(alive)
        with alive:
            take_step(run, batch)
    return alive.peak - before.now()


def take_step(run: Assembly, batch: Any) -> None:
    train_step(run, batch, run.timeline.at(0), stop_requested=False)


# Of the shipped shapes, what two cores can do in seconds: all widths of small.toml, but fewer layers and experts, a
# smaller vocabulary and shorter sequences.
LESS = ("model.num_hidden_layers=3", "model.n_routed_experts=8", "model.vocab_size=4096", "train.seq_len=512")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny", ()),
        ("tiny", ("parallel.zero_stage=0",)),
        ("tiny", ("parallel.zero_stage=0", 'parallel.recompute=["norms", "mla_up", "swiglu", "expert_rows"]')),
        ("tiny", ('parallel.recompute=["block"]', "precision.dtype=bf16")),
        ("tiny", ("parallel.zero_stage=3", "precision.dtype=bf16")),
        ("small", (*LESS, "train.micro_batch_size=2", "train.batch_size=2")),
    ],
)
def test_the_peak_of_a_step(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    load_deepspeed()
    write_dataset(tmp_path / "data", documents=2000)
    config = load_config(
        PROJECT / "configs" / f"{name}.toml", [f'data.datasets=[{{path="{tmp_path}/data"}}]', *overrides]
    )
    (measured,) = run_ranks(1, measure_peak, config, folder=tmp_path)
    planned = max(memory.peak for memory in memories_of(config, 1, "cpu"))
    assert planned == pytest.approx(measured, rel=0.05), planned / measured


def test_what_is_freed_is_not_counted() -> None:
    alive = Alive()
    with alive:
        kept = torch.ones(1000)
        for _ in range(5):
            torch.ones(2000)
        probe = torch.ones(1)
        assert alive.now() == 4000 + 4
        view = kept[1:]
        del kept
        probe.add_(1)
        assert alive.now() == 4000 + 4
        del view
        probe.add_(1)
    assert alive.now() == 4
    # While the second of the 2000 is made, the first is gone.
    assert alive.peak == 4000 + 8000
