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
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import torch
from pipeline_bubble import BUBBLE_HEAD, Bubble, measure_bubble
from quick_weights import draw_on_gpu
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from model.config import ModelConfig
from model.transformer import Transformer
from parallel.build import build_executor, build_model, placement
from parallel.chunk import LossWeights, MicroBatch
from parallel.config import ParallelConfig
from parallel.executor import Executor
from parallel.launch import keep_compiled_kernels
from parallel.mesh import Mesh, make_mesh
from parallel.schedule import ScheduleName
from parallel.stages import split_layers
from parallel.zero import load_deepspeed

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
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
GPU_MODEL = replace(
    MODEL,
    vocab_size=8192,
    hidden_size=2048,
    num_attention_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    intermediate_size=8192,
    moe_intermediate_size=1024,
    n_routed_experts=16,
    num_experts_per_tok=4,
    initializer_range=0.006,
)
Ending = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What is run, and how far losses and norms of the sides may differ."""

    model: ModelConfig
    micro_batch_size: int
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    tolerance: float


@dataclass(frozen=True)
class Side:
    """One way to run a step. `step` leaves the gradients of the mean loss on `module`, calls its argument and returns
    that loss, or 0 where it is not known. Eva's have an executor."""

    name: str
    module: nn.Module
    step: Callable[[Ending], float]
    executor: Executor | None = None


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


def make_setting(arguments: argparse.Namespace) -> Setting:
    """What the command line asks for."""
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    precision = (torch.bfloat16, 5e-3) if dtype == "bf16" else (torch.float32, 1e-5)
    if arguments.device == "cpu":
        return Setting(MODEL, arguments.micro_batch_size, 128, torch.device("cpu"), *precision)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return Setting(GPU_MODEL, arguments.micro_batch_size, 4096, device, *precision)


def run_rank(arguments: argparse.Namespace) -> None:
    """Measures each number of micro-batches; the first rank prints the tables."""
    torch.set_num_threads(1)
    setting, deepspeed = make_setting(arguments), load_deepspeed()
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


def micro_batches(setting: Setting, number: int) -> list[MicroBatch]:
    """Random tokens, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    size = setting.micro_batch_size, setting.seq_len + 1
    tokens = (torch.randint(0, setting.model.vocab_size, size, generator=generator) for _ in range(number))
    return [MicroBatch(each.to(setting.device)) for each in tokens]


def make_sides(deepspeed: Any, mesh: Mesh, setting: Setting, number: int, leave_out: Sequence[str]) -> list[Side]:
    """All sides, Eva's DualPipeV first and once more, which shows the noise. Each has weights of its own."""
    batches = micro_batches(setting, number)
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


def build(setting: Setting, parallel: ParallelConfig, mesh: Mesh) -> Transformer:
    """This rank's part, its weights in the dtype of the setting."""
    model = build_model(setting.model, parallel, mesh, seed=0, device=setting.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    return model


def eva_side(schedule: ScheduleName, *, name: str, mesh: Mesh, setting: Setting, batches: list[MicroBatch]) -> Side:
    """Our executor."""
    parallel = ParallelConfig(pp=NUM_RANKS, schedule=schedule)
    model = build(setting, parallel, mesh)
    executor = build_executor(model, parallel, mesh, defers=True)

    def step(end: Ending) -> float:
        model.zero_grad()
        outcome = executor.train(batches, LossWeights(1 / len(batches), 0.0, 0.0))
        end()
        return float(outcome.losses[0]) / len(batches)

    return Side(name, model, step, executor)


def torch_side(*, name: str, mesh: Mesh, setting: Setting, batches: list[MicroBatch], uses_deferred: bool) -> Side:
    """torch's schedule. It splits backward passes by walking autograd's graph or, where `uses_deferred`, as Eva does:
    each layer leaves its weight gradients for later."""
    model = build(setting, FOLDED, mesh)
    deferred = model.execution.weight_gradients

    def take_deferred() -> Callable[[], None]:
        works = deferred.take()

        def run() -> None:
            for work in works:
                work()

        return run

    shape = setting.micro_batch_size, setting.seq_len
    states = torch.empty(*shape, setting.model.hidden_size, dtype=setting.dtype, device="meta", requires_grad=True)
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    stages = [
        PipelineStage(
            Stage(model, index),
            index,
            2 * NUM_RANKS,
            setting.device,
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


def deepspeed_side(deepspeed: Any, *, name: str, mesh: Mesh, setting: Setting, batches: list[MicroBatch]) -> Side:
    """DeepSpeed's engine, which is told nothing of the dtype, without ZeRO, clipping and the reduction over data ranks,
    of which there is one."""
    model = build(setting, FOLDED, mesh)
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
        "train_micro_batch_size_per_gpu": setting.micro_batch_size,
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
