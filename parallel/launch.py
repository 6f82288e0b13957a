"""Where this process stands among the others, whoever started it: a plain `python`, torchrun or srun.

One process is the same code as many: it is a group of one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

JOIN_TIMEOUT = timedelta(minutes=10)
# The last resort: the heartbeat and the watchdog of a training find out sooner what is wrong.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class LaunchError(ValueError):
    """The environment describes no valid place among processes."""


@dataclass(frozen=True)
class Place:
    """This process: `rank` of `world_size`, `local_rank` of `node_size` (0: unknown) on its machine, and the device it
    computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    node_size: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0


def find_place(environment: Mapping[str, str] | None = None) -> Place:
    """Reads rank and world size as torchrun (RANK, ...) or srun (SLURM_PROCID, ...) set them; else a world of one."""
    environment = os.environ if environment is None else environment
    rank = _integer(environment, "RANK", "SLURM_PROCID")
    world_size = _integer(environment, "WORLD_SIZE", "SLURM_NTASKS", default=1)
    local_rank = _integer(environment, "LOCAL_RANK", "SLURM_LOCALID")
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK = {rank} must lie below WORLD_SIZE = {world_size}; start with torchrun or srun")
    node_size = _integer(environment, "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
    if not torch.cuda.is_available():
        return Place(rank, world_size, local_rank, torch.device("cpu"), node_size)
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"LOCAL_RANK = {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; "
            "lower --nproc-per-node"
        )
    return Place(rank, world_size, local_rank, torch.device("cuda", local_rank), node_size)


def join_processes(place: Place) -> None:
    """Forms the group of all processes: NCCL on GPUs, gloo on CPUs."""
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    backend = "gloo"
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
        keep_compiled_kernels()
        backend = "cpu:gloo,cuda:nccl"
    if place.world_size == 1:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=JOIN_TIMEOUT)
    elif "MASTER_ADDR" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        # torchrun keeps one store through its restarts: the addresses of ranks that are gone must not be found there.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=JOIN_TIMEOUT, store=store)
    else:
        raise LaunchError(
            f"MASTER_ADDR is not set, so {place.world_size} processes cannot find each other; start with torchrun, "
            "or export MASTER_ADDR and MASTER_PORT"
        )
    _set_pg_timeout(COLLECTIVE_TIMEOUT)


def keep_compiled_kernels() -> None:
    """Lets QuACK and FlashAttention 4 find on disk what they compiled before, which takes them half a minute. By
    default they keep it below the folder for temporary files, where others can write, or not at all; so it stays where
    there is no other folder to write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eva"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    os.environ.setdefault("QUACK_CACHE_DIR", str(folder / "experts"))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "attention"))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def leave_processes() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The element-wise sum over all processes, the same on each."""
    dist.all_reduce(values)
    return values


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """What each process, of a group or of all, says, in order of rank, known to all of them."""
    texts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return [said or "" for said in texts]


def _integer(environment: Mapping[str, str], *names: str, default: int = 0) -> int:
    for name in names:
        if name in environment:
            try:
                return int(environment[name])
            except ValueError:
                raise LaunchError(f"{name} = {environment[name]!r} must be a whole number") from None
    return default
