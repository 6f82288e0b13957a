"""Carries out what `pretrain.guards` decides."""

from dataclasses import replace
from functools import partial

from data.loader import Batch
from pretrain.assemble import Assembly
from pretrain.errors import GuardError
from pretrain.guards import GUARDS, GuardState, JudgedStep, Verdict, describe, is_applied, judge, report
from pretrain.recorder import Recorder
from pretrain.state import TrainState, resume
from pretrain.step import StepResult, train_step
from pretrain.timeline import TimelineValues


def guard_of(state: TrainState) -> GuardState:
    """What the guards remember."""
    return GuardState.from_json(state.extra.get(GUARDS))


def take_step(
    run: Assembly, state: TrainState, batch: Batch, values: TimelineValues, *, stop_requested: bool, monitors_fp8: bool
) -> tuple[TrainState, StepResult, Verdict]:
    """One step as far as the guards accept it, and the state after it, in which they remember it."""
    config, guard = run.config.guards, guard_of(state).of_length(values.seq_len)
    result = train_step(
        run,
        batch,
        values,
        stop_requested=stop_requested,
        monitors_fp8=monitors_fp8,
        accepts=partial(is_applied, config, guard),
        watches_gradients=guard.not_finite_in_a_row > 0,
    )
    verdict = judge(config, guard, result.loss, result.grad_norm)
    guard = guard.after(config, verdict, result.loss, result.grad_norm)
    state = replace(state, position=batch.spec.position, extra={**state.extra, GUARDS: guard.to_json()})
    return state.after(batch.spec.batch_size, skipped=result.skipped), result, verdict


def tell(
    run: Assembly, recorder: Recorder, before: TrainState, after: TrainState, verdict: Verdict, result: StepResult
) -> None:
    """Says what is wrong with the step between two states. Raises GuardError when it was one too many."""
    config, samples = run.config.guards, range(before.position.sample, after.position.sample)
    step = JudgedStep(after.step, samples, result.loss, result.grad_norm, result.faults)
    description = describe(config, guard_of(before), verdict, step)
    recorder.say(description)
    if guard_of(after).not_finite_in_a_row >= config.max_skipped_in_a_row:
        raise GuardError(report(config, description))


def roll_back(run: Assembly, spiked: TrainState) -> TrainState:
    """Loads the newest checkpoint; the samples up to those of the spike are left out. Where there is none yet, the
    spike alone is. Raises GuardError when a checkpoint has been loaded for this too often."""
    loaded, most = resume(run), run.config.guards.max_skipped_in_a_row
    if loaded is None:
        return spiked
    guard = guard_of(loaded).rolled_back(guard_of(spiked), loaded.step)
    if guard.rollbacks > most:
        raise GuardError(
            f"{guard.rollbacks} times the run came from step {loaded.step:,} to a spike, each time with other samples "
            f"(guards.max_skipped_in_a_row = {most}), last at step {spiked.step:,}; move the newest checkpoints away "
            "to go back further, lower timeline.learning_rate, or raise guards.spike_deviations"
        )
    return replace(loaded, position=spiked.position, extra={**loaded.extra, GUARDS: guard.to_json()})
