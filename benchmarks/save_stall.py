"""How long training waits for a checkpoint of a large model that is saved in the background, and that it loads.

    python benchmarks/save_stall.py --data runs/data --folder /dev/shm                     # two GPUs, about 2 minutes
    python benchmarks/save_stall.py --data runs/data --folder /dev/shm --ranks 1           # one, which saves it all
    python benchmarks/save_stall.py --data DATA --config configs/tiny.toml --folder /tmp   # without GPUs

Data ranks train configs/dsv3_2b.toml with ZeRO 1 and `checkpoint.async`; after some steps they save, train on while
the disk writes, and save again. The stall is the time that `save` takes; the first waits for the thread that takes and
pins memory of the host from the start on, if it is not done. Goal: at most 1 s. Then one process alone resumes from the
last checkpoint and makes a step, whose loss is to be that of all ranks. And on the CPU all checksums are verified,
and tensors read whose sums in fp64 are to be those that the ranks had.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from shutil import disk_usage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from quick_weights import draw_on_gpu
from torch import distributed as dist

from data.loader import BatchLoader
from parallel.launch import find_place, gather_texts, join_processes
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.checkpoints.checkpoint import CheckpointReader, list_checkpoints
from pretrain.config import load_config
from pretrain.loop import plan_batches
from pretrain.state import TrainState, first_state, open_saver, resume, save, tensors_to_save
from pretrain.step import train_step

ROOT = Path(__file__).resolve().parents[1]
SAVES = 2
STEPS_BEFORE, MOST_STEPS_BETWEEN = 3, 200


def main() -> None:
    """Saves with some ranks, resumes with one, and reads on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for a checkpoint or two")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "dsv3_2b.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--ranks", type=int, default=2, help="that save (default: 2)")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--limit", type=float, default=240, help="seconds that each of the two parts may take")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        work = {"save": save_in_background, "resume": resume_alone}[os.environ["PART"]]
        run_rank(arguments, work)
        return
    print(f"{disk_usage(arguments.folder).free / 1e9:.0f} GB free in {arguments.folder}", file=sys.stderr)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        parts = {"save": arguments.ranks, "resume": 1}
        found = {part: launch(part, ranks, arguments.limit, Path(folder)) for part, ranks in parts.items()}
        print(f"\n{date.today()}, torch {torch.__version__}, {arguments.config.stem}, {arguments.folder}")
        report(found, arguments.ranks, Path(folder))


