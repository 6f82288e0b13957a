"""What DualPipeV hides of the exchange of expert rows, and what that is worth: experts on two ranks.

    python benchmarks/overlap_speed.py --intervals overlap.json      # two GPUs, about a minute
    python benchmarks/overlap_speed.py --pp 2                        # four GPUs: two pipelines of two
    python benchmarks/overlap_speed.py --ep 1                        # one GPU that sends rows to itself
    python benchmarks/overlap_speed.py --device cpu --rounds 2       # gloo, that it runs

The same micro-batches forward and backward, without an optimizer: pairs of passes in turns, so that all-to-alls of one
run beside the arithmetic of the other; the same schedule with the passes of a pair one after another, where nothing but
weight gradients of experts lies beside their all-to-alls; and 1f1b; with `--peers` torch's schedule and DeepSpeed's
engine, whose all-to-alls are waited for at once. Losses and norms are compared first. Then one step of each is traced.
Rows that a GPU sends to itself are copied: there is nothing to hide then, but how long no kernel runs tells whether the
host keeps up.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import gettempdir
from typing import Any

import torch
from overlap import PAIR, Kernel, measure_overlap, read_trace, write_intervals
from pipeline_sides import (
    Ending,
    Setting,
    Side,
    build,
    deepspeed_side,
    make_setting,
    micro_batches,
    torch_side,
)
from pipeline_speed import compare, measure, meet, tell, wait
from quick_weights import draw_on_gpu
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import parallel.build
import parallel.executor
from parallel.build import build_executor
from parallel.chunk import LossWeights, MicroBatch
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.dispatch import Dispatcher, Hop
from parallel.launch import keep_compiled_kernels
from parallel.mesh import Mesh, make_mesh
from parallel.schedule import ScheduleName
from parallel.tape import Steps, run_in_turns, run_to_end
from parallel.transfer import Collectives
from parallel.zero import load_deepspeed

ROOT = Path(__file__).resolve().parents[1]
Pairing = Callable[[Steps[Any], Steps[Any]], Any]


def main() -> None:
    """Starts the ranks, unless this is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, choices=(1, 2), default=2, help="ranks that experts are on")
    parser.add_argument("--pp", type=int, default=1, help="stages of so many ranks each")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences, of 4096 tokens on GPUs, else 128")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="(default: bf16 on GPUs)")
    parser.add_argument("--fp8-dispatch", action="store_true", help="rows on their way to experts in FP8")
    parser.add_argument("--peers", action="store_true", help="also torch's and DeepSpeed's DualPipeV on these stages")
    parser.add_argument("--nccl", action="store_true", help="let NCCL carry rows where copy engines could")
    parser.add_argument("--intervals", type=Path, metavar="FILE", help="write the overlapped step, for overlap.py")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.ep * arguments.pp), __file__, *sys.argv[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    raise SystemExit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}).returncode)


def run_rank(arguments: argparse.Namespace) -> None:
    """Times and traces all sides; the first rank prints the table."""
    torch.set_num_threads(1)
    setting = make_setting(arguments, layout(arguments, "dualpipev"))
    if setting.device.type == "cuda":
        torch.cuda.set_device(setting.device)
        keep_compiled_kernels()
    dist.init_process_group("cpu:gloo,cuda:nccl" if setting.device.type == "cuda" else "gloo")
    if setting.dtype == torch.bfloat16:
        draw_on_gpu()
    mesh = make_mesh(setting.parallel.mesh_shape(arguments.ep * arguments.pp))
    sides = make_sides(arguments, mesh, setting)
    loss, norm, differences = compare(sides, setting)
    times = measure(sides, setting, arguments.rounds)
    tell("traces")
    traces = [trace(side, setting, mesh.rank) for side in sides]
    if mesh.rank == 0:
        print_table(arguments, setting, sides, [median(one.taken for one in of_side) for of_side in times], traces)
        print(f"\nloss, summed over ranks, {loss:.6f}, gradient norm {norm:.6f} on all sides")
        print("\n".join(f"BUT {difference}" for difference in differences))
    if mesh.rank == 0 and arguments.intervals and traces[0]:
        share = measure_overlap(traces[0]).share
        of = f"A pair of DualPipeV's main phase, EP {arguments.ep}, PP {arguments.pp}"
        title = f"{of}: {share:.0%} of all-to-all under compute"
        write_intervals(traces[0], title, arguments.intervals)
    dist.destroy_process_group()


def layout(arguments: argparse.Namespace, schedule: ScheduleName) -> ParallelConfig:
    return ParallelConfig(
        pp=arguments.pp,
        ep=arguments.ep,
        schedule=schedule,
        fp8_dispatch=arguments.fp8_dispatch,
        copy_engines=not arguments.nccl,
    )


def to_itself(parallel: ParallelConfig, mesh: Mesh, num_experts: int, *, clock: Clock, **_: Any) -> Dispatcher:
    """A way to experts that are all here, as if they were elsewhere."""
    carrier = Collectives(mesh.expert)
    hop = Hop(mesh.expert, num_experts, carrier, carrier)
    return Dispatcher([hop], group=mesh.expert, clock=clock, fp8=parallel.fp8_dispatch)


