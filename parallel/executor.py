"""Runs the schedule of a pipeline on one rank: forward and backward passes of its chunks, sends and receives.

The schedule decides everything; the executor owns the tensors. What a step needs from another rank is asked for where
the lowered schedule says so and waited for when the step begins; what it gives is sent without waiting. Chunks that
follow one another on one rank hand over directly. One rank without a pipeline is the same code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch import distributed as dist

from model.linear import WeightGradients, Work
from parallel.chunk import Chunk, LossWeights, MicroBatch, Outcome
from parallel.clock import Clock, Moment
from parallel.mesh import Mesh
from parallel.schedule import Action, Kind, Overlapped, Schedule, ScheduleName, Step, make_schedule
from parallel.simulate import Op, Recv, Send, lower
from parallel.tape import Steps, Tape, leave_out, pauses_left_out, run_in_turns, run_to_end, without_gradients

Place = tuple[int, int]
NO_WEIGHTS = LossWeights(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Executed:
    """A step of the schedule, and when it ran, without waiting for what it needs: `Clock.now`, so on a GPU when it was
    launched, if spans are not marked."""

    step: Step
    start: Moment
    end: Moment


class Executor:
    """The pipeline of one rank. `chunks` are those of its stages; `defers` says whether weight gradients may wait.
    `executed` lists the steps of the newest run, `clock` hears what it does."""

    def __init__(
        self, chunks: Mapping[int, Chunk], *, mesh: Mesh, schedule: ScheduleName, defers: bool, clock: Clock
    ) -> None:
        self.chunks = dict(chunks)
        self.clock = clock
        self.mesh = mesh
        self.defers = defers
        self.executed: list[Executed] = []
        self.ranks = next(ranks for ranks in mesh.shape.pipelines() if mesh.rank in ranks)
        self._name = schedule
        self._place = mesh.shape.pp_rank(mesh.rank)
        chunk = next(iter(self.chunks.values()))
        self._model, self.dispatcher = chunk.model, chunk.dispatcher
        self._lowered = lru_cache(maxsize=8)(self._lower)

    def train(self, batches: Sequence[MicroBatch], weights: LossWeights) -> Outcome:
        """Adds up the gradients of the weighted losses of all micro-batches; returns the plain sums. All ranks of a
        pipeline must bring the same micro-batches."""
        schedule, ops = self._lowered(len(batches))
        return self._perform(schedule, ops, batches, weights, training=True)

    def evaluate(self, batches: Sequence[MicroBatch]) -> Outcome:
        """The losses alone."""
        schedule, _ = self._lowered(len(batches) + len(batches) % 2)
        forward = forward_only(schedule, len(batches))
        return self._perform(forward, lower(forward)[self._place], batches, NO_WEIGHTS, training=False)

    def _perform(
        self,
        schedule: Schedule,
        ops: Sequence[Op],
        batches: Sequence[MicroBatch],
        weights: LossWeights,
        *,
        training: bool,
    ) -> Outcome:
        run = _Run(self, schedule, batches, weights, training=training)
        with self._model.execution.fp8.constant_weights():
            self._run_ops(run, ops)
        self.executed = run.executed
        return run.outcome

    def _run_ops(self, run: "_Run", ops: Sequence[Op]) -> None:
        for is_transfer, group in groupby(ops, lambda op: isinstance(op, Send | Recv)):
            if is_transfer:
                with self.clock.phase("pipeline"):
                    run.transfer([op for op in group if isinstance(op, Send | Recv)])
            else:
                for op in group:
                    assert isinstance(op, Action | Overlapped)
                    run.perform(op)
        run.finish()

    def schedule(self, num_micro_batches: int) -> Schedule:
        """What all ranks of the pipeline do with so many micro-batches."""
        return self._lowered(num_micro_batches)[0]

    def _lower(self, num_micro_batches: int) -> tuple[Schedule, tuple[Op, ...]]:
        schedule = make_schedule(self._name, num_ranks=len(self.ranks), num_micro_batches=num_micro_batches)
        return schedule, lower(schedule)[self._place]


def forward_only(schedule: Schedule, num_micro_batches: int) -> Schedule:
    """The first forward passes of a schedule, one micro-batch after another."""
    steps = tuple(
        tuple(
            Action(Kind.FORWARD, stage, number)
            for number in range(num_micro_batches)
            for stage in schedule.stages_of(place)
            if schedule.rank_of(stage, number) == place
        )
        for place in range(schedule.num_ranks)
    )
    return replace(schedule, steps=steps)


@dataclass
class _Live:
    """A forward pass whose backward pass is to come."""

    tape: Tape
    x: Tensor | None
    out: Tensor | None


class _Run:
    """The tensors of one run of a schedule, by (stage, micro-batch) of the pass that consumes them."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        batches: Sequence[MicroBatch],
        weights: LossWeights,
        *,
        training: bool,
    ) -> None:
        self._executor, self._schedule, self._batches = executor, schedule, batches
        self._weights, self._training = weights, training
        self._model, self._clock = executor._model, executor.clock
        self._weight_gradients: WeightGradients = self._model.execution.weight_gradients
        self._given: dict[str, dict[Place, Tensor]] = {"activation": {}, "gradient": {}}
        self._asked: dict[tuple[str, Place], dist.Work] = {}
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._live: dict[Place, _Live] = {}
        self._weight_work: dict[Place, list[Work]] = {}
        self.executed: list[Executed] = []
        self.outcome = Outcome(torch.zeros(3, dtype=torch.float64, device=batches[0].tokens.device))

    def transfer(self, ops: Sequence[Send | Recv]) -> None:
        """Launches sends and receives together, those of each payload in the order of `ops`."""
        mesh = self._executor.mesh
        for payload, group in (("activation", mesh.pipeline), ("gradient", mesh.pipeline_back)):
            chosen = [op for op in ops if op.payload == payload]
            tensors = [self._outgoing(op) if isinstance(op, Send) else self._incoming(op) for op in chosen]
            if not chosen:
                continue
            launched = [
                dist.P2POp(
                    dist.isend if isinstance(op, Send) else dist.irecv, tensor, self._executor.ranks[op.peer], group
                )
                for op, tensor in zip(chosen, tensors, strict=True)
            ]
            works = dist.batch_isend_irecv(launched)
            # NCCL gives one work for the whole batch.
            works = works * len(chosen) if len(works) < len(chosen) else works
            for op, tensor, work in zip(chosen, tensors, works, strict=True):
                if isinstance(op, Send):
                    self._sent.append((work, tensor))
                else:
                    self._asked[payload, (op.stage, op.micro_batch)] = work
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]

    def _outgoing(self, op: Send) -> Tensor:
        return self._given[op.payload].pop((op.stage, op.micro_batch)).contiguous()

    def _incoming(self, op: Recv) -> Tensor:
        batch, config = self._batches[op.micro_batch], self._model.config
        num_positions = batch.num_positions(config) // self._executor.mesh.shape.cp
        shape = len(batch.tokens), num_positions, config.hidden_size
        dtype = next(self._model.parameters()).dtype
        buffer = torch.empty(shape, dtype=dtype, device=batch.tokens.device)
        self._given[op.payload][op.stage, op.micro_batch] = buffer
        return buffer

    def _take(self, payload: str, place: Place) -> Tensor:
        work = self._asked.pop((payload, place), None)
        if work is not None:
            with self._clock.phase("pipeline"):
                work.wait()
        return self._given[payload].pop(place)

    def perform(self, step: Step) -> None:
        """Runs one step of the schedule."""
        clock = self._clock
        if isinstance(step, Overlapped):
            forward, backward = step.forward, step.backward
            live, live_backward = self._begin(forward), self._live_with_gradient(backward)
            start = clock.now()
            with self._deferring(backward):
                out = self._run_in_turns(forward, live, backward, live_backward)
            self._end_forward(forward, live, out)
            self._end_backward(backward, live_backward)
        elif step.kind == Kind.FORWARD:
            live, start = self._begin(step), clock.now()
            with clock.phase("forward"):
                self._end_forward(step, live, run_to_end(self._forward(step, live)))
        elif step.kind == Kind.WEIGHT_GRAD:
            start = clock.now()
            with clock.phase("backward"):
                for work in self._weight_work.pop((step.stage, step.micro_batch)):
                    work()
        else:
            live, start = self._live_with_gradient(step), clock.now()
            with self._deferring(step), clock.phase("backward"):
                run_to_end(live.tape.backward())
            self._end_backward(step, live)
        self.executed.append(Executed(step, start, clock.now()))

    def _run_in_turns(self, forward: Action, live: _Live, backward: Action, live_backward: _Live) -> Tensor | None:
        chunks, clock = self._executor.chunks, self._clock
        unneeded = pauses_left_out(
            chunks[backward.stage].count_turns(backward=True), chunks[forward.stage].count_turns(backward=False)
        )
        passes = (
            clock.during("backward", live_backward.tape.backward()),
            clock.during("forward", self._forward(forward, live)),
        )
        return run_in_turns(leave_out(passes[0], unneeded[0]), leave_out(passes[1], unneeded[1]))

    def _begin(self, action: Action) -> _Live:
        place = action.stage, action.micro_batch
        x = None if action.stage == 0 else self._take("activation", place).requires_grad_(self._training)
        late = self._weight_gradients if self._executor.defers else None
        return _Live(Tape(recording=self._training, weight_gradients=late), x, None)

    def _forward(self, action: Action, live: _Live) -> Steps[Tensor | None]:
        batch = self._batches[action.micro_batch]
        steps = self._executor.chunks[action.stage].forward(live.tape, live.x, batch, self._weights, self.outcome)
        return steps if self._training else without_gradients(steps)

    def _end_forward(self, action: Action, live: _Live, out: Tensor | None) -> None:
        if out is not None:
            self._given["activation"][action.stage + 1, action.micro_batch] = out.detach()
        if self._training:
            live.out = out
            self._live[action.stage, action.micro_batch] = live

    def _live_with_gradient(self, action: Action) -> _Live:
        place = action.stage, action.micro_batch
        live = self._live.pop(place)
        if live.out is not None:
            live.out.grad = self._take("gradient", place)
        return live

    def _end_backward(self, action: Action, live: _Live) -> None:
        if action.kind == Kind.INPUT_GRAD:
            self._weight_work[action.stage, action.micro_batch] = self._weight_gradients.take()
        if live.x is not None:
            assert live.x.grad is not None
            self._given["gradient"][action.stage - 1, action.micro_batch] = live.x.grad

    @contextmanager
    def _deferring(self, action: Action) -> Iterator[None]:
        self._weight_gradients.deferring = self._executor.defers and action.kind == Kind.INPUT_GRAD
        try:
            yield
        finally:
            self._weight_gradients.deferring = False

    def finish(self) -> None:
        """Waits for what is still being sent. Nothing else may be left."""
        with self._clock.phase("pipeline"):
            for work, _ in self._sent:
                work.wait()
        assert not self._live
        assert not self._weight_work
        assert not any(self._given.values())