def launch(part: str, num_ranks: int, limit: float, folder: Path) -> dict[str, Any] | None:
    """What a part found; None where it failed."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), __file__, *sys.argv[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "PART": part, "RUN_FOLDER": str(folder)}
    environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
    out = folder / f"{part}.json"
    return json.loads(out.read_text()) if out.exists() else None


def run_rank(arguments: argparse.Namespace, work: Callable[[Assembly], dict[str, Any]]) -> None:
    """One part on one rank; the first writes what it found."""
    overrides = [
        f'run.dir="{os.environ["RUN_FOLDER"]}"',
        "run.name=run",
        "checkpoint.async=true",
        "checkpoint.keep=1",
        f"train.micro_batch_size={arguments.micro_batch_size}",
        f"train.batch_size={arguments.ranks * arguments.micro_batch_size}",
        f'data.datasets=[{{ path = "{arguments.data}" }}]',
        *arguments.set,
    ]
    config = load_config(arguments.config, overrides)
    place = find_place()
    load_deepspeed()
    join_processes(place)
    draw_on_gpu()
    found = work(assemble(config, place, open_data(config)))
    if place.is_first:
        Path(os.environ["RUN_FOLDER"], f"{os.environ['PART']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def save_in_background(run: Assembly) -> dict[str, Any]:
    """Saves between steps; steps are timed while the disk writes and while it does not."""
    saver, state = open_saver(run), first_state(run)
    size = sum(tensor.nbytes for tensor in tensors_to_save(run).values())
    stalls, written, quiet, beside = [], [], [], []
    state, times, _ = train(run, state, STEPS_BEFORE)
    quiet += times[1:]
    for _ in range(SAVES):
        began = time.perf_counter()
        save(run, state, saver)
        stalls.append(time.perf_counter() - began)
        saved, sums = state, sums_of(run)
        for _ in range(MOST_STEPS_BETWEEN):
            state, times, loss = train(run, state, 1)
            beside += times
            if state.step == saved.step + 1:
                next_loss = loss
            if any(gather_texts("saved" if saver.news() else "")):
                break
        written.append(time.perf_counter() - began)
    saver.finish()
    total = torch.tensor([size, *stalls], dtype=torch.float64, device=run.place.device)
    most = total.clone()
    dist.all_reduce(total)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    everyones = [json.loads(text) for text in gather_texts(json.dumps(sums))]
    return {
        "bytes": float(total[0]),
        "stalls": most[1:].tolist(),
        "written": written,
        "quiet": median(quiet),
        "beside": median(beside),
        "loss": next_loss,
        "sums": {key: value for rank in everyones for key, value in rank.items()},
        "device": torch.cuda.get_device_name() if run.place.device.type == "cuda" else "CPU",
    }


def train(run: Assembly, state: TrainState, steps: int) -> tuple[TrainState, list[float], float]:
    """Some steps from a state on: the state after, their seconds without waiting for the first batch, the last loss."""
    shape, times, loss = run.mesh.shape, [], 0.0
    specs = plan_batches(run.timeline, run.stream, state, run.config.train)
    with BatchLoader(run.stream, specs, dp_rank=shape.dp_rank(run.place.rank), dp_size=shape.dp) as batches:
        for _ in range(steps):
            batch = next(batches)
            began = time.perf_counter()
            result = train_step(run, batch, run.timeline.at(state.tokens), stop_requested=False)
            loss = result.loss
            if run.place.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            state = state.after(batch.spec.batch_size, skipped=result.skipped)
    return state, times, loss


def sums_of(run: Assembly) -> dict[str, tuple[int, float]]:
    """Of every 16th range that this rank saves, how many elements it has and their sum in fp64."""
    chosen = [(key, tensor) for key, tensor in tensors_to_save(run).items() if not key.startswith("rng/")]
    return {key: (tensor.numel(), float(tensor.double().sum())) for key, tensor in chosen[::16]}


def resume_alone(run: Assembly) -> dict[str, Any]:
    """Loads the newest checkpoint, and makes the step that follows."""
    began = time.perf_counter()
    state = resume(run)
    assert state is not None
    taken = time.perf_counter() - began
    _, _, loss = train(run, state, 1)
    return {"seconds": taken, "step": state.step, "loss": loss}


def report(found: dict[str, dict[str, Any] | None], ranks: int, folder: Path) -> None:
    """What was found, and what the CPU reads."""
    saved, resumed = found["save"], found["resume"]
    if saved is None:
        raise SystemExit("nothing was saved")
    print(f"{ranks} x {saved['device']}, {saved['bytes'] / 1e9:.1f} GB\n")
    print("| save | stall s | until it is on disk s |")
    print("|---|---|---|")
    for number, (stall, written) in enumerate(zip(saved["stalls"], saved["written"], strict=True)):
        print(f"| {'first' if not number else 'later'} | {stall:.2f} | {written:.1f} |")
    beside, quiet = 1e3 * saved["beside"], 1e3 * saved["quiet"]
    print(f"\na step takes {beside:.0f} ms while it is written, {quiet:.0f} ms else")
    if resumed is None:
        print("one process alone FAILED to go on")
    else:
        gap = abs(resumed["loss"] / saved["loss"] - 1)
        print(
            f"one process alone: loaded step {resumed['step']} in {resumed['seconds']:.1f} s; relative gap of the next"
        )
        print(f"loss to that of {ranks} rank{'s' * (ranks > 1)} {gap:.1e} ({resumed['loss']:.6f}, {saved['loss']:.6f})")
    began = time.perf_counter()
    reader = CheckpointReader(list_checkpoints(folder / "run")[-1])
    reader.verify()
    print(f"CPU: all checksums verified in {time.perf_counter() - began:.1f} s")
    worst = 0.0
    for key, (numel, expected) in saved["sums"].items():
        logical, _, start = key.rpartition("@")
        total = float(reader.range(logical, int(start), numel).double().sum())
        worst = max(worst, abs(total - expected) / max(abs(expected), 1e-3))
    print(f"CPU: sums of {len(saved['sums'])} ranges, largest relative difference to those saved {worst:.1e}")


if __name__ == "__main__":
    main()
