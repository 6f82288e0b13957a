"""Step times of a pipeline: Eva's executor beside torch's ScheduleDualPipeV and DeepSpeed's DualPipeVEngine.

    python benchmarks/pipeline_speed.py                  # a few minutes
    python benchmarks/pipeline_speed.py --rounds 3 --micro-batches 4
    python benchmarks/pipeline_speed.py --device cuda    # two GPUs
    python benchmarks/pipeline_speed.py --device cuda --leave-out 'ScheduleDualPipeV$'      # not all of torch's

Two ranks on gloo, with one thread each, or on NCCL, run forward and backward passes of all micro-batches, without an
optimizer. All sides have the same stages: the blocks, embedding and head of Eva's model, with the same weights; all
experts are on every rank. (1f1b has half as many stages, twice as long.) The others run them as ordinary modules under
plain autograd. All losses and gradient norms are compared first, within 1e-5 in fp32. On GPUs the model is larger and
in bf16, weights and gradients, and what differs by more than 0.5 % is said beside the table.
Rounds are interleaved, each in another order; a step ends when both ranks have ended it. The table gives medians, and
the median over rounds of the ratio to Eva's DualPipeV in the same round. The processor's time, added up over ranks,
leaves out waiting, and feels less of what else the machine does.

A second table has the bubble of Eva's schedules: the time that the rank which waits longest waits in a step, measured,
and as `parallel.simulate` has it from the measured durations of each kind of pass on each stage.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import torch
from pipeline_bubble import BUBBLE_HEAD, Bubble, measure_bubble
from pipeline_sides import Setting, Side, deepspeed_side, eva_side, make_setting, micro_batches, torch_side
from quick_weights import draw_on_gpu
from torch import Tensor
from torch import distributed as dist

from parallel.config import ParallelConfig
from parallel.launch import keep_compiled_kernels
from parallel.mesh import Mesh, make_mesh
from parallel.zero import load_deepspeed

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
FOLDED = ParallelConfig(pp=NUM_RANKS, schedule="dualpipev")


class Times(NamedTuple):
    """Seconds of a step until both ranks had ended it, and seconds of the processor, added up over ranks."""

    taken: float
    busy: float


def main() -> None:
    """Starts the ranks, unless this is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="(default: bf16 on GPUs)")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences, of 4096 tokens on GPUs, else 128")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="PATTERN", help="sides of such names")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NUM_RANKS), __file__, *sys.argv[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    raise SystemExit(subprocess.run(command, env=environment).returncode)


def run_rank(arguments: argparse.Namespace) -> None:
    """Measures each number of micro-batches; the first rank prints the tables."""
    torch.set_num_threads(1)
    setting, deepspeed = make_setting(arguments, FOLDED), load_deepspeed()
    if setting.device.type == "cuda":
        torch.cuda.set_device(setting.device)
        keep_compiled_kernels()
    dist.init_process_group("cpu:gloo,cuda:nccl" if setting.device.type == "cuda" else "gloo")
    deepspeed.init_distributed(dist_init_required=False)
    if setting.dtype == torch.bfloat16:
        draw_on_gpu()
    mesh = make_mesh(FOLDED.mesh_shape(NUM_RANKS))
    checks, lines, bubbles = [], [], []
    for number in arguments.micro_batches:
        sides = make_sides(deepspeed, mesh, setting, number, arguments.leave_out)
        loss, norm, differences = compare(sides, setting)
        checks.append(f"{number} micro-batches: loss {loss:.6f}, gradient norm {norm:.6f} on all sides")
        checks += [f"{number} micro-batches: BUT {difference}" for difference in differences]
        lines += [f"| {number} | {line} |" for line in rows(sides, measure(sides, setting, arguments.rounds))]
        for side in sides:
            if side.executor is not None and "once more" not in side.name:
                found = measure_bubbles(side, mesh, setting, min(arguments.rounds, 11))
                bubbles.append(f"| {number} | {side.name} | {found.row} |")
        del sides
    if mesh.rank == 0:
        print_tables(setting, arguments.rounds, checks, lines, bubbles)
    dist.destroy_process_group()


