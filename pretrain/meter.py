"""Turns steps into metrics, and measures where their time goes."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from data.shards import write_atomically
from model.counts import training_flops_per_token
from parallel.schedule import actions_of
from parallel.simulate import Span, Timeline
from parallel.spans import Run, measured_timeline, newest_run
from pretrain.assemble import DTYPES, Assembly
from pretrain.guards import GUARDS, GuardState
from pretrain.logging_config import is_due
from pretrain.recorder import max_memory_gib, peak_tflops
from pretrain.state import TrainState
from pretrain.step import StepResult
from pretrain.timeline import TimelineValues

PIPELINE = "pipeline.json"
_FIRST_TIMELINE = 2  # The first step also builds what is used later.


class Meter:
    """The metrics of one step after another, each with the time since `restart`."""

    def __init__(self, run: Assembly) -> None:
        self._run, self._clock = run, run.executor.clock
        self._peak = peak_tflops(run.config.logging, run.place.device, DTYPES[run.config.precision.dtype])
        self._flops_per_token: dict[int, float] = {}
        self._saved_s, self._times = 0.0, [(0.0, 0.0)] * 2
        self._unread: tuple[int, Run] | None = None

    def restart(self, step: int) -> None:
        """A step begins, with waiting for its data."""
        late = self._clock.is_late
        self._clock.start(runs=self._is_timed(step) or (late and self._is_timed(step + 1)), spans=self._is_drawn(step))
        self._clock.switch("data")
        self._began = time.perf_counter()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Surrounds what is saved after a step, whose time the next step tells."""
        began = time.perf_counter()
        yield
        self._saved_s += time.perf_counter() - began

    def measure(self, state: TrainState, values: TimelineValues, result: StepResult) -> dict[str, Any]:
        """Ends a step. A collective of each pipeline at steps whose timeline is drawn."""
        seconds = time.perf_counter() - self._began
        self._clock.stop()
        self._times = [self._times[-1], (seconds, self._saved_s)]
        self._saved_s = 0.0
        metrics = self._numbers(state, values, result, seconds)
        metrics.update(result.seen)
        logging = self._run.config.logging
        if self._run.place.is_first and is_due(state.step, logging.phases_every):
            metrics.update(self._phases())
        if is_due(state.step, logging.expert_load_every):
            layers = map(str, self._run.config.model.moe_layers)
            metrics["expert_load"] = dict(zip(layers, result.load.tolist(), strict=True))
        self._draw(state.step)
        return metrics

    def _numbers(self, state: TrainState, values: TimelineValues, result: StepResult, seconds: float) -> dict[str, Any]:
        if values.seq_len not in self._flops_per_token:
            self._flops_per_token[values.seq_len] = training_flops_per_token(self._run.config.model, values.seq_len)
        tokens_per_s = values.batch_size * values.seq_len / seconds
        tflops = tokens_per_s * self._flops_per_token[values.seq_len] / self._run.place.world_size / 1e12
        load = result.load.double()
        return {
            "step": state.step,
            "time": time.time(),
            "tokens": state.tokens,
            "loss": result.loss,
            "lm_loss": result.lm_loss,
            "mtp_loss": result.mtp_loss,
            "balance_loss": result.balance_loss,
            "lr": values.learning_rate,
            "bias_update_speed": values.bias_update_speed,
            "mtp_weight": values.mtp_weight,
            "batch_size": values.batch_size,
            "world_size": self._run.place.world_size,
            "seq_len": values.seq_len,
            "grad_norm": result.grad_norm,
            "step_time_s": seconds,
            "tokens_per_s": tokens_per_s,
            "tflops_per_gpu": tflops,
            "mfu": tflops / self._peak if self._peak else None,
            "max_memory_gib": max_memory_gib(self._run.place.device, self._run.executor.dispatcher.num_bytes),
            "load_max_violation": float((load.amax(-1) / load.mean(-1) - 1).max()) if len(load) else 0.0,
            "dead_experts": int((load == 0).sum()),
            "data_position": state.position.sample,
            "skipped": state.skipped,
            "spikes": GuardState.from_json(state.extra.get(GUARDS)).spikes,
        }

    def _phases(self) -> dict[str, Any]:
        """Seconds of the step by phase; on a GPU, of the step before, whose work has ended."""
        found = self._clock.late.seconds()
        seconds, saved = self._times[0 if self._clock.is_late else 1]
        if not found or not seconds:
            return {}
        phases = {phase: found.get(phase, 0.0) for phase in ("data", "forward", "backward")}
        phases |= {phase: found.get(phase, 0.0) for phase in ("all_to_all", "pipeline", "optimizer")}
        other = max(seconds - sum(phases.values()), 0.0)
        return {"phases": {**phases, "save": saved, "other": other}}

    def _is_timed(self, step: int) -> bool:
        logging = self._run.config.logging
        phases = self._run.place.is_first and is_due(step, logging.phases_every)
        return phases or is_due(step, logging.ranks_every)

    def _is_drawn(self, step: int) -> bool:
        every, shape = self._run.config.logging.timeline_every, self._run.mesh.shape
        is_wanted = is_due(step, every) or (every > 0 and step == _FIRST_TIMELINE)
        return is_wanted and shape.pp > 1 and self._run.place.rank in shape.pipelines()[0]

    def _draw(self, step: int) -> None:
        """Writes the timeline of the pipeline when all of it has passed: at once, or after the next step."""
        run = self._run
        if self._unread is None and self._is_drawn(step):
            self._unread = step, newest_run(run.executor)
            if self._clock.is_late:
                return
        if self._unread is None:
            return
        (drawn, past), self._unread = self._unread, None
        timeline = measured_timeline(past, run.mesh.pipeline, run.place.device)
        if run.place.is_first:
            text = json.dumps(pipeline_json(timeline, step=drawn, schedule=run.config.parallel.schedule))
            write_atomically(run.folder / PIPELINE, text.encode())


def pipeline_json(timeline: Timeline, *, step: int, schedule: str) -> dict[str, Any]:
    """What `pipeline.json` holds: for each pipeline rank [kind, stage, micro-batch, start, end] of every action, in
    seconds; both of an overlapped pair have the same times."""
    return {
        "step": step,
        "schedule": schedule,
        "num_ranks": timeline.schedule.num_ranks,
        "num_micro_batches": timeline.schedule.num_micro_batches,
        "spans": [_rows(spans) for spans in timeline.spans],
    }


def _rows(spans: Sequence[Span]) -> list[list[Any]]:
    return [
        [action.kind.value, action.stage, action.micro_batch, span.start, span.end]
        for span in spans
        for action in actions_of(span.step)
    ]
