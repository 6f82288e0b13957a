"""How every side of step_speed.py is run: whole optimizer steps on the same tokens, at growing batches until memory is
full. A side's script gets its request as JSON and adds lines of JSON to the file named there."""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from data.loader import Batch, BatchLoader, BatchSpec
from data.stream import SampleStream
from pretrain.assemble import open_data
from pretrain.config import Config, load_config

BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
LEARNING_RATE = 3e-4
BIAS_UPDATE_SPEED = 1e-3


@dataclass(frozen=True)
class Request:
    """What to measure: a configuration with its overrides, batches in sequences, `settings` that only the side knows,
    and the file for results. `profiled` asks for one more step of each batch under the profiler."""

    config: str
    overrides: list[str]
    batches: list[int]
    warm_up: int
    steps: int
    settings: dict[str, Any]
    out: str
    profiled: bool


class Side(Protocol):
    """A model with its optimizer. `notes` says how it was set."""

    num_parameters: int
    versions: dict[str, str]
    notes: str

    def step(self, batch: Batch) -> float | Tensor:
        """One optimizer step over all sequences of the batch at once; gives the mean loss before it."""


class MasterAdamW:
    """Mixed precision for sides that have no optimizer for it: bf16 weights and gradients, fp32 masters and moments in
    torch's fused AdamW, clipping of the global norm. The cheapest arrangement that keeps masters."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = [nn.Parameter(weight.detach().float().clone()) for weight in self._weights]
        for weight in self._weights:
            weight.data = weight.data.bfloat16()
        groups = [
            {"params": [master for master in self._masters if master.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [master for master in self._masters if master.dim() == 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Takes the gradients away and updates the weights."""
        gradients = [weight.grad for weight in self._weights if weight.grad is not None]
        scale = (CLIP / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is not None:
                master.grad = torch.mul(weight.grad, scale, out=torch.empty_like(master))
                weight.grad = None
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        torch._foreach_copy_(list[Tensor](self._weights), list[Tensor](self._masters))


def device() -> torch.device:
    """The first GPU, or the CPU, which is for dry runs."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def count(parameters: Iterator[nn.Parameter]) -> int:
    """Numbers in parameters."""
    return sum(parameter.numel() for parameter in parameters)


def inputs_and_labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """Tokens and the ones after them, int64 [B, S], on the device."""
    tokens = batch.tokens.to(device(), non_blocking=True).long()
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def run(make_side: Callable[[Config, Request], Side]) -> None:
    """Does what the request in the command line says."""
    request = Request(**json.loads(sys.argv[1]))
    config = load_config(Path(request.config), request.overrides)
    stream = open_data(config)
    side = make_side(config, request)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__} | side.versions
    _write(request, {"parameters": side.num_parameters, "versions": versions, "notes": side.notes, "device": name})
    for batch_size in request.batches:
        try:
            result = _measure(side, stream, config.train.seq_len, batch_size, request)
        except torch.OutOfMemoryError:
            _write(request, {"batch": batch_size, "failed": "out of memory"})
            break
        _write(request, {"batch": batch_size, **result})


def _measure(side: Side, stream: SampleStream, seq_len: int, batch_size: int, request: Request) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = stream.start(seq_len)
    specs = (BatchSpec(start.advanced(number * batch_size), batch_size) for number in itertools.count())
    times: list[float] = []
    losses: list[float] = []
    with BatchLoader(stream, specs, pin_memory=True) as batches:
        for _ in range(request.warm_up + request.steps):
            began = time.perf_counter()
            losses.append(float(side.step(next(batches))))
            _wait()
            times.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        times = times[request.warm_up :]
        result: dict[str, Any] = {"times": times, "losses": losses, "peak_gib": peak}
        if request.profiled:
            result["kernels"] = _profile(side, next(batches), request)
    _say(f"batch {batch_size}: {statistics.median(times) * 1e3:.1f} ms, peak {peak:.1f} GiB, losses {losses}")
    return result


def _profile(side: Side, batch: Batch, request: Request) -> list[tuple[str, str, float, int]]:
    """One step's kernels: (name, what launched it, microseconds, launches)."""
    file = Path(request.out).with_suffix(".trace.json")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        side.step(batch)
        _wait()
    profiler.export_chrome_trace(str(file))
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    file.unlink()
    origins = _origins(events)
    kernels: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            origin = origins.get(event.get("args", {}).get("correlation"), "")
            kernels.setdefault((event["name"], origin), []).append(event["dur"])
    return [(name, origin, sum(times), len(times)) for (name, origin), times in kernels.items()]


def _origins(events: list[dict[str, Any]]) -> dict[int, str]:
    """By the number of a launch: `optimizer` in the range of that name, else the innermost operation around it that is
    no plain operator of torch, such as an autograd function."""
    threads: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads.setdefault(event["tid"], []).append(event)
    origins = {}
    for thread in threads.values():
        around: list[tuple[float, str]] = []
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            around = [(end, name) for end, name in around if event["ts"] < end]
            if event["cat"] in ("cpu_op", "user_annotation"):
                if not event["name"].startswith(("aten::", "autograd::", "ProfilerStep")):
                    around.append((event["ts"] + event["dur"], event["name"]))
            elif "correlation" in event.get("args", {}):
                names = [name for _, name in around]
                origins[event["args"]["correlation"]] = "optimizer" if "optimizer" in names else (names or [""])[-1]
    return origins


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _write(request: Request, result: dict[str, Any]) -> None:
    with open(request.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
