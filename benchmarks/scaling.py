"""Tokens a second of one GPU and of several, and what `pretrain plan` says of step and memory.

    python benchmarks/scaling.py --data runs/data                     # two GPUs, about 3 minutes
    python benchmarks/scaling.py --data runs/data --only "1 GPU" "2, ep2"
    python benchmarks/scaling.py --data runs/data --gpus 4            # configs/dsv3_16b.toml, about 4 minutes
    python benchmarks/scaling.py --data DATA --config configs/tiny.toml --micro-batch-size 1      # without GPUs

Whole optimizer steps on real tokens, of configs/dsv3_2b.toml, on four GPUs of dsv3_16b.toml, from `assemble` and
`train_step`; each layout is launched by itself. Every rank has the same micro-batches, as many tokens as the one GPU
has. Medians of all steps but the first `--warm-up`, each until all ranks have ended it. Memory is the allocator's peak
during the steps and outboxes, on the rank that needs most, beside what is planned of both; the seconds are planned for
`--hardware`.
Goals: 1.9 times the tokens a second with ZeRO 1, 1.85 times with experts on two ranks; memory within 5 %, time within
20 % of the plan.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from quick_weights import draw_on_gpu
from torch import distributed as dist

from data.loader import BatchLoader, BatchSpec
from model.counts import training_flops_per_token
from parallel.launch import find_place, join_processes
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.config import Config, check_layout, load_config
from pretrain.planning.footprint import memories_of
from pretrain.planning.forecast import predictor
from pretrain.planning.hardware import load_hardware
from pretrain.planning.memory import GIB
from pretrain.step import train_step

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layout:
    """One line of the table: so many ranks, and overrides of the configuration."""

    name: str
    num_ranks: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """The layouts of one table, which train one model."""

    config: str
    micro_batch_size: int
    layouts: tuple[Layout, ...]


SPREAD = ("parallel.ep=4", "parallel.schedule=dualpipev")
SERIES = {
    2: Series(
        "dsv3_2b",
        8,
        (
            Layout("1 GPU", 1),
            Layout("2, ZeRO 1", 2, ("parallel.zero_stage=1",)),
            Layout("2, ep2", 2, ("parallel.ep=2",)),
            Layout("2, ep2, NCCL", 2, ("parallel.ep=2", "parallel.copy_engines=false")),
            Layout("2, ep2, dualpipev", 2, ("parallel.ep=2", "parallel.schedule=dualpipev")),
            Layout(
                "2, ep2, dualpipev, NCCL",
                2,
                ("parallel.ep=2", "parallel.schedule=dualpipev", "parallel.copy_engines=false"),
            ),
        ),
    ),
    4: Series(
        "dsv3_16b",
        2,
        (
            Layout("4, ep4", 4, ("parallel.ep=4",)),
            Layout("4, ep4, FP8", 4, ("parallel.ep=4", 'precision.fp8="block"', "parallel.fp8_dispatch=true")),
            Layout("4, ep4, dualpipev", 4, SPREAD),
            Layout("4, pp2, ep2, dualpipev", 4, ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipev")),
        ),
    ),
}


def main() -> None:
    """Starts the ranks of each layout, unless this is one."""
    arguments = parse()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    notes, first = [], 0.0
    print_head(arguments)
    with TemporaryDirectory() as folder:
        for place, layout in enumerate(SERIES[arguments.gpus].layouts):
            if arguments.only and layout.name not in arguments.only:
                continue
            result = launch(layout, arguments.limit, Path(folder) / f"{place}.json")
            first = print_row(arguments, layout, result, first)
            if result is not None:
                losses = " ".join(f"{loss:.3f}" for loss in result["losses"])
                device, built = result["device"], result["built"] / GIB
                notes.append(f"- {layout.name}: {device}; {built:.1f} GiB while it was built; losses {losses}")
    print("\n" + "\n".join(notes))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--gpus", type=int, choices=SERIES, default=2)
    parser.add_argument("--config", type=Path, help="(default: dsv3_2b.toml, on four GPUs dsv3_16b.toml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--micro-batch-size", type=int, help="(default: 8, on four GPUs 2)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of each rank in a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="of the steps that do not count")
    parser.add_argument("--hardware", type=Path, default=Path("h200"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="layouts, as the table names them")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a layout may take")
    arguments = parser.parse_args()
    series = SERIES[arguments.gpus]
    names = [layout.name for layout in series.layouts]
    if unknown := [name for name in arguments.only if name not in names]:
        parser.error(f"--only {unknown[0]!r}: the layouts are {', '.join(map(repr, names))}")
    arguments.config = arguments.config or ROOT / "configs" / f"{series.config}.toml"
    arguments.micro_batch_size = arguments.micro_batch_size or series.micro_batch_size
    return arguments


def launch(layout: Layout, limit: float, out: Path) -> dict[str, Any] | None:
    """What the first rank found; None where it did not get so far."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(layout.num_ranks), __file__, *sys.argv[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "LAYOUT": layout.name, "OUT_FILE": str(out)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"{layout.name}: stopped after {limit:.0f} s", file=sys.stderr)
        # torchrun passes it on to the ranks.
        process.terminate()
        process.wait()
    return json.loads(out.read_text()) if out.exists() else None


