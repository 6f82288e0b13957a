"""Step times of a pipeline: Eva's executor beside torch's ScheduleDualPipeV and DeepSpeed's DualPipeVEngine.

    python benchmarks/pipeline_speed.py                  # a few minutes
    python benchmarks/pipeline_speed.py --rounds 3 --micro-batches 4

Two ranks on gloo, with one thread each, run forward and backward passes of all micro-batches, without an optimizer. All
sides have the same stages: the blocks, embedding and head of Eva's model, with the same weights; all experts are on
every rank. (1f1b has half as many stages, twice as long.) The others run them as ordinary modules under plain autograd.
All losses and gradient norms are compared first, within 1e-5.
Rounds are interleaved, each in another order; a step ends when both ranks have ended it. The table gives medians, and
the median over rounds of the ratio to Eva's DualPipeV in the same round. The processor's time, added up over ranks,
leaves out waiting, and feels less of what else the machine does.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.build import build_executor, build_model, placement
from parallel.chunk import LossWeights, MicroBatch
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, make_mesh
from parallel.schedule import ScheduleName
from parallel.stages import split_layers
from parallel.zero import load_deepspeed

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
SEQ_LEN, MICRO_BATCH_SIZE = 128, 2
TOLERANCE = 1e-5
CPU = torch.device("cpu")
FOLDED = ParallelConfig(pp=NUM_RANKS, schedule="dualpipev")
MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=704,
    moe_intermediate_size=176,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    initializer_range=0.02,
)
Ending = Callable[[], None]


@dataclass(frozen=True)
class Side:
    """One way to run a step. `step` leaves the gradients of the mean loss on `module`, calls its argument and returns
    that loss, or 0 where it is not known."""

    name: str
    module: nn.Module
    step: Callable[[Ending], float]


class Times(NamedTuple):
    """Seconds of a step until both ranks had ended it, and seconds of the processor, added up over ranks."""

    taken: float
    busy: float


class Stage(nn.Module):
    """The layers of one stage as an ordinary module; of the last stage it gives what the head is applied to."""

    def __init__(self, model: Transformer, stage: int) -> None:
        super().__init__()
        stages = split_layers(model.config, 2 * NUM_RANKS)
        is_last = stage == len(stages) - 1
        self.embed_tokens = model.embed_tokens if stage == 0 else nn.Identity()
        self.layers = nn.ModuleList(model.block(index) for index in stages[stage])
        self.norm = model.norm if is_last else nn.Identity()
        self.head = model.lm_head if is_last else None
        self._context = model.training_context

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S] or states [B, S, D] to states."""
        context = self._context(x.shape[1], None)
        x = self.embed_tokens(x)
        for block in self.layers:
            x, _ = block(x, context)
        out: Tensor = self.norm(x)
        return out


