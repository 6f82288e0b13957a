"""Bandwidth of the exchange of expert rows beside NCCL's own all-to-all of the same bytes.

    python benchmarks/all_to_all_speed.py --ranks 2                           # GPUs of one host, NCCL
    python benchmarks/all_to_all_speed.py --ranks 2 --device cpu --rows 256   # gloo, that it runs

Each rank sends `--rows` rows of a width to every rank, itself included, as `parallel.transfer` does on the way to
experts: in bf16, and packed in FP8. NCCL's side is one `all_to_all_single` of one tensor with as many bytes as travel.
Goal: 0.9 of NCCL's bandwidth for rows in bf16 and for packed rows, which are sent as they are. FP8 with rounding and
back is shown beside and held against no goal, as NCCL's side rounds nothing.

GB/s are of the bytes that leave a rank for others; medians of interleaved rounds, on the slowest rank. On GPUs the time
is the device's, with the host ahead of it as in a step, and the mean of repetitions in a row. On CPUs it is wall time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import distributed as dist

from model.packing import encode_rows
from parallel.clock import Clock
from parallel.peer_copies import PeerCopies
from parallel.peer_memory import find_obstacle
from parallel.transfer import AllToAll, Collectives, Fp8AllToAll, Traffic

ROOT = Path(__file__).resolve().parents[1]
REPETITIONS = 8
SLEEP_CYCLES = 10_000_000
"""About 5 ms, in which the host launches all repetitions."""
Work = Callable[[], object]
BF16_BYTES, FP8_BYTES = "NCCL, bytes of bf16 rows", "NCCL, bytes of FP8 rows"
BESIDE = {
    BF16_BYTES: ("Eva, bf16", "Eva, bf16, copy engines"),
    FP8_BYTES: ("Eva, FP8", "Eva, FP8 with rounding and back", "Eva, FP8, copy engines"),
}
"""What is compared with each of NCCL's sides."""


def sides(rows: int, width: int, device: torch.device, copies: PeerCopies | None) -> dict[str, tuple[Work, int]]:
    """What is timed, and how many bytes leave a rank for others."""
    group, size, clock = dist.group.WORLD, dist.get_world_size(), Clock(device)
    assert group is not None
    traffic = Traffic([[rows] * size] * size, dist.get_rank())
    counts = [rows] * size
    x = torch.randn(rows * size, width, device=device, dtype=torch.bfloat16)
    packed = encode_rows(x)
    others = rows * (size - 1)
    bf16_row, fp8_row = x[0].nbytes, packed[0].nbytes
    exchange, rounding = (kind(Collectives(group), traffic, clock) for kind in (AllToAll, Fp8AllToAll))

    def plainly(bytes_a_row: int) -> Work:
        out, sent = (torch.empty(rows * size, bytes_a_row, dtype=torch.uint8, device=device) for _ in range(2))
        return lambda: dist.all_to_all_single(out, sent, counts, counts)

    works: dict[str, tuple[Work, int]] = {
        BF16_BYTES: (plainly(bf16_row), others * bf16_row),
        "Eva, bf16": (lambda: exchange.send(x).wait(), others * bf16_row),
        FP8_BYTES: (plainly(fp8_row), others * fp8_row),
        "Eva, FP8": (lambda: exchange.send(packed).wait(), others * fp8_row),
        "Eva, FP8 with rounding and back": (lambda: rounding.send(x).wait(), others * fp8_row),
    }
    if copies is not None:
        copied = AllToAll(copies, traffic, clock)
        works["Eva, bf16, copy engines"] = (lambda: copied.send(x).wait(), others * bf16_row)
        works["Eva, FP8, copy engines"] = (lambda: copied.send(packed).wait(), others * fp8_row)
    return works


def measure(works: dict[str, tuple[Work, int]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, of the slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-3, rounds):
        for name, (work, _) in works.items():
            taken = torch.tensor(seconds_here(work, device), device=device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number >= 0:
                times[name].append(float(taken))
    return times


def seconds_here(work: Work, device: torch.device) -> float:
    """How long the work takes on this rank, when all begin together."""
    dist.barrier()
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(REPETITIONS):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / REPETITIONS


def run_rank(arguments: argparse.Namespace) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device(f"cuda:{rank}" if arguments.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    lines = []
    group = dist.group.WORLD
    assert group is not None
    copies = None if find_obstacle(group, device) else PeerCopies(group, device)
    for rows in arguments.rows:
        works = sides(rows, arguments.width, device, copies)
        times = measure(works, device, arguments.rounds)
        speeds = {name: size / median(times[name]) / 1e9 for name, (_, size) in works.items()}
        for plain, compared in BESIDE.items():
            for name in (each for each in (plain, *compared) if each in works):
                ratio = f"{speeds[name] / speeds[plain]:.2f}"
                lines.append(f"| {rows} | {name} | {1e6 * median(times[name]):.0f} | {speeds[name]:.1f} | {ratio} |")
    if copies:
        copies.close()
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, gloo"
        print(
            f"\n{date.today()}, {dist.get_world_size()} × {name}, torch {torch.__version__}, rows of {arguments.width}"
        )
        print("\n| rows to each rank | side | µs | GB/s | of NCCL's |\n|---|---|---|---|---|")
        print("\n".join(lines))
    dist.destroy_process_group()


def main() -> None:
    """Starts the ranks, unless this is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(arguments.ranks), __file__, *sys.argv[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    raise SystemExit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()
