"""Carries out what `pretrain.guards` decides."""

import hashlib
import json
import shutil
import socket
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from data.loader import Batch
from data.shards import write_atomically
from model.config import ModelConfig
from model.counts import count_parameters
from model.router import BIAS_NAME
from parallel.equality import Difference, find_differences
from parallel.health import Finding, collect_facts, judge_health, minority
from parallel.launch import gather_texts
from parallel.optimizer import is_expert
from pretrain.assemble import DTYPES, Assembly, failing_together
from pretrain.config import dump_config
from pretrain.errors import GuardError, SharedError, UnhealthyHostsError
from pretrain.guards import (
    GUARDS,
    GuardState,
    JudgedStep,
    Verdict,
    describe,
    is_applied,
    judge,
    report,
    report_differences,
)
from pretrain.recorder import Recorder
from pretrain.state import TrainState, resume
from pretrain.step import StepResult, train_step
from pretrain.timeline import TimelineValues
from pretrain.watching import Watches

UNHEALTHY = "unhealthy_hosts"


def check_health(run: Assembly) -> None:
    """Looks at all ranks. Raises UnhealthyHostsError, with the hosts in RUN/unhealthy_hosts, one a line, or SharedError
    for what is wrong everywhere: both on all ranks."""
    text = dump_config(run.config)
    facts = collect_facts(
        run.place,
        run.mesh,
        run.executor.dispatcher.hops,
        dtype=DTYPES[run.config.precision.dtype],
        config=hashlib.sha256(text.encode()).hexdigest(),
        free_bytes=_free_bytes(run.folder),
    )
    others, _ = minority(facts, lambda fact: fact.config)
    if others:
        raise SharedError(
            f"ranks {', '.join(str(fact.rank) for fact in others)} have another configuration than the rest; start all "
            "of them with the same file and the same --set"
        )
    needed = checkpoint_bytes(run.config.model, run.config.optimizer.moments)
    short = [fact for fact in facts if fact.free_bytes < needed]
    if len(short) == len(facts):
        raise SharedError(
            f"run.dir = {run.config.run.dir!r} has {max(fact.free_bytes for fact in facts) / 2**30:.1f} GiB free, a "
            f"checkpoint takes {needed / 2**30:.1f} GiB; make room, or use another run.dir"
        )
    findings = judge_health(facts)
    findings += [Finding(fact.rank, fact.host, "too little free space for a checkpoint") for fact in short]
    if findings:
        _refuse_hosts(run, findings)


def _refuse_hosts(run: Assembly, findings: list[Finding]) -> None:
    hosts = sorted({finding.host for finding in findings})
    with failing_together():
        if run.place.is_first:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.folder / UNHEALTHY, "".join(f"{host}\n" for host in hosts).encode())
    lines = [f"  rank {finding.rank} on {finding.host}: {finding.what}" for finding in findings]
    raise UnhealthyHostsError(
        "\n".join(["these ranks cannot take part:", *lines])
        + f"\nTheir hosts are listed in {run.folder / UNHEALTHY}; start again without them, or with "
        "guards.check_health = false"
    )


def checkpoint_bytes(model: ModelConfig, moments: str) -> int:
    """How large a checkpoint is: fp32 masters and both moments of every parameter."""
    return count_parameters(model).trained * (4 + 2 * {"fp32": 4, "bf16": 2}[moments])


def _free_bytes(folder: Path) -> int:
    """Where the folder is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_replicas(run: Assembly, step: int) -> None:
    """Compares what several data ranks hold copies of. Raises GuardError, on all ranks, where copies differ. The two
    ends of a pipeline add up the gradients of what they share over other ranks each, so the last bits of that may
    differ."""
    mesh, held = run.mesh, _replicated(run)
    found = [
        *find_differences({name: held[name] for name in held if not is_expert(name)}, mesh.replicas),
        *find_differences({name: held[name] for name in held if is_expert(name)}, mesh.expert_replicas),
    ]
    said = gather_texts(json.dumps({"host": socket.gethostname(), "found": [asdict(item) for item in found]}))
    everywhere = [json.loads(text) for text in said]
    differences = {
        Difference(item["name"], tuple(map(tuple, item["parties"]))): None
        for part in everywhere
        for item in part["found"]
    }
    if differences:
        raise GuardError(report_differences(step, list(differences), [part["host"] for part in everywhere]))


def _replicated(run: Assembly) -> dict[str, Tensor]:
    """Weights, where they are whole, expert biases and, where each rank keeps all of it, the optimizer's state."""
    stage = run.config.parallel.zero_stage
    held = {name: p.detach() for name, p in run.model.named_parameters()} if stage < 3 else {}
    held |= {name: buffer for name, buffer in run.model.named_buffers() if name.endswith(BIAS_NAME)}
    if stage == 0:
        for shard in run.optimizer.shards():
            held |= {f"{shard.name} ({kind})": tensor for kind, tensor in shard.tensors.items()}
    return held


def guard_of(state: TrainState) -> GuardState:
    """What the guards remember."""
    return GuardState.from_json(state.extra.get(GUARDS))


def take_step(
    run: Assembly, state: TrainState, batch: Batch, values: TimelineValues, *, stop_requested: bool, watches: Watches
) -> tuple[TrainState, StepResult, Verdict]:
    """One step as far as the guards accept it, and the state after it, in which they remember it."""
    config, guard = run.config.guards, guard_of(state).of_length(values.seq_len)
    result = train_step(
        run,
        batch,
        values,
        stop_requested=stop_requested,
        watches=watches,
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
    recorder.tell("skip" if verdict == "not finite" else "spike", after.step, description)
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