def print_tables(
    setting: Setting, rounds: int, checks: Sequence[str], lines: Sequence[str], bubbles: Sequence[str]
) -> None:
    """What was measured, and with what."""
    on_gpu = setting.device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"\n{date.today()}, {machine}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, deepspeed {version('deepspeed')}, {NUM_RANKS} ranks, medians of {rounds}")
    print(f"micro-batches of {setting.micro_batch_size} x {setting.seq_len} tokens, {setting.dtype}")
    print("\n".join(checks), end="\n\n")
    print("| micro-batches | side | ms a step (fastest to slowest) | Eva's first is | CPU ms | Eva's first is |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines), end="\n\n")
    print(f"| micro-batches | side | {BUBBLE_HEAD} |")
    print("|" + "---|" * (2 + BUBBLE_HEAD.count("|") + 1))
    print("\n".join(bubbles))


def make_sides(deepspeed: Any, mesh: Mesh, setting: Setting, number: int, leave_out: Sequence[str]) -> list[Side]:
    """All sides, Eva's DualPipeV first and once more, which shows the noise. Each has weights of its own."""
    batches = micro_batches(setting, mesh, number)
    sides = {
        "Eva, dualpipev": partial(eva_side, "dualpipev"),
        "torch ScheduleDualPipeV": partial(torch_side, uses_deferred=False),
        "torch ScheduleDualPipeV, Eva's deferred W as `dw_builder`": partial(torch_side, uses_deferred=True),
        "DeepSpeed DualPipeVEngine": partial(deepspeed_side, deepspeed),
        "Eva, dualpipev, once more": partial(eva_side, "dualpipev"),
        "Eva, zbv": partial(eva_side, "zbv"),
        "Eva, 1f1b": partial(eva_side, "1f1b"),
    }
    wanted = {name: make for name, make in sides.items() if not any(re.search(pattern, name) for pattern in leave_out)}
    return [make(name=name, mesh=mesh, setting=setting, batches=batches) for name, make in wanted.items()]


def compare(sides: Sequence[Side], setting: Setting) -> tuple[float, float, list[str]]:
    """Loss and gradient norm over all ranks, of the first side, and which others differ. In fp32 that raises
    ValueError."""
    found = []
    for side in sides:
        tell(f"{side.name}: loss and norm")
        squares = torch.zeros((), dtype=torch.float64, device=setting.device)

        def add_up(side: Side = side, squares: Tensor = squares) -> None:
            for parameter in side.module.parameters():
                if parameter.grad is not None:
                    squares.add_(parameter.grad.double().square().sum())

        loss = torch.tensor(side.step(add_up), dtype=torch.float64, device=setting.device)
        both = torch.stack([loss, squares])
        dist.all_reduce(both)
        found.append((float(both[0]), float(both[1].sqrt())))
    differences = []
    for side, numbers in zip(sides, found, strict=True):
        if any(not abs(a - b) <= setting.tolerance * b for a, b in zip(numbers, found[0], strict=True)):
            differences.append(f"{side.name} has loss and gradient norm {numbers}, not {found[0]} as {sides[0].name}")
    if differences and setting.dtype == torch.float32:
        raise ValueError(differences[0])
    return *found[0], differences


def measure(sides: Sequence[Side], setting: Setting, rounds: int) -> list[list[Times]]:
    """The times of a step of each side, one pair in every round."""
    times: list[list[Times]] = [[] for _ in sides]
    for number in range(-1, rounds):
        tell(f"round {number + 1} of {rounds}")
        for index in Random(number).sample(range(len(sides)), len(sides)):
            meet(setting)
            start, start_busy = time.perf_counter(), time.process_time()
            sides[index].step(lambda: None)
            wait(setting)
            busy = torch.tensor(time.process_time() - start_busy, dtype=torch.float64, device=setting.device)
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=setting.device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            dist.all_reduce(busy)
            # The first round only warms up.
            if number >= 0:
                times[index].append(Times(float(taken), float(busy)))
    return times


def measure_bubbles(side: Side, mesh: Mesh, setting: Setting, rounds: int) -> Bubble:
    """Of Eva's steps, after one that is not counted."""
    assert side.executor is not None
    executor, clock = side.executor, side.executor.clock

    def step() -> None:
        meet(setting)
        clock.start(spans=True)
        side.step(lambda: None)
        dist.all_reduce(torch.zeros((), device=setting.device))
        clock.align()
        clock.stop()
        wait(setting)

    step()
    return measure_bubble(executor, step, mesh.pipeline, setting.device, rounds)


def tell(what: str) -> None:
    """What comes next, by the first rank."""
    if dist.get_rank() == 0:
        print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


def meet(setting: Setting) -> None:
    """Ranks go on together, with nothing left to do."""
    wait(setting)
    dist.all_reduce(torch.zeros((), device=setting.device))
    wait(setting)


def wait(setting: Setting) -> None:
    """Until the device has done all."""
    if setting.device.type == "cuda":
        torch.cuda.synchronize()


def rows(sides: Sequence[Side], times: Sequence[Sequence[Times]]) -> Iterator[str]:
    """The table's lines, without the number of micro-batches."""
    for side, of_side in zip(sides, times, strict=True):
        taken = [one.taken * 1e3 for one in of_side]
        step = f"{median(taken):.0f} ({min(taken):.0f} to {max(taken):.0f})"
        busy = f"{median(one.busy for one in of_side) * 1e3:.0f}"
        pairs = list(zip(of_side, times[0], strict=True))
        ratios = (median(one[part] / eva[part] for one, eva in pairs) for part in (0, 1))
        faster, lighter = ("" if side is sides[0] else f"{ratio:.2f}x as fast" for ratio in ratios)
        yield f"{side.name} | {step} | {faster} | {busy} | {lighter}"


if __name__ == "__main__":
    main()
