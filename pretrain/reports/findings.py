"""What is wrong with a run, in lines for the top of its page.

Each look is a function of the record that yields findings; its threshold stands here with the reason. Medians, and
deviations from medians, decide, so that a fault does not hide itself in what it is compared with."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.reports.loss_spikes import Spike, find_spikes
from pretrain.reports.rank_times import find_slow_ranks
from pretrain.reports.run_record import Event, RunRecord
from pretrain.reports.series import Column, as_number
from pretrain.units import short

# So many are named one by one; the rest is counted.
_MOST_NAMED = 3

# An expert is dead that got no token in at least so many of the newest snapshots in a row, in which it would have had
# so many by the layer's mean: by chance alone, exp(-20), one of 15,616 experts in 30,000 looks.
_DEAD_SNAPSHOTS, _DEAD_EXPECTED = 3, 20.0

# Steps between a spike seen here and one told by the guards, up to which they are the same.
_NEAR = 32

# The fullest expert gets more than twice the mean: it, and the rank that holds it, sets the time of every exchange.
_MAX_VIOLATION = 1.0

# The fullest rank gets more than twice the rows of the mean one: buffers for rows are no longer a small part of memory.
_MAX_RECEIVED = 2.0

# Of a device's memory: the allocator's fragments and the buffers of communication come on top of what is counted, some
# 5 to 8 % of an 80 GB device.
_MEMORY_ODD, _MEMORY_BAD = 0.90, 0.96

# Of the values of a kind that were not zero, rounded to zero. Tiles whose values lie within a factor of 2^15 of their
# largest lose well below 1 %; at 10 %, what is small in a tensor no longer counts.
_FP8_UNDERFLOW = 0.10
# Cut off at the largest value of the format: scales that fit the tensor cut off nothing.
_FP8_OVERFLOW = 0.001

# Of a step's time: batches are made beside the step, so that waiting for them says the loader is too slow.
_DATA_SHARE = 0.05

# Throughput of the last tenth beside that of the first half, with the same batch, length and ranks.
_SLOWED = 0.80
_MIN_STEPS_OF_SPEED = 50


@dataclass(frozen=True)
class Finding:
    """Something wrong (`is_bad`) or worth knowing, in a sentence."""

    text: str
    is_bad: bool = True


def find(record: RunRecord) -> list[Finding]:
    """All there is, the worst first; empty where nothing is unusual."""
    looks = (
        _dead_experts, _slow_ranks, _loss_spikes, _skipped, _unequal, _failed_saves, _untrained_parts, _memory, _fp8,
        _imbalance, _received, _data, _slowed, _restarts,
    )  # fmt: skip
    found = [finding for look in looks for finding in look(record)]
    return sorted(found, key=lambda finding: not finding.is_bad)


def recent(values: Column, share: int = 5) -> Column:
    """The known values of the last fifth, or another part."""
    part = values[-max(1, -(-len(values) // share)) :]
    return part[np.isfinite(part)]


def _dead_experts(record: RunRecord) -> Iterator[Finding]:
    layers = []
    for name, idle in record.loads.idle.items():
        dead = np.flatnonzero((idle.snapshots >= _DEAD_SNAPSHOTS) & (idle.expected >= _DEAD_EXPECTED))
        if len(dead):
            layers.append((name, dead, idle))
    for name, dead, idle in layers[:_MOST_NAMED]:
        first = dead[np.argmin(idle.step[dead])]
        since = f"step {idle.step[first]:,.0f} ({short(idle.tokens[first])} tokens)"
        if idle.snapshots[first] == idle.seen:
            since = f"the first look, at {since}"
        experts = _list([f"{expert}" for expert in dead], "expert", of=len(idle.step))
        yield Finding(f"Dead expert{'s' * (len(dead) > 1)}: layer {name}, {experts}: no token since {since}.")
    if len(layers) > _MOST_NAMED:
        names = ", ".join(name for name, _, _ in layers[_MOST_NAMED:])
        count = sum(len(dead) for _, dead, _ in layers[_MOST_NAMED:])
        yield Finding(f"Dead experts: {count:,} more in layers {names}.")


def _slow_ranks(record: RunRecord) -> Iterator[Finding]:
    found = find_slow_ranks(record)
    for rank in found[:_MOST_NAMED]:
        yield Finding(
            f"Slow rank: rank {rank.rank} computes {100 * (rank.ratio - 1):.0f} % longer than the median of "
            f"{rank.peers} ({rank.seconds:.3g} s against {rank.seconds / rank.ratio:.3g} s a step), since step "
            f"{rank.since:,.0f}."
        )
    if len(found) > _MOST_NAMED:
        yield Finding(
            f"Slow ranks: {len(found) - _MOST_NAMED:,} more, {_list([str(r.rank) for r in found[3:]], 'rank')}."
        )


def _loss_spikes(record: RunRecord) -> Iterator[Finding]:
    spikes = find_spikes(record)
    for spike in sorted(spikes, key=lambda spike: -spike.size)[:_MOST_NAMED]:
        yield Finding(_describe_spike(spike))
    if len(spikes) > _MOST_NAMED:
        yield Finding(f"Loss spikes: {len(spikes) - _MOST_NAMED:,} more, of {len(spikes):,} in all.")
    told = [event for event in _events(record, "spike") if all(abs(event.step - s.step) > _NEAR for s in spikes)]
    if told:
        steps = _list([f"{event.step:,.0f}" for event in told], "step")
        yield Finding(f"Spikes told by the guards at {steps}; the last: {_first_line(told[-1])}.")


def _describe_spike(spike: Spike) -> str:
    peak = f"{spike.peak:.3f}, {spike.size:+.3f} above the median before"
    if spike.stays:
        return f"Loss jumped at step {spike.step:,.0f} and did not come back: {peak}."
    return f"Loss spike at step {spike.step:,.0f}: {peak}; {spike.num_steps:,} step{'s' * (spike.num_steps > 1)} long."


def _skipped(record: RunRecord) -> Iterator[Finding]:
    steps = skipped_steps(record)
    if steps:
        count = f"{len(steps):,} step{'s' * (len(steps) > 1)}"
        reasons = [event.text.splitlines()[0] for event in _events(record, "skip") if event.text]
        why = f" The last: {reasons[-1]}" if reasons else ""
        yield Finding(f"Skipped: {count} changed no weights, {_list([f'{step:,.0f}' for step in steps], 'step')}.{why}")


def skipped_steps(record: RunRecord) -> list[float]:
    """The steps with which the count of those left out grew, or, without the count, those whose loss is not finite."""
    columns = record.columns
    count = columns["skipped"]
    if not np.isfinite(count).any():
        lost = np.isfinite(columns["lm_loss"]).any() & ~np.isfinite(columns["lm_loss"])
        return [float(step) for step in columns["step"][lost]]
    grown = np.diff(np.nan_to_num(count), prepend=0.0) > 0
    return [float(step) for step in columns["step"][grown]]


def _unequal(record: RunRecord) -> Iterator[Finding]:
    for event in _events(record, "unequal")[-1:]:
        yield Finding(f"Ranks held unlike copies of the weights after step {event.step:,.0f}: {_first_line(event)}")


def _failed_saves(record: RunRecord) -> Iterator[Finding]:
    events = _events(record, "save_failed")
    counted = int((np.diff(np.nan_to_num(record.columns["checkpoint_failed"]), prepend=0.0) > 0).sum())
    count = max(len(events), counted)
    if count:
        last = f"; the last: {_first_line(events[-1])}" if events else ""
        yield Finding(f"Failed saves: {count:,} checkpoint{'s' * (count > 1)} could not be written{last}.")


def _untrained_parts(record: RunRecord) -> Iterator[Finding]:
    for key, values in record.parts.columns.items():
        name, _, metric = key.rpartition("/")
        last = values[np.isfinite(values)][-3:]
        if metric == "grad_norm" and len(last) == 3 and not last.any():
            yield Finding(f"No gradient reaches {name.replace('_', ' ')}: its norm is 0 in the last three records.")


def _memory(record: RunRecord) -> Iterator[Finding]:
    size, used = as_number(record.origin.get("device_memory_gib")), record.columns["max_memory_gib"]
    if not size > 0 or not np.isfinite(used).any():
        return
    most = float(np.nanmax(used))
    if most >= _MEMORY_ODD * size:
        yield Finding(
            f"Memory: {most:.1f} GiB of the device's {size:.1f} GiB are taken, {100 * most / size:.0f} %; the "
            "allocator's fragments come on top.",
            is_bad=most >= _MEMORY_BAD * size,
        )


def _fp8(record: RunRecord) -> Iterator[Finding]:
    for key, values in record.fp8.columns.items():
        last = recent(values)
        middle = float(np.median(last)) if len(last) else 0.0
        kind = key.rpartition("_")[2]
        if key.startswith("fp8_underflow_") and middle > _FP8_UNDERFLOW:
            yield Finding(f"FP8 underflow: {100 * middle:.1f} % of the {kind} values that are not 0 become 0.")
        if key.startswith("fp8_overflow_") and middle > _FP8_OVERFLOW:
            yield Finding(f"FP8 overflow: {100 * middle:.2f} % of the {kind} values are cut off.")


def _imbalance(record: RunRecord) -> Iterator[Finding]:
    last = recent(record.columns["load_max_violation"])
    middle = float(np.median(last)) if len(last) else 0.0
    if middle <= _MAX_VIOLATION:
        return
    of_layers = {
        key.rpartition("/")[0]: float(np.median(known))
        for key, values in record.moe.columns.items()
        if key.endswith("/max_violation") and len(known := recent(values))
    }
    where = f", worst in layer {max(of_layers, key=lambda name: of_layers[name])}" if of_layers else ""
    yield Finding(
        f"Imbalance: the fullest expert of a layer gets {1 + middle:.1f} times the mean load in the last fifth of the "
        f"run{where}.",
        is_bad=False,
    )


def _received(record: RunRecord) -> Iterator[Finding]:
    most, mean = record.received.of("max"), record.received.of("mean")
    last = recent(most / np.where(mean > 0, mean, np.nan))
    if len(last) and np.median(last) > _MAX_RECEIVED:
        yield Finding(
            f"Rows of a rank: the fullest rank receives {np.median(last):.1f} times the rows of the mean one, and "
            "needs memory for them.",
            is_bad=False,
        )
    rounds = recent(record.received.of("rounds_max"))
    if len(rounds) and np.median(rounds) > 1:
        yield Finding(
            f"Rounds: rows were sent to the experts in up to {rounds.max():.0f} rounds; parallel.max_expert_rows is "
            "hit.",
            is_bad=False,
        )


def _data(record: RunRecord) -> Iterator[Finding]:
    phases = record.phases
    names = [name for name in phases.columns if name != "save"]
    if "data" not in names:
        return
    total = np.nansum(phases.matrix(names), 1)
    last = recent(phases.of("data") / np.where(total > 0, total, np.nan), share=2)
    if len(last) and np.median(last) > _DATA_SHARE:
        share = f"{100 * np.median(last):.0f} %"
        yield Finding(f"Data: {share} of a step is spent waiting for the batch; raise data.prefetch.", is_bad=False)


def _slowed(record: RunRecord) -> Iterator[Finding]:
    columns = record.columns
    alike = np.ones(len(columns["step"]), bool)
    for key in ("batch_size", "seq_len", "world_size"):
        alike &= (columns[key] == columns[key][-1]) | ~np.isfinite(columns[key])
    speed = columns["tokens_per_s"][alike]
    speed = speed[np.isfinite(speed)]
    if len(speed) < _MIN_STEPS_OF_SPEED:
        return
    before, now = float(np.median(speed[: len(speed) // 2])), float(np.median(recent(speed, share=10)))
    if now < _SLOWED * before:
        yield Finding(
            f"Slower than before: {short(now)} tokens a second in the last tenth, {short(before)} in the first half.",
            is_bad=False,
        )


def _restarts(record: RunRecord) -> Iterator[Finding]:
    for kind, one, many in (("resume", "Restarted once", "Restarted"), ("rollback", "Rolled back once", "Rolled back")):
        steps = [f"{event.step:,.0f}" for event in _events(record, kind) if np.isfinite(event.step)]
        if steps:
            often = one if len(steps) == 1 else f"{many} {len(steps):,} times"
            yield Finding(f"{often}, after {_list(steps, 'step')}.", is_bad=False)


def _events(record: RunRecord, kind: str) -> list[Event]:
    return [event for event in record.events if event.kind == kind]


def _first_line(event: Event) -> str:
    return next(iter(event.text.splitlines()), "").rstrip(".")


def _list(names: Sequence[str], what: str, of: int = 0) -> str:
    """`expert 5`, `experts 1, 2, 3 and 4 more`, with out of how many."""
    shown = list(itertools.islice(names, 2 * _MOST_NAMED))
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    whole = f" of {of}" if of and len(names) > 1 else ""
    count = f"{len(names):,}{whole} {what}s: " if whole else f"{what}{'s' * (len(names) > 1)} "
    return f"{count}{', '.join(shown)}{more}"
