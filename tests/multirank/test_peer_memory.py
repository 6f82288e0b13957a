"""Whether ranks may share their GPUs' memory: all of them learn the same, whichever of them cannot."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_ranks
from torch import distributed as dist

from parallel import peer_memory
from parallel.peer_memory import find_obstacle

Seen = Mapping[str, Any]
"""What a rank finds: its `machine`, the `gpus` that are visible to it and which is its own, whether they reach one
another, whether there is a driver and which of its functions `fails`, and variables of the environment."""
SOUND: Seen = {"machine": "a", "gpus": "xy", "reach": True, "driver": True, "fails": "", "variables": {}}
FAILURE = "rank 1: CUDA's driver gives CUDA_ERROR_NOT_SUPPORTED where GPUs share memory"


class Driver:
    """Of a rank: `taken` are addresses that are allocated or open. A handle is the number of the rank."""

    CUipcMemHandle = SimpleNamespace

    def __init__(self, rank: int, fails: str) -> None:
        self.rank, self.fails, self.taken = rank, fails, list[int]()

    def _take(self, name: str, address: int) -> tuple[Any, int]:
        if self.fails == name:
            return SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED"), 0
        self.taken.append(address)
        return 0, address

    def cuMemAlloc(self, _: int) -> tuple[Any, int]:
        return self._take("cuMemAlloc", 100 + self.rank)

    def cuMemsetD8Async(self, *_: int) -> tuple[int]:
        return (0,)

    def cuIpcGetMemHandle(self, _: int) -> tuple[Any, Any]:
        if self.fails == "cuIpcGetMemHandle":
            return SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED"), None
        return 0, SimpleNamespace(reserved=bytes([self.rank]))

    def cuIpcOpenMemHandle(self, handle: SimpleNamespace, _: int) -> tuple[Any, int]:
        return self._take("cuIpcOpenMemHandle", 200 + handle.reserved[0])

    def cuIpcCloseMemHandle(self, address: int) -> tuple[int]:
        self.taken.remove(address)
        return (0,)

    cuMemFree = cuIpcCloseMemHandle


def ask(rank: int, ranks: list[Seen]) -> str:
    seen = ranks[rank]
    driver = Driver(rank, seen["fails"])
    patch = pytest.MonkeyPatch()
    patch.setattr(peer_memory, "node", lambda: seen["machine"])
    patch.setattr(torch.cuda, "device_count", lambda: len(seen["gpus"]))
    patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=seen["gpus"][index]))
    patch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: seen["reach"] and max(pair) < len(seen["gpus"]))
    patch.setattr(peer_memory, "driver", lambda: driver)
    patch.setattr(peer_memory, "_has_driver", lambda: seen["driver"])
    patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    for name, value in seen["variables"].items():
        patch.setenv(name, value)
    assert dist.group.WORLD is not None
    answer = find_obstacle(dist.group.WORLD, torch.device("cuda", seen.get("own", rank)))
    assert not driver.taken
    return answer


@pytest.mark.parametrize(
    ("of_last", "expected"),
    [
        ({}, ""),
        ({"own": 0}, ""),
        ({"machine": "b"}, "some of the ranks are on several machines, or in containers with processes of their own"),
        ({"gpus": "y", "own": 0}, "some GPUs of a machine are not visible to all of its ranks"),
        ({"gpus": "zy"}, "some GPUs of a machine are not visible to all of its ranks"),
        ({"reach": False}, "some GPUs do not reach one another"),
        ({"driver": False}, "the package cuda-bindings is missing"),
        ({"fails": "cuMemAlloc"}, FAILURE),
        ({"fails": "cuIpcGetMemHandle"}, FAILURE),
        ({"fails": "cuIpcOpenMemHandle"}, FAILURE),
        ({"variables": {"NCCL_P2P_DISABLE": "1"}}, "NCCL_P2P_DISABLE is 1"),
        ({"variables": {"NCCL_P2P_LEVEL": "LOC"}}, "NCCL_P2P_LEVEL is LOC"),
        ({"variables": {"NCCL_P2P_LEVEL": "NVL"}}, ""),
    ],
    ids=str,
)
def test_all_learn_the_same(tmp_path: Path, of_last: Seen, expected: str) -> None:
    assert run_ranks(2, ask, [SOUND, {**SOUND, **of_last}], folder=tmp_path) == [expected] * 2


def without_gpus(rank: int) -> str:
    assert dist.group.WORLD is not None
    return find_obstacle(dist.group.WORLD, torch.device("cpu"))


def test_nothing_is_shared_without_gpus(tmp_path: Path) -> None:
    assert run_ranks(2, without_gpus, folder=tmp_path) == ["there is no GPU"] * 2