def run_rank(arguments: argparse.Namespace) -> None:
    """Some steps of one layout."""
    layout = next(layout for layout in SERIES[arguments.gpus].layouts if layout.name == os.environ["LAYOUT"])
    config = configure(arguments, layout)
    place = find_place()
    began = time.perf_counter()

    def tell(what: str) -> None:
        if place.is_first:
            print(f"{layout.name}: {what} after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    check_layout(config, place.world_size)
    load_deepspeed()
    join_processes(place)
    draw_on_gpu()
    run = assemble(config, place, open_data(config))
    tell("built")
    built = _peak(run)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times, losses = time_steps(run, arguments.steps, tell)
    peaks = torch.tensor([built, _peak(run)], dtype=torch.float64, device=place.device)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    if place.is_first:
        name = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
        result = {"times": times, "losses": losses, "peak": float(peaks[1]), "built": float(peaks[0]), "device": name}
        Path(os.environ["OUT_FILE"]).write_text(json.dumps(result))
    dist.destroy_process_group()


def configure(arguments: argparse.Namespace, layout: Layout) -> Config:
    """The configuration of a layout."""
    size = arguments.micro_batch_size
    sizes = [
        f"train.micro_batch_size={size}",
        f"train.batch_size={size * arguments.micro_batches * layout.num_ranks}",
        f'data.datasets=[{{ path = "{arguments.data}" }}]',
    ]
    return load_config(arguments.config, [*sizes, *arguments.set, *layout.overrides])


def time_steps(run: Assembly, steps: int, tell: Callable[[str], None]) -> tuple[list[float], list[float]]:
    """Seconds of each step until all ranks have ended it, its data included, and its loss."""
    stream, shape, size = run.stream, run.mesh.shape, run.config.train.batch_size
    start = stream.start(run.config.train.seq_len)
    specs = (BatchSpec(start.advanced(number * size), size) for number in itertools.count())
    times, losses, device = [], [], run.place.device
    on_gpu = device.type == "cuda"
    with BatchLoader(
        stream, specs, dp_rank=shape.dp_rank(run.place.rank), dp_size=shape.dp, pin_memory=on_gpu
    ) as batches:
        for number in range(steps):
            dist.barrier()
            began = time.perf_counter()
            values = run.timeline.at(number * size * run.config.train.seq_len)
            losses.append(train_step(run, next(batches), values, stop_requested=False).loss)
            if on_gpu:
                torch.cuda.synchronize()
            taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            times.append(float(taken))
            tell(f"step {number + 1}")
    return times, losses


def _peak(run: Assembly) -> float:
    beside = run.executor.dispatcher.num_bytes
    return float(torch.cuda.max_memory_allocated() + beside) if run.place.device.type == "cuda" else 0.0


def print_head(arguments: argparse.Namespace) -> None:
    """Of the table."""
    hardware = load_hardware(arguments.hardware)
    num, size = arguments.micro_batches, arguments.micro_batch_size
    print(f"\n{date.today()}, torch {torch.__version__}, medians of {arguments.steps - arguments.warm_up}")
    print(f"{arguments.config.stem}, {num} micro-batches of {size} sequences a rank, planned for {hardware.name}\n")
    head = "layout | ms a step (fastest to slowest) | plan ms | ratio | tokens/s | of 1 GPU | MFU | GiB | plan GiB"
    print(f"| {head} | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)


def print_row(arguments: argparse.Namespace, layout: Layout, result: dict[str, Any] | None, first: float) -> float:
    """A layout beside its plan and beside `first`, the tokens a second of one GPU, 0 if not known; which it returns."""
    if result is None:
        print(f"| {layout.name} | failed | | | | | | | | |", flush=True)
        return first
    config, hardware = configure(arguments, layout), load_hardware(arguments.hardware)
    times = result["times"][arguments.warm_up :]
    seconds, tokens = median(times), config.train.batch_size * config.train.seq_len
    if layout.num_ranks == 1:
        first = tokens / seconds
    micro_batches = arguments.micro_batches * layout.num_ranks // config.parallel.mesh_shape(layout.num_ranks).dp
    planned = predictor(config, config.train.seq_len, layout.num_ranks, hardware).step(micro_batches).seconds
    flops = tokens / seconds / layout.num_ranks * training_flops_per_token(config.model, config.train.seq_len)
    memory = max(each.peak + each.outboxes for each in memories_of(config, layout.num_ranks)) / GIB
    ratio = f"{tokens / seconds / first:.3f}x" if first else ""
    print(
        f"| {layout.name} | {1e3 * seconds:.0f} ({1e3 * min(times):.0f} to {1e3 * max(times):.0f}) "
        f"| {1e3 * planned:.0f} | {seconds / planned:.3f} | {tokens / seconds:,.0f} | {ratio} "
        f"| {100 * flops / 1e12 / hardware.bf16_tflops:.1f} % "
        f"| {result['peak'] / GIB:.2f} | {memory:.2f} | {result['peak'] / GIB / memory:.3f} |",
        flush=True,
    )
    return first


if __name__ == "__main__":
    main()
