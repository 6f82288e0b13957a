"""The training loop: batches in order, a step each, records, checkpoints, and an orderly stop."""

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from data.loader import BatchLoader, BatchSpec
from data.stream import SampleStream
from model.attention import attention_kernel
from model.config import ModelConfig
from model.counts import count_parameters
from model.experts import fused_in
from model.quack import multiplies
from parallel.heartbeat import Pace, watch_ranks
from parallel.launch import Place, gather_texts
from parallel.watchdog import Progress, watch_progress, write_stacks
from pretrain.assemble import DTYPES, Assembly, assemble, failing_together, open_data, verify_data
from pretrain.checkpoints.averages import Averages
from pretrain.checkpoints.saving import Saver
from pretrain.config import Config, TrainConfig, dump_config
from pretrain.errors import GuardError, SharedError
from pretrain.evaluate import HeldOut, open_held_out
from pretrain.fp8 import describe_fp8
from pretrain.guarding import check_health, check_replicas, roll_back, take_step, tell
from pretrain.logging_config import is_due
from pretrain.meter import Meter
from pretrain.origin import Origin, write_origin
from pretrain.recorder import Goal, Recorder, SilentRecorder
from pretrain.run_lock import holding_together
from pretrain.state import TrainState, first_state, open_averages, open_saver, resume, save
from pretrain.timeline import Timeline
from pretrain.trackers import check_trackers
from pretrain.watching import watches_of


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
            check_trackers(config.logging)
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
                    run.executor.dispatcher.close()
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
        recorder.tell("resume" if state.step else "start", state.step, _describe_start(run, state))
        if run.place.device.type == "cuda":
            recorder.say(_describe_attention(run, state))
            model, dtype = run.config.model, DTYPES[run.config.precision.dtype]
            if fused_in(model, dtype, run.model.execution.fp8.config, watched=False) == "bf16":
                recorder.say(_describe_experts(model))
        if run.executor.dispatcher.travels:
            recorder.say(_describe_carriers(run))
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
    averages = open_averages(run, state)
    saver = open_saver(run, averages)
    saved_step = state.step if state.step else None
    train_config, meter = run.config.train, Meter(run)
    with _open_batches(run, state) as batches:
        meter.restart(state.step + 1)
        for batch in batches:
            run.executor.clock.switch("other")
            values, before = run.timeline.at(state.tokens), state
            watches = watches_of(run.config, state.step + 1)
            state, result, verdict = take_step(
                run, state, batch, values, stop_requested=stop.requested, watches=watches
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
                recorder.note("rollback", state.step, "back to the newest checkpoint, without the samples up to here")
                with suppress(SharedError):
                    saver.finish()
                return _Ended(state, rolls_back=True)
            if is_due(state.step, run.config.checkpoint.every):
                with meter.saving():
                    _save(run, state, saver, averages, recorder)
                saved_step = state.step
            elif is_due(state.step, run.config.guards.check_replicas_every):
                _check_replicas(run, state, recorder)
            _tell_of_saves(saver, recorder)
            progress.made()
            meter.restart(state.step + 1)
            if result.stop_requested:
                break
    if saved_step != state.step:
        _save(run, state, saver, averages, recorder)
    try:
        saver.finish()
    finally:
        _tell_of_saves(saver, recorder)
    if train_config.is_end(state.step, state.tokens):
        recorder.tell("finish", state.step, "finished")
    else:
        recorder.tell("stop", state.step, "stopped as asked; the same command goes on from here")
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


def _save(run: Assembly, state: TrainState, saver: Saver, averages: Averages | None, recorder: Recorder) -> None:
    if run.config.guards.check_replicas_every:
        _check_replicas(run, state, recorder)
    save(run, state, saver, averages)


def _check_replicas(run: Assembly, state: TrainState, recorder: Recorder) -> None:
    try:
        check_replicas(run, state.step)
    except GuardError as error:
        recorder.note("unequal", state.step, str(error))
        raise


def _tell_of_saves(saver: Saver, recorder: Recorder) -> None:
    for news in saver.news():
        if news.step is not None:
            recorder.note("save_failed" if news.is_failure else "save", news.step, news.line)
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


def _describe_experts(model: ModelConfig) -> str:
    """Whose products compute those in bf16."""
    if multiplies(model.hidden_size, model.moe_intermediate_size):
        return "experts: QuACK"
    return "experts: torch; QuACK, of the extra `gpu`, is faster on Hopper for sizes that are multiples of 64"


def _describe_carriers(run: Assembly) -> str:
    """What takes rows to experts, hop by hop, and why it is not what it was to be. All ranks must ask."""
    dispatcher, on_gpu = run.executor.dispatcher, run.place.device.type == "cuda"
    carriers = ", then ".join(hop.rows.name for hop in dispatcher.hops)
    why = f", not copy engines: {dispatcher.obstacle}" if dispatcher.obstacle and on_gpu else ""
    ranks = Counter(gather_texts(carriers + why))
    parts = ranks if len(ranks) == 1 else [f"{what} (on {number:,} ranks)" for what, number in ranks.items()]
    return f"rows to experts: {'; '.join(parts)}"


def _describe_attention(run: Assembly, state: TrainState) -> str:
    """Says so where the scores of all pairs of positions are kept, which no plan counts on."""
    model, masked = run.config.model, not run.config.data.cross_document_attention
    # Longer sequences are attended by the same kernel, and need not be tried.
    seq_len, dtype = min(run.timeline.at(state.tokens).seq_len, 4096), DTYPES[run.config.precision.dtype]
    kernel = attention_kernel(model, seq_len, device=run.place.device, dtype=dtype, masked=masked)
    return f"attention: {kernel}" + (", slow and with all scores in memory" if kernel == "math" else "")
