"""Memory of GPUs that the other processes of their node can read and write, shared as CUDA's processes share memory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from platform import node
from typing import Any

import torch
from torch import distributed as dist

from parallel.launch import gather_texts

GRANULE = 1 << 21
"""Bytes. What is shared is a multiple of it: of less the driver puts several into what it allocates, and shares all."""
_OPEN_TO_PEERS = 1


class PeerMemory:
    """`num_bytes` zeros, or a few more, in the memory of each rank of a group whose GPUs reach one another: those of
    each at one of the `addresses`. All ranks must make it; and `close` it, each when nothing that it has launched
    uses it any more. It is not of torch's allocator. Raises RuntimeError, on all ranks, where one of them cannot."""

    def __init__(self, num_bytes: int, group: dist.ProcessGroup) -> None:
        self.num_bytes = -(-num_bytes // GRANULE) * GRANULE
        self.addresses: list[int] = []
        self._group, self._place, self._own, self._handle = group, dist.get_rank(group), 0, ""
        with _failing_together(group):
            self._allocate()
        handles = gather_texts(self._handle, group)
        with _failing_together(group):
            for member, handle in enumerate(handles):
                self.addresses.append(self._own if member == self._place else _open(handle))

    def _allocate(self) -> None:
        self._own = int(done(driver().cuMemAlloc(self.num_bytes)))
        stream = torch.cuda.current_stream()
        done(driver().cuMemsetD8Async(self._own, 0, self.num_bytes, stream.cuda_stream))
        stream.synchronize()
        self._handle = done(driver().cuIpcGetMemHandle(self._own)).reserved.hex()

    def close(self) -> None:
        """Gives it back, after all ranks have let go of it."""
        self._let_go()
        gather_texts("", self._group)
        self._free()

    def __del__(self) -> None:
        # What a run that failed has not closed.
        try:
            self._let_go()
        finally:
            self._free()

    def _let_go(self) -> None:
        for address in self.addresses:
            if address != self._own:
                done(driver().cuIpcCloseMemHandle(address))
        self.addresses = []

    def _free(self) -> None:
        if self._own:
            done(driver().cuMemFree(self._own))
        self._own = 0


def find_obstacle(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why the ranks of a group cannot share memory: "" if they can, as those of one machine do whose GPUs reach one
    another. All of them must ask, and learn the same."""
    if device.type != "cuda":
        return "there is no GPU"
    machines, gpus = gather_texts(_name_of_machine(), group), gather_texts(_name_of_gpu(device.index), group)
    if problem := next(filter(None, gather_texts(_what_prevents(machines, gpus, device), group)), ""):
        return problem
    try:
        memory = PeerMemory(GRANULE, group)
    except RuntimeError as error:
        return str(error)
    memory.close()
    return ""


def driver() -> Any:
    """CUDA's driver, of which torch offers no more than it needs itself; torch for CUDA brings it."""
    from cuda.bindings import driver

    return driver


def done(result: tuple[Any, ...]) -> Any:
    """What the driver gave. Raises RuntimeError where it failed."""
    error, *values = result
    if error != 0:
        raise RuntimeError(f"CUDA's driver gives {error.name} where GPUs share memory")
    return values[0] if values else None


def _open(handle: str) -> int:
    shared = driver().CUipcMemHandle()
    shared.reserved = bytes.fromhex(handle)
    return int(done(driver().cuIpcOpenMemHandle(shared, _OPEN_TO_PEERS)))


def _name_of_machine() -> str:
    """Or of the container, where processes of others share no memory with those of this one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    spaces = [Path("/proc/self/ns", name) for name in ("ipc", "pid")]
    started = boot.read_text().strip() if boot.is_file() else ""
    return " ".join((node(), started, *(os.readlink(space) for space in spaces if space.exists())))


def _what_prevents(machines: Sequence[str], gpus: Sequence[str], device: torch.device) -> str:
    """Why this process cannot, or may not, reach these GPUs of ranks on these machines."""
    for name, values in (("NCCL_P2P_DISABLE", ("1",)), ("NCCL_P2P_LEVEL", ("LOC", "0"))):
        # So is said where drivers only think that GPUs reach one another.
        if os.environ.get(name) in values:
            return f"{name} is {os.environ[name]}"
    if not _has_driver():
        return "the package cuda-bindings is missing"
    if len(set(machines)) > 1:
        return "some of the ranks are on several machines, or in containers with processes of their own"
    visible = {_name_of_gpu(index): index for index in range(torch.cuda.device_count())}
    for gpu in gpus:
        if gpu not in visible:
            return "some GPUs of a machine are not visible to all of its ranks"
        if visible[gpu] != device.index and not torch.cuda.can_device_access_peer(device.index, visible[gpu]):
            return "some GPUs do not reach one another"
    return ""


def _name_of_gpu(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _has_driver() -> bool:
    try:
        driver()
    except ImportError:
        return False
    return True


@contextmanager
def _failing_together(group: dist.ProcessGroup) -> Iterator[None]:
    """What goes wrong on one rank goes wrong on all, so that none waits for another in vain."""
    problem = ""
    try:
        yield
    except RuntimeError as error:
        problem = f"rank {dist.get_rank()}: {error}"
    if problems := [said for said in gather_texts(problem, group) if said]:
        raise RuntimeError(problems[0])