class KeptWeights(torch.optim.Optimizer):
    """What DeepSpeed gets for an optimizer: it ends a step and changes nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.end: Ending = lambda: None

    def step(self, closure: Any = None) -> None:
        """Ends the step."""
        self.end()


def main() -> None:
    """Starts the ranks, unless this is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments.rounds, arguments.micro_batches)
        return
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NUM_RANKS), __file__, *sys.argv[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    raise SystemExit(subprocess.run(command, env=environment).returncode)


def run_rank(rounds: int, numbers: Sequence[int]) -> None:
    """Measures each number of micro-batches; the first rank prints the table."""
    torch.set_num_threads(1)
    deepspeed = load_deepspeed()
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_init_required=False)
    mesh = make_mesh(FOLDED.mesh_shape(NUM_RANKS))
    checks, lines = [], []
    for number in numbers:
        sides = make_sides(deepspeed, mesh, micro_batches(number))
        loss, norm = compare(sides)
        checks.append(f"{number} micro-batches: loss {loss:.6f}, gradient norm {norm:.6f} on all sides")
        lines += [f"| {number} | {line} |" for line in rows(sides, measure(sides, rounds))]
    if mesh.rank == 0:
        versions = f"torch {torch.__version__}, deepspeed {version('deepspeed')}"
        print(f"\n{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
        print(f"{versions}, {NUM_RANKS} ranks, medians of {rounds}")
        print("\n".join(checks), end="\n\n")
        print("| micro-batches | side | ms a step (fastest to slowest) | Eva's first is | CPU ms | Eva's first is |")
        print("|---|---|---|---|---|---|")
        print("\n".join(lines))
    dist.destroy_process_group()


def micro_batches(number: int) -> list[MicroBatch]:
    """Random tokens, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    size = MICRO_BATCH_SIZE, SEQ_LEN + 1
    return [MicroBatch(torch.randint(0, MODEL.vocab_size, size, generator=generator)) for _ in range(number)]


def make_sides(deepspeed: Any, mesh: Mesh, batches: list[MicroBatch]) -> list[Side]:
    """All sides, Eva's DualPipeV first and once more, which shows the noise. Each has weights of its own."""
    return [
        eva_side("Eva, dualpipev", "dualpipev", mesh, batches),
        torch_side("torch ScheduleDualPipeV", mesh, batches, uses_deferred=False),
        torch_side("torch ScheduleDualPipeV, Eva's deferred W as `dw_builder`", mesh, batches, uses_deferred=True),
        deepspeed_side("DeepSpeed DualPipeVEngine", deepspeed, mesh, batches),
        eva_side("Eva, dualpipev, once more", "dualpipev", mesh, batches),
        eva_side("Eva, zbv", "zbv", mesh, batches),
        eva_side("Eva, 1f1b", "1f1b", mesh, batches),
    ]


def eva_side(name: str, schedule: ScheduleName, mesh: Mesh, batches: list[MicroBatch]) -> Side:
    """Our executor."""
    parallel = ParallelConfig(pp=NUM_RANKS, schedule=schedule)
    model = build_model(MODEL, parallel, mesh, seed=0, device=CPU)
    executor = build_executor(model, parallel, mesh, defers=True)

    def step(end: Ending) -> float:
        model.zero_grad()
        outcome = executor.train(batches, LossWeights(1 / len(batches), 0.0, 0.0))
        end()
        return float(outcome.losses[0]) / len(batches)

    return Side(name, model, step)


def torch_side(name: str, mesh: Mesh, batches: list[MicroBatch], *, uses_deferred: bool) -> Side:
    """torch's schedule. It splits backward passes by walking autograd's graph or, where `uses_deferred`, as Eva does:
    each layer leaves its weight gradients for later."""
    model = build_model(MODEL, FOLDED, mesh, seed=0, device=CPU)
    deferred = model.execution.weight_gradients

    def take_deferred() -> Callable[[], None]:
        works = deferred.take()

        def run() -> None:
            for work in works:
                work()

        return run

    states = torch.empty(MICRO_BATCH_SIZE, SEQ_LEN, MODEL.hidden_size, device="meta", requires_grad=True)
    tokens = torch.empty(MICRO_BATCH_SIZE, SEQ_LEN, dtype=torch.int64, device="meta")
    stages = [
        PipelineStage(
            Stage(model, index),
            index,
            2 * NUM_RANKS,
            CPU,
            input_args=tokens if index == 0 else states,
            output_args=states,
            group=mesh.pipeline,
            dw_builder=take_deferred if uses_deferred else None,
        )
        for index in placement(FOLDED).stages_of(mesh.rank)
    ]
    schedule = ScheduleDualPipeV(
        stages,
        len(batches),
        loss_fn=lambda hidden, labels: model.lm_head(hidden, labels) / len(batches),
        scale_grads=False,
    )
    inputs, labels = (torch.cat([pair[part] for pair in map(divide, batches)]) for part in (0, 1))

    def step(end: Ending) -> float:
        model.zero_grad()
        losses: list[Tensor] = []
        deferred.deferring = uses_deferred
        if mesh.rank == 0:
            schedule.step(inputs, target=labels, losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        deferred.deferring = False
        end()
        return float(torch.stack(losses).sum()) if losses else 0.0

    return Side(name, model, step)


def deepspeed_side(name: str, deepspeed: Any, mesh: Mesh, batches: list[MicroBatch]) -> Side:
    """DeepSpeed's engine in fp32, without ZeRO, clipping and the reduction over data ranks, of which there is one."""
    model = build_model(MODEL, FOLDED, mesh, seed=0, device=CPU)
    pipe = deepspeed.runtime.pipe
    with redirect_stdout(sys.stderr):
        module = pipe.dualpipev.DualPipeVModule(
            layers=[pipe.module.LayerSpec(Stage, model, index) for index in range(2 * NUM_RANKS)],
            num_stages=NUM_RANKS,
            partition_method="uniform",
            loss_fn=lambda hidden, labels: model.lm_head(hidden, labels),
        )
    optimizer = KeptWeights(list(module.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": len(batches),
        "steps_per_print": None,
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    assert type(engine).__name__ == "DualPipeVEngine"
    engine.pipeline_enable_backward_allreduce = False
    data: Iterator[Any] | None = cycle(map(divide, batches)) if mesh.rank == 0 else None

    def step(end: Ending) -> float:
        optimizer.end = end
        loss = float(engine.train_batch(data))
        return loss if mesh.rank == 0 else 0.0

    return Side(name, module, step)


def divide(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S]."""
    return batch.tokens[:, :-1], batch.tokens[:, 1:]


def compare(sides: Sequence[Side]) -> tuple[float, float]:
    """Loss and gradient norm over all ranks, of the first side. Raises ValueError where those of others differ."""
    found = []
    for side in sides:
        squares = torch.zeros((), dtype=torch.float64)

        def add_up(side: Side = side, squares: Tensor = squares) -> None:
            for parameter in side.module.parameters():
                if parameter.grad is not None:
                    squares.add_(parameter.grad.double().square().sum())

        both = torch.stack([torch.tensor(side.step(add_up), dtype=torch.float64), squares])
        dist.all_reduce(both)
        found.append((float(both[0]), float(both[1].sqrt())))
    for side, numbers in zip(sides, found, strict=True):
        for number, expected in zip(numbers, found[0], strict=True):
            if not abs(number - expected) <= TOLERANCE * expected:
                raise ValueError(f"{side.name} has loss and gradient norm {numbers}, not {found[0]} as {sides[0].name}")
    return found[0]


def measure(sides: Sequence[Side], rounds: int) -> list[list[Times]]:
    """The times of a step of each side, one pair in every round."""
    times: list[list[Times]] = [[] for _ in sides]
    for number in range(-1, rounds):
        for index in Random(number).sample(range(len(sides)), len(sides)):
            dist.barrier()
            start, start_busy = time.perf_counter(), time.process_time()
            sides[index].step(lambda: None)
            busy = torch.tensor(time.process_time() - start_busy, dtype=torch.float64)
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            dist.all_reduce(busy)
            # The first round only warms up.
            if number >= 0:
                times[index].append(Times(float(taken), float(busy)))
    return times


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
