"""What it costs to see: steps that are watched beside steps that are not, in one run.

    python benchmarks/metrics_cost.py                                        # about 2 minutes on two cores
    torchrun --nproc-per-node 2 benchmarks/metrics_cost.py --set parallel.pp=2 --set parallel.schedule='"dualpipev"'

Steps of configs/tiny.toml on random tokens, records and TensorBoard included, in turns: one without anything of
`[logging]`, then one at which some of it is due: what is due in every step, in every 10th (loads and use of experts),
in every 100th (parts, ranks, and the timeline of the pipeline, which is due less often still). Of each pair the watched
step comes first half of the time. The medians of the ratios, weighted by how often each is due, are the cost, in
seconds of the wall and in seconds that this process computed, which others on the machine disturb far less.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.loader import Batch, BatchSpec  # noqa: E402
from data.stream import DataPosition  # noqa: E402
from parallel.launch import Place, find_place, join_processes, leave_processes  # noqa: E402
from parallel.zero import load_deepspeed  # noqa: E402
from pretrain.assemble import Assembly, assemble  # noqa: E402
from pretrain.config import Config, load_config  # noqa: E402
from pretrain.logging_config import LoggingConfig  # noqa: E402
from pretrain.meter import Meter  # noqa: E402
from pretrain.recorder import Goal, Recorder, SilentRecorder  # noqa: E402
from pretrain.state import TrainState  # noqa: E402
from pretrain.step import train_step  # noqa: E402
from pretrain.watching import watches_of  # noqa: E402

# A step at which so much is due, and in which share of all steps that is so.
KINDS = {"every step": (1001, 0.9), "every 10th": (1010, 0.09), "every 100th": (2000, 0.01)}
QUIET = LoggingConfig(
    every=10**9, expert_load_every=10**9, fp8_every=0, phases_every=0, parts_every=0, ranks_every=0, timeline_every=0
)
WARM_UP, GOAL = 3, 1.01


@dataclass
class Side:
    """A run under some `[logging]`, sharing everything else with the other."""

    run: Assembly
    meter: Meter
    recorder: Recorder

    def step(self, number: int, batch: Batch) -> tuple[float, float]:
        """Seconds of a step with this number: of the wall, and of this process."""
        run, values = self.run, self.run.timeline.at(10**6)
        state = TrainState(number, number * 1000, batch.spec.position)
        began, computed = time.perf_counter(), time.process_time()
        self.meter.restart(number)
        run.executor.clock.switch("other")
        result = train_step(run, batch, values, stop_requested=False, watches=watches_of(run.config, number))
        self.recorder.record(self.meter.measure(state, values, result))
        return time.perf_counter() - began, time.process_time() - computed


def open_side(run: Assembly, logging: LoggingConfig, name: str) -> Side:
    """One of the two."""
    config = replace(run.config, logging=logging, run=replace(run.config.run, name=name))
    run = replace(run, config=config)
    goal = Goal("step", 0, None)
    return Side(
        run, Meter(run), Recorder(run.folder, logging, step=0, goal=goal) if run.place.is_first else SilentRecorder()
    )


def random_batch(config: Config, dp: int) -> Batch:
    """This rank's share."""
    extra = 1 + config.model.num_nextn_predict_layers
    size = config.train.batch_size or 1
    tokens = torch.randint(0, config.model.vocab_size, (size // dp, config.train.seq_len + extra)).to(torch.int32)
    spec = BatchSpec(DataPosition(0, config.train.seq_len, (0,)), size)
    return Batch(spec, tokens, torch.zeros_like(tokens))


def measure(config: Config, place: Place, pairs: int) -> dict[str, list[tuple[float, ...]]]:
    """Ratios of watched to unwatched steps, of the wall and computed, by kind."""
    run = assemble(config, place, None)  # type: ignore[arg-type]
    plain, watched = open_side(run, QUIET, "plain"), open_side(run, config.logging, "watched")
    batch = random_batch(config, run.mesh.shape.dp)
    ratios: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    for number, _ in KINDS.values():
        for _ in range(WARM_UP):
            plain.step(number, batch)
            watched.step(number, batch)
    for pair in range(pairs):
        for kind, (number, _) in KINDS.items():
            sides = (plain, watched) if pair % 2 else (watched, plain)
            seconds = {id(side): side.step(number, batch) for side in sides}
            both = zip(seconds[id(watched)], seconds[id(plain)], strict=True)
            ratios[kind].append(tuple(one / other for one, other in both))
    for side in (plain, watched):
        side.recorder.__exit__(None, None, None)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "configs" / "tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    parser.add_argument("--pairs", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, place = tempfile.mkdtemp(), find_place()
    try:
        config = load_config(arguments.config, [*arguments.set, f"run.dir={folder}", "logging.every=1000000"])
        load_deepspeed()
        join_processes(place)
        ratios = measure(config, place, arguments.pairs)
        if place.is_first:
            report(ratios, place.world_size)
        leave_processes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(ratios: dict[str, list[tuple[float, ...]]], world_size: int) -> None:
    """Prints a line for each kind, and the cost of all."""
    for which, name in enumerate(("wall", "computed")):
        total = 0.0
        for kind, pairs in ratios.items():
            found = [pair[which] for pair in pairs]
            low, _, high = quantiles(found, n=4)
            total += KINDS[kind][1] * median(found)
            print(f"{name:8} {kind:11} {median(found):.4f} (middle half {low:.4f} to {high:.4f}, n = {len(found)})")
        print(f"{name:8} all         {total:.4f} on {world_size} processes, goal {GOAL}")


if __name__ == "__main__":
    main()
