"""One training step of one rank of a large layout, on a machine that could hold nothing of it.

The program that trains is run as it is: model, dispatch, pipeline, ZeRO. Only its tensors have no memory and its other
ranks are not there (`pretrain.planning.fakes`). So every shape fits, every division goes up and every send has its
receive, or the step fails here as it would there; and the bytes of its tensors are counted, not estimated.

Tokens choose experts evenly, as in the estimate of `plan`. The allocator's losses and what lies outside of tensors are
not seen.
"""

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from data.loader import Batch
from model.config import ModelConfig
from model.router import Gate, Route
from parallel.launch import Place
from parallel.schedule import make_schedule
from parallel.simulate import Op, Recv, Send, lower
from parallel.zero import load_deepspeed
from pretrain.assemble import DTYPES, Assembly, assemble
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.planning.activations import NODE_SIZE
from pretrain.planning.fakes import Ledger, Mirror, as_on_gpu, converting_in_place
from pretrain.planning.memory import GIB, Memory, total
from pretrain.planning.plan import plan
from pretrain.step import train_step


@dataclass(frozen=True)
class DryRun:
    """What a step on `rank` came to: bytes of all tensors that it always holds and at the most at once, beside the
    estimate `planned`; steps of the schedule; and the shapes of what it sent to other pipeline ranks and received."""

    rank: int
    held: int
    peak: int
    planned: Memory
    num_micro_batches: int
    num_steps: int
    sent: tuple[tuple[int, ...], ...]
    received: tuple[tuple[int, ...], ...]
    num_collectives: int
    seconds: float

    @property
    def difference(self) -> float:
        """The share by which the peak is above the estimate."""
        return self.peak / self.planned.peak - 1


def dry_run(config: Config, world_size: int, rank: int, *, planned: Memory, on_gpu: bool = True) -> DryRun:
    """Runs a step of as many micro-batches as fill the pipeline, if there are so many. `on_gpu` takes the paths of a
    GPU. Raises UserError, with what does not fit, where the step fails."""
    start = time.perf_counter()
    if config.precision.fp8 != "off":
        raise UserError(
            f'--dry-run cannot run precision.fp8 = "{config.precision.fp8}", whose products are kernels of others; add '
            "--set precision.fp8=off"
        )
    # A step that repeats its bits, which this one has none of, would change settings of the process.
    config = replace(config, run=replace(config.run, deterministic=False))
    place = Place(rank, world_size, rank % NODE_SIZE, torch.device("cpu"), NODE_SIZE)
    mirror, ledger = Mirror(), Ledger()
    paths = as_on_gpu(mirror) if on_gpu else nullcontext()
    with _alone_among(place), FakeTensorMode(), converting_in_place(), mirror, ledger, paths:
        try:
            run = assemble(config, place, cast(Any, None))
            route_evenly(run, mirror)
            batch = _batch(config, run)
            ledger.restart()
            held = ledger.live
            train_step(run, batch, config.full_timeline.at(0), stop_requested=False)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise UserError(f"a step on rank {rank} of {world_size} fails: {lines[0]}") from error
        _check_transfers(run, mirror, batch)
        return DryRun(
            rank=rank,
            held=held,
            peak=ledger.peak,
            planned=planned,
            num_micro_batches=len(batch.tokens) // config.train.micro_batch_size,
            num_steps=len(run.executor.executed),
            sent=tuple(transfer.shape for transfer in mirror.sent),
            received=tuple(transfer.shape for transfer in mirror.received),
            num_collectives=mirror.num_collectives,
            seconds=time.perf_counter() - start,
        )


@contextmanager
def _alone_among(place: Place) -> Iterator[None]:
    """The group of all ranks, of which the others never answer and need not: nothing is sent, no port is opened."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    # What is sent need not be kept.
    with warnings.catch_warnings(), patch.object(FakeWork, "is_completed", lambda _: True):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        load_deepspeed()
        dist.init_process_group("fake", rank=place.rank, world_size=place.world_size, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def even_choices(model: ModelConfig, num_tokens: int) -> Tensor:
    """Experts [T, K], drawn among those of some groups as `Activations` assumes; always the same."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(num_tokens, model.n_group, generator=generator).argsort(-1)
    shape = num_tokens, model.n_group, model.n_routed_experts // model.n_group
    ranks = torch.rand(shape, generator=generator)
    ranks.scatter_(1, groups[:, model.topk_group :, None].expand(-1, -1, shape[2]), -1.0)
    return ranks.flatten(1).topk(model.num_experts_per_tok, dim=-1).indices


def route_evenly(run: Assembly, mirror: Mirror) -> None:
    """Tells the choices of all gates."""
    known: dict[int, Tensor] = {}

    def tell(_gate: object, _inputs: object, route: Route) -> None:
        num_tokens = len(route.experts)
        if num_tokens not in known:
            with _disable_current_modes():
                known[num_tokens] = even_choices(run.config.model, num_tokens)
        mirror.tell(route.experts, known[num_tokens])

    for module in run.model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(tell)


