"""Ways to run forward and backward passes on the same stages: Eva's executor, torch's schedule, DeepSpeed's engine.

All have the weights and the parts of Eva's model. The others run stages as ordinary modules under plain autograd; where
experts are on several ranks, rows go there and back by Eva's dispatcher, waited for at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from model.attention import AttentionContext
from model.block import Block
from model.config import ModelConfig
from model.experts import RoutedRows
from model.transformer import Transformer
from parallel.build import build_executor, build_model, placement
from parallel.chunk import LossWeights, MicroBatch
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.dispatch import Dispatcher, make_dispatcher
from parallel.executor import Executor
from parallel.mesh import Mesh
from parallel.schedule import ScheduleName
from parallel.stages import split_layers
from parallel.tape import Tape, run_to_end

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
    """What is run, and how far losses and norms of the sides may differ. `parallel` is the layout of a schedule that is
    folded in half."""

    model: ModelConfig
    parallel: ParallelConfig
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


class Stage(nn.Module):
    """The layers of one stage as an ordinary module; of the last stage it gives what the head is applied to."""

    def __init__(self, model: Transformer, stage: int, num_stages: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        is_last = stage == num_stages - 1
        self.embed_tokens = model.embed_tokens if stage == 0 else nn.Identity()
        self.layers = nn.ModuleList(model.block(index) for index in split_layers(model.config, num_stages)[stage])
        self.norm = model.norm if is_last else nn.Identity()
        self.head = model.lm_head if is_last else None
        self._context, self._dispatcher = model.training_context, dispatcher

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, S] or states [B, S, D] to states."""
        context = self._context(x.shape[1], None)
        x = self.embed_tokens(x)
        for block in self.layers:
            x = _run_block(block, x, context, self._dispatcher)
        out: Tensor = self.norm(x)
        return out


def _run_block(block: Any, x: Tensor, context: AttentionContext, dispatcher: Dispatcher) -> Tensor:
    if not dispatcher.travels:
        out: Tensor = block(x, context)[0]
        return out
    attended = block.attend(x, context)
    shared, out = block.shared(attended.normed), attended.residual
    if attended.route is not None:
        rows, route = attended.normed.flatten(0, 1), attended.route
        out = out + _Travel.apply(rows, route.weights, route.experts, block, dispatcher).view_as(out)
    return out if shared is None else out + shared


class _Travel(torch.autograd.Function):
    """Rows to their experts and back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, experts: Tensor, block: Block, dispatcher: Dispatcher
    ) -> Tensor:
        ctx.tape, ctx.leaves = Tape(), [each.detach().requires_grad_() for each in (rows, weights)]
        choices = RoutedRows(ctx.leaves[0], experts, ctx.leaves[1])
        announced = dispatcher.announce(experts)
        with torch.enable_grad():
            steps = dispatcher.run(ctx.tape, choices, announced, block.routed, block.routed, lambda *_: None)
            (ctx.out,) = ctx.tape.cut(run_to_end(steps))
        out: Tensor = ctx.out.detach()
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ctx.out.grad = gradient
        run_to_end(ctx.tape.backward())
        return *(leaf.grad for leaf in ctx.leaves), None, None, None


class KeptWeights(torch.optim.Optimizer):
    """What DeepSpeed gets for an optimizer: it ends a step and changes nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.end: Ending = lambda: None

    def step(self, closure: Any = None) -> None:
        """Ends the step."""
        self.end()


def make_setting(arguments: argparse.Namespace, parallel: ParallelConfig) -> Setting:
    """What the command line asks for."""
    dtype = arguments.dtype or ("bf16" if arguments.device == "cuda" else "fp32")
    precision = (torch.bfloat16, 5e-3) if dtype == "bf16" else (torch.float32, 1e-5)
    if arguments.device == "cpu":
        return Setting(MODEL, parallel, arguments.micro_batch_size, 128, torch.device("cpu"), *precision)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return Setting(GPU_MODEL, parallel, arguments.micro_batch_size, 4096, device, *precision)


def micro_batches(setting: Setting, mesh: Mesh, number: int) -> list[MicroBatch]:
    """Random tokens, others on each data rank."""
    generator = torch.Generator().manual_seed(1 + mesh.shape.dp_rank(mesh.rank))
    size = setting.micro_batch_size, setting.seq_len + 1
    tokens = (torch.randint(0, setting.model.vocab_size, size, generator=generator) for _ in range(number))
    return [MicroBatch(each.to(setting.device)) for each in tokens]


def build(setting: Setting, parallel: ParallelConfig, mesh: Mesh) -> Transformer:
    """This rank's part, its weights in the dtype of the setting."""
    model = build_model(setting.model, parallel, mesh, seed=0, device=setting.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(setting.dtype)
    return model


def _dispatcher(mesh: Mesh, setting: Setting) -> Dispatcher:
    clock = Clock(setting.device)
    return make_dispatcher(setting.parallel, mesh, setting.model.n_routed_experts, device=setting.device, clock=clock)


def eva_side(schedule: ScheduleName, *, name: str, mesh: Mesh, setting: Setting, batches: list[MicroBatch]) -> Side:
    """Our executor."""
    parallel = replace(setting.parallel, schedule=schedule)
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
    model, dispatcher = build(setting, setting.parallel, mesh), _dispatcher(mesh, setting)
    num_stages, place = 2 * setting.parallel.pp, mesh.shape.pp_rank(mesh.rank)
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
            Stage(model, index, num_stages, dispatcher),
            index,
            num_stages,
            setting.device,
            input_args=tokens if index == 0 else states,
            output_args=states,
            group=mesh.pipeline,
            dw_builder=take_deferred if uses_deferred else None,
        )
        for index in placement(setting.parallel).stages_of(place)
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
        if place == 0:
            schedule.step(inputs, target=labels, losses=losses, return_outputs=False)
        else:
            schedule.step(return_outputs=False)
        deferred.deferring = False
        end()
        return float(torch.stack(losses).detach().sum()) if losses else 0.0

    return Side(name, model, step)


def deepspeed_side(deepspeed: Any, *, name: str, mesh: Mesh, setting: Setting, batches: list[MicroBatch]) -> Side:
    """DeepSpeed's engine, which is told nothing of the dtype, without ZeRO, clipping and the reduction over data
    ranks."""
    model, dispatcher = build(setting, setting.parallel, mesh), _dispatcher(mesh, setting)
    num_stages, is_first = 2 * setting.parallel.pp, mesh.shape.pp_rank(mesh.rank) == 0
    pipe = deepspeed.runtime.pipe
    with redirect_stdout(sys.stderr):
        module = pipe.dualpipev.DualPipeVModule(
            layers=[pipe.module.LayerSpec(Stage, model, index, num_stages, dispatcher) for index in range(num_stages)],
            num_stages=setting.parallel.pp,
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
    # It would have all data ranks begin with the same experts.
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    assert type(engine).__name__ == "DualPipeVEngine"
    engine.pipeline_enable_backward_allreduce = False
    data: Iterator[Any] | None = cycle(map(divide, batches)) if is_first else None

    def step(end: Ending) -> float:
        optimizer.end = end
        loss = float(engine.train_batch(data))
        return loss if is_first else 0.0

    return Side(name, module, step)


def divide(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, S]."""
    return batch.tokens[:, :-1], batch.tokens[:, 1:]
