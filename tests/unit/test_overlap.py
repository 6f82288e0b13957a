"""What `benchmarks/overlap.py` reads from a trace: how much of an exchange lies under compute, whoever carries it."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import PROJECT

COMPUTE, NCCL, COPIES, HOST = 7, 20, 24, 1


@pytest.fixture(scope="module")
def overlap() -> ModuleType:
    found = importlib.util.spec_from_file_location("overlap", PROJECT / "benchmarks" / "overlap.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["overlap"] = module
    found.loader.exec_module(module)
    return module


def on_device(category: str, name: str, stream: int, begin: float, end: float) -> list[dict[str, Any]]:
    """An event of the device and its launch, at the same moment."""
    number = hash((name, stream, begin))
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "launch", "tid": HOST, "ts": begin, "dur": 0.1}
    run = {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin}
    return [launch | {"args": {"correlation": number}}, run | {"args": {"correlation": number, "stream": stream}}]


@pytest.mark.parametrize(
    ("category", "name", "stream", "kind"),
    [
        ("kernel", "ncclDevKernel_SendRecv(args)", NCCL, "all-to-all"),
        ("kernel", "ncclDevKernel_AllReduce(args)", NCCL, "other transfer"),
        ("gpu_memcpy", "Memcpy PtoP (Device -> Device)", COPIES, "all-to-all"),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", COPIES, "all-to-all"),
        ("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", COPIES, "other transfer"),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", COMPUTE, "forward"),
    ],
)
def test_a_quarter_under_compute(
    overlap: ModuleType, tmp_path: Path, category: str, name: str, stream: int, kind: str
) -> None:
    mark = {"ph": "X", "cat": "user_annotation", "name": overlap.PAIR, "tid": HOST, "ts": 0.0, "dur": 100.0}
    events = [
        mark,
        *on_device("kernel", "gemm", COMPUTE, 0, 20),
        *on_device(category, name, stream, 18, 26),
        *on_device("kernel", "gemm", COMPUTE, 30, 40),
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    kernels = overlap.read_trace(file)
    assert [each.kind for each in kernels] == ["forward", kind, "forward"]
    found = overlap.measure_overlap(kernels)
    assert found.phase == 40
    if kind == "all-to-all":
        assert (found.exchange, found.hidden, found.share) == (8, 2, 0.25)
    else:
        assert found.exchange == 0