def _batch(config: Config, run: Assembly) -> Batch:
    """This rank's part of the longest sequences of the largest batch, but not more than fill the pipeline."""
    timeline, train = config.full_timeline, config.train
    values = [timeline.at(tokens) for tokens in (0, *timeline.boundaries())]
    most = max(at.batch_size for at in values) // (run.mesh.shape.dp * train.micro_batch_size)
    num_sequences = min(most, max(2 * config.parallel.pp, 2)) * train.micro_batch_size
    length = max(at.seq_len for at in values) + 1 + config.model.num_nextn_predict_layers
    tokens = torch.zeros(num_sequences, length, dtype=torch.int32)
    documents = None if config.data.cross_document_attention else torch.zeros_like(tokens)
    return Batch(cast(Any, None), tokens, documents)


def _check_transfers(run: Assembly, mirror: Mirror, batch: Batch) -> None:
    """Raises UserError if what is sent has another shape than its receiver makes room for, or if two pipeline ranks do
    not send and wait in one order."""
    config, mesh = run.config, run.mesh
    train, parallel, place = config.train, config.parallel, mesh.shape.pp_rank(mesh.rank)
    length = (batch.tokens.shape[1] - 1 - config.model.num_nextn_predict_layers) // mesh.shape.cp
    room = (train.micro_batch_size, length, config.model.hidden_size), DTYPES[config.precision.dtype]
    for shape, dtype, rank in (*mirror.sent, *mirror.received):
        if (shape, dtype) != room:
            raise UserError(
                f"rank {mesh.rank} and rank {rank} pass on {list(shape)} in {dtype}, where a stage gives "
                f"{list(room[0])} in {room[1]}"
            )
    number = len(batch.tokens) // train.micro_batch_size
    ops = lower(make_schedule(parallel.schedule, num_ranks=parallel.pp, num_micro_batches=number))
    expected = [sum(isinstance(op, kind) for op in ops[place]) for kind in (Send, Recv)]
    matched = expected == [len(mirror.sent), len(mirror.received)]
    for payload, peer in product(("activation", "gradient"), range(parallel.pp)):
        for source, target in ((place, peer), (peer, place)):
            matched &= _passed(ops[source], Send, payload, target) == _passed(ops[target], Recv, payload, source)
    if not matched:
        raise UserError(f'the sends and receives of parallel.schedule = "{parallel.schedule}" do not match')


def _passed(ops: Sequence[Op], kind: type[Send] | type[Recv], payload: str, peer: int) -> list[tuple[int, int]]:
    """What is sent to, or waited for from, a peer, in order."""
    return [
        (op.stage, op.micro_batch) for op in ops if isinstance(op, kind) and op.payload == payload and op.peer == peer
    ]


def default_ranks(config: Config, world_size: int) -> tuple[int, ...]:
    """The first rank, one in the middle of the pipeline and the last."""
    return tuple(sorted({0, world_size // config.parallel.pp * (config.parallel.pp // 2), world_size - 1}))


def dry_run_command(config: Config, world_size: int, rank: int | None) -> None:
    """Runs a step of a rank, or of three, and prints what it came to beside the estimate. Raises UserError as `dry_run`
    does."""
    if rank is not None and rank >= world_size:
        raise UserError(f"--rank {rank} must be below --world-size {world_size}")
    planned = plan(config, world_size)
    ranks = default_ranks(config, world_size) if rank is None else (rank,)
    memories = [planned.memories[chosen * config.parallel.pp // world_size] for chosen in ranks]
    # Tensors without memory are made one by one, by one core a rank.
    fork = multiprocessing.get_context("fork")
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar, ProcessPoolExecutor(min(len(ranks), os.cpu_count() or 1), fork, torch.set_num_threads, (1,)) as pool:
        runs = [
            pool.submit(dry_run, config, world_size, chosen, planned=memory)
            for chosen, memory in zip(ranks, memories, strict=True)
        ]
        for _ in bar.track(as_completed(runs), total=len(runs), description="ranks"):
            pass
    results = [run.result() for run in runs]
    Console(highlight=False).print(_table(results))
    print(
        "The step ran without memory, on the paths of a GPU: model, dispatch, pipeline, and DeepSpeed at its end. Its "
        "tensors were counted, not estimated. Tokens chose experts evenly."
    )


def _table(results: Sequence[DryRun]) -> Table:
    table = Table(title="Dry run", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(f"rank {result.rank:,}", justify="right")
    rows: list[tuple[str, Callable[[DryRun], str]]] = [
        ("micro-batches", lambda result: f"{result.num_micro_batches:,}"),
        ("steps of the schedule", lambda result: f"{result.num_steps:,}"),
        ("sends, all received", lambda result: f"{len(result.sent):,}"),
        ("receives, all sent", lambda result: f"{len(result.received):,}"),
        ("collectives", lambda result: f"{result.num_collectives:,}"),
        ("always held, GiB", lambda result: f"{result.held / GIB:.2f}"),
        ("  as planned", lambda result: f"{total(result.planned.held) / GIB:.2f}"),
        ("peak, GiB", lambda result: f"{result.peak / GIB:.2f}"),
        ("  as planned", lambda result: f"{result.planned.peak / GIB:.2f}"),
        ("  above the plan", lambda result: f"{100 * result.difference:+.1f} %"),
        ("seconds", lambda result: f"{result.seconds:.1f}"),
    ]
    for name, show in rows:
        table.add_row(name, *map(show, results))
    return table
