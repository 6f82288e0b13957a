"""The training loop: batches in order, a step each, records, checkpoints, and an orderly stop."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.loader import BatchLoader, BatchSpec
from data.stream import SampleStream
from model.counts import count_parameters, training_flops_per_token
from parallel.heartbeat import Pace, watch_ranks
from parallel.launch import Place
from parallel.watchdog import Progress, watch_progress, write_stacks
from pretrain.assemble import DTYPES, Assembly, assemble, failing_together, open_data, verify_data
from pretrain.checkpoints.averages import Averages
from pretrain.checkpoints.saving import Saver
from pretrain.config import Config, TrainConfig, dump_config
from pretrain.errors import SharedError
from pretrain.evaluate import HeldOut, open_held_out
from pretrain.fp8 import describe_fp8, monitors_fp8
from pretrain.guarding import check_health, check_replicas, guard_of, roll_back, take_step, tell
from pretrain.origin import Origin, write_origin
from pretrain.recorder import Goal, Recorder, SilentRecorder, max_memory_gib, peak_tflops
from pretrain.run_lock import holding_together
from pretrain.state import TrainState, first_state, open_averages, open_saver, resume, save
from pretrain.step import StepResult
from pretrain.timeline import Timeline, TimelineValues


@dataclass
class StopRequest:
    """Whether a signal has asked for a stop after the current step."""

    requested: bool = False


def train(config: Config, place: Place, origin: Origin | None = None) -> bool:
    """Trains until the end that the configuration sets, from the newest checkpoint if there is one. Where the
    configuration comes from is written into the run's folder, if given.

    Returns False when a signal stopped it before; a checkpoint of the last step is there either way. Processes must
    have been joined. Raises UserError, on all ranks alike, before the first step, and its GuardError later;
    LostRankError as `watch_ranks` does.
    """
    guards, log = config.guards, config.run.folder / "log"
    pace, before_end = Pace(limit=guards.lost_after), partial(write_stacks, log, place.rank)
    # A launcher that sees the loss of a rank sends SIGTERM; what is waited for then is the name of that rank.
    with catch_stop_signals() as stop, watch_ranks(place, pace, before_end), holding_together(config.run.folder, place):
        with failing_together():
            stream = open_data(config)
            held_out = open_held_out(config) if config.train.validate_every else None
        if config.data.verify:
            verify_data(stream, place)
        run = assemble(config, place, stream)
        with failing_together():
            if origin and place.is_first:
                write_origin(config.run.folder, origin, place.device)
        with watch_progress(place, log, guards.timeout) as progress:
            if guards.check_health:
                check_health(run)
            state = resume(run) or first_state(run)
            while True:
                progress.made()
                ended = _train_from(run, state, held_out, stop, progress)
                if not ended.rolls_back:
                    return config.train.is_end(ended.state.step, ended.state.tokens)
                state = roll_back(run, ended.state)


@dataclass(frozen=True)
class _Ended:
    """The state in which the loop ended, and whether it is to go on from the newest checkpoint, with the samples after
    this state."""

    state: TrainState
    rolls_back: bool = False


def _train_from(
    run: Assembly, state: TrainState, held_out: HeldOut | None, stop: StopRequest, progress: Progress
) -> _Ended:
    with failing_together():
        recorder = _open_recorder(run, state)
    with recorder:
        recorder.say(_describe_start(run, state))
        if run.config.precision.fp8 != "off":
            recorder.say(describe_fp8(run.config, run.model.execution.fp8.config))
        return _loop(run, state, held_out, recorder, stop, progress)


def _loop(
    run: Assembly,
    state: TrainState,
    held_out: HeldOut | None,
    recorder: Recorder,
    stop: StopRequest,
    progress: Progress,
) -> _Ended:
    saver, averages = open_saver(run), open_averages(run, state)
    saved_step = state.step if state.step else None
    train_config = run.config.train
    meter = _Meter(run)
    with _open_batches(run, state) as batches:
        for batch in batches:
            values, before = run.timeline.at(state.tokens), state
            state, result, verdict = take_step(
                run,
                state,
                batch,
                values,
                stop_requested=stop.requested,
                monitors_fp8=monitors_fp8(run.config, state.step + 1),
            )
            if averages and not result.skipped:
                averages.update()
            metrics = meter.measure(state, values, result)
            metrics["checkpoint_failed"] = saver.failed
            if held_out and (
                state.step % train_config.validate_every == 0 or train_config.is_end(state.step, state.tokens)
            ):
                metrics["val_loss"] = held_out.loss(run.executor, run.place, train_config.micro_batch_size)
            recorder.record(metrics)
            if verdict != "fine":
                tell(run, recorder, before, state, verdict, result)
            if verdict == "spike" and run.config.guards.on_spike == "rollback":
                with suppress(SharedError):
                    saver.finish()
                return _Ended(state, rolls_back=True)
            if _is_due(state.step, run.config.checkpoint.every):
                _save(run, state, saver, averages)
                saved_step = state.step
            elif _is_due(state.step, run.config.guards.check_replicas_every):
                check_replicas(run, state.step)
            _tell_of_saves(saver, recorder)
            progress.made()
            meter.restart()
            if result.stop_requested:
                break
    if saved_step != state.step:
        _save(run, state, saver, averages)
    try:
        saver.finish()
    finally:
        _tell_of_saves(saver, recorder)
    finished = train_config.is_end(state.step, state.tokens)
    recorder.say("finished" if finished else "stopped as asked; the same command goes on from here")
    return _Ended(state)


def _open_batches(run: Assembly, state: TrainState) -> BatchLoader:
    return BatchLoader(
        run.stream,
        plan_batches(run.timeline, run.stream, state, run.config.train),
        dp_rank=run.mesh.shape.dp_rank(run.place.rank),
        dp_size=run.mesh.shape.dp,
        prefetch=run.config.data.prefetch,
        pin_memory=run.place.device.type == "cuda",
    )


def plan_batches(
    timeline: Timeline, stream: SampleStream, state: TrainState, config: TrainConfig
) -> Iterator[BatchSpec]:
    """The batches from `state` to the end of the run: which samples each takes, at which length."""
    step, tokens, position = state.step, state.tokens, state.position
    while not config.is_end(step, tokens):
        values = timeline.at(tokens)
        if values.seq_len != position.seq_len:
            position = stream.resized(position, values.seq_len)
        yield BatchSpec(position, values.batch_size)
        position = position.advanced(values.batch_size)
        step, tokens = step + 1, tokens + values.batch_size * values.seq_len


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT ask for a stop after the step; a second SIGINT interrupts at once."""
    stop = StopRequest()

    def ask(number: int, _frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """Turns steps into metrics, with the time since `restart`."""

    def __init__(self, run: Assembly) -> None:
        self._run = run
        self._peak = peak_tflops(run.config.logging, run.place.device, DTYPES[run.config.precision.dtype])
        self._flops_per_token: dict[int, float] = {}
        self.restart()

    def restart(self) -> None:
        self._began = time.perf_counter()

    def measure(self, state: TrainState, values: TimelineValues, result: StepResult) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        model = self._run.config.model
        if values.seq_len not in self._flops_per_token:
            self._flops_per_token[values.seq_len] = training_flops_per_token(model, values.seq_len)
        tokens_per_s = values.batch_size * values.seq_len / seconds
        tflops = tokens_per_s * self._flops_per_token[values.seq_len] / self._run.place.world_size / 1e12
        load = result.load.double()
        metrics: dict[str, Any] = {
            "step": state.step,
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
            "max_memory_gib": max_memory_gib(self._run.place.device),
            "load_max_violation": float((load.amax(-1) / load.mean(-1) - 1).max()) if len(load) else 0.0,
            "dead_experts": int((load == 0).sum()),
            "data_position": state.position.sample,
            "skipped": state.skipped,
            "spikes": guard_of(state).spikes,
        }
        metrics.update(result.fp8)
        if state.step % self._run.config.logging.expert_load_every == 0:
            layers = map(str, model.moe_layers)
            metrics["expert_load"] = dict(zip(layers, result.load.tolist(), strict=True))
        return metrics


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(run: Assembly, state: TrainState, saver: Saver, averages: Averages | None) -> None:
    if run.config.guards.check_replicas_every:
        check_replicas(run, state.step)
    save(run, state, saver, averages)


def _tell_of_saves(saver: Saver, recorder: Recorder) -> None:
    for news in saver.news():
        recorder.say(news.line, to_screen=news.is_failure)


def _open_recorder(run: Assembly, state: TrainState) -> Recorder:
    if not run.place.is_first:
        return SilentRecorder()
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.toml").write_text(dump_config(run.config), encoding="utf-8")
    train = run.config.train
    goal = Goal("step", state.step, train.steps) if train.steps else Goal("tokens", state.tokens, train.tokens)
    return Recorder(run.folder, run.config.logging, step=state.step, goal=goal)


def _describe_start(run: Assembly, state: TrainState) -> str:
    parameters = count_parameters(run.config.model).trained
    begin = f"resumed after step {state.step:,}" if state.step else "started"
    processes = f"{run.place.world_size} process" + ("es" if run.place.world_size > 1 else "")
    return f"{begin}: {run.folder}, {parameters:,} parameters, {processes} on {run.place.device.type}"