def make_sides(arguments: argparse.Namespace, mesh: Mesh, setting: Setting) -> list[Side]:
    """The overlapped one first. On one GPU there is one more, where rows stay, as in those of peers."""
    batches = micro_batches(setting, mesh, arguments.micro_batches)
    make = partial(make_side, arguments, mesh, setting, batches)
    alone = [make("1f1b, no rows sent", "1f1b", run_in_turns)] if arguments.ep == 1 else []
    others = list(make_peers(mesh, setting, batches)) if arguments.peers else []
    if arguments.ep == 1:
        parallel.build.make_dispatcher = to_itself
    return [
        make("pairs in turns", "dualpipev", run_in_turns),
        make("pairs one after another", "dualpipev", one_after_another),
        make("pairs in turns, once more", "dualpipev", run_in_turns),
        make("1f1b", "1f1b", run_in_turns),
        *alone,
        *others,
    ]


def make_peers(mesh: Mesh, setting: Setting, batches: list[MicroBatch]) -> Iterator[Side]:
    """Other ways to run DualPipeV on the same stages."""
    deepspeed = load_deepspeed()
    deepspeed.init_distributed(dist_init_required=False)
    given = {"mesh": mesh, "setting": setting, "batches": batches}
    yield torch_side(name="torch ScheduleDualPipeV, Eva's deferred W", uses_deferred=True, **given)
    yield deepspeed_side(deepspeed, name="DeepSpeed DualPipeVEngine", **given)


def make_side(
    arguments: argparse.Namespace,
    mesh: Mesh,
    setting: Setting,
    batches: Sequence[MicroBatch],
    name: str,
    schedule: ScheduleName,
    pairing: Pairing,
) -> Side:
    parallel = layout(arguments, schedule)
    model = build(setting, parallel, mesh)
    executor = build_executor(model, parallel, mesh, defers=True)

    def step(end: Ending) -> float:
        model.zero_grad()
        with pairs_run(pairing):
            outcome = executor.train(batches, LossWeights(1 / len(batches), 0.0, 0.0))
        end()
        return float(outcome.losses[0]) / len(batches)

    return Side(name, model, step, executor)


def one_after_another(one: Steps[Any], other: Steps[Any]) -> Any:
    """A pair of which neither waits beside the other."""
    run_to_end(one)
    return run_to_end(other)


@contextmanager
def pairs_run(pairing: Pairing) -> Iterator[None]:
    """How the executor runs pairs, marked for a trace."""

    def marked(one: Steps[Any], other: Steps[Any]) -> Any:
        with record_function(PAIR):
            return pairing(one, other)

    parallel.executor.run_in_turns = marked
    try:
        yield
    finally:
        parallel.executor.run_in_turns = run_in_turns


def trace(side: Side, setting: Setting, rank: int) -> list[Kernel]:
    """The kernels of one step; none on a CPU."""
    if setting.device.type != "cuda":
        side.step(lambda: None)
        return []
    file = Path(gettempdir(), f"overlap-{os.getpid()}.json")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        meet(setting)
        side.step(lambda: None)
        wait(setting)
    kernels: list[Kernel] = []
    if rank == 0:
        try:
            profiler.export_chrome_trace(str(file))
            kernels = read_trace(file)
        except (OSError, ValueError, KeyError) as error:
            print(f"{side.name}: no trace: {error!r}", file=sys.stderr)
        file.unlink(missing_ok=True)
    dist.barrier()
    return kernels


def print_table(
    arguments: argparse.Namespace,
    setting: Setting,
    sides: Sequence[Side],
    seconds: Sequence[float],
    traces: Sequence[Sequence[Kernel]],
) -> None:
    name = torch.cuda.get_device_name() if setting.device.type == "cuda" else "CPU, gloo"
    variables = {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "TORCH_NCCL_"))}
    layout_name = f"EP {arguments.ep}, PP {arguments.pp}"
    print(f"\n{date.today()}, {arguments.ep * arguments.pp} x {name}, torch {torch.__version__}, {layout_name}")
    print(f"{arguments.micro_batches} micro-batches of {setting.micro_batch_size} x {setting.seq_len} tokens")
    executor = sides[0].executor
    assert executor is not None
    carried = executor.dispatcher.hops[0].rows.name
    print(f"{setting.dtype}, rows in FP8: {arguments.fp8_dispatch}, carried by {carried}, {variables}\n")
    print("| side | ms a step | of the first | main phase ms | all-to-all ms | hidden | compute runs |")
    print("|---|---|---|---|---|---|---|")
    for side, taken, kernels in zip(sides, seconds, traces, strict=True):
        found = measure_overlap(kernels)
        phase, busy, exchange, hidden = "-", "-", "-", "-"
        if found.phase:
            phase, busy = f"{found.phase / 1e3:.1f}", f"{found.computing / found.phase:.1%}"
        if found.exchange:
            exchange, hidden = f"{found.exchange / 1e3:.1f}", f"{found.share:.1%}"
        traced = f"{phase} | {exchange} | {hidden} | {busy}"
        print(f"| {side.name} | {1e3 * taken:.1f} | {taken / seconds[0]:.2f}x | {traced} |")


if __name__ == "__main__":
    main()
