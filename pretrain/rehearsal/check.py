"""Whether a rehearsal went as the run's timeline says, read off its metrics alone.

Every step is compared with the original timeline at the tokens it stands for, not with the one the rehearsal ran by.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.rehearsal.axis import piecewise
from pretrain.rehearsal.scale import Rehearsal, values_of_run

Metrics = dict[str, Any]
_NAMES = {
    "learning_rate": "lr",
    "bias_update_speed": "γ",
    "mtp_weight": "MTP",
    "batch_size": "batch",
    "seq_len": "length",
}
_RELATIVE = 1e-9
_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3))


@dataclass(frozen=True)
class Crossing:
    """A boundary of the run, named after what changes there, and its tokens; the metrics of the rehearsal's steps on
    both sides, none after the end of the run; and what is wrong with them."""

    name: str
    original: float
    before: Metrics | None
    after: Metrics | None
    mistakes: tuple[str, ...]


def check_stretch(rehearsal: Rehearsal, number: int, lines: Sequence[Metrics], steps: int) -> list[str]:
    """What is wrong with the steps of one stretch, given all steps so far; nothing if they are as the timeline says and
    go on where the stretch before ended."""
    first, last = rehearsal.axis.rehearsed[number : number + 2]
    mistakes = []
    state: Metrics = {"step": 0, "tokens": 0, "data_position": 0, "seq_len": rehearsal.config.train.seq_len}
    count = 0
    for line in lines:
        if first <= state["tokens"]:
            count += 1
            mistakes += [f"step {line['step']:,}: {text}" for text in _mistakes(rehearsal, state, line)]
        state = line
    if not last <= state["tokens"]:
        mistakes.append(f"ends after {state['tokens']:,} tokens, before the boundary at {last:,.0f}")
    if count < steps:
        mistakes.append(f"{count} steps, fewer than {steps}")
    return mistakes


def _mistakes(rehearsal: Rehearsal, before: Metrics, line: Metrics) -> list[str]:
    found = []
    size, length = line["batch_size"], line["seq_len"]
    wanted = {"step": before["step"] + 1, "tokens": before["tokens"] + size * length}
    if length == before["seq_len"]:
        wanted["data_position"] = before["data_position"] + size
    found += [f"{key} {line[key]:,} instead of {value:,}" for key, value in wanted.items() if line[key] != value]
    expected = values_of_run(rehearsal, line["tokens"] - size * length)
    for key, value in expected.items():
        slack = rehearsal.multiple / 2 + 1e-6 if key == "batch_size" else _RELATIVE * abs(value)
        if abs(line[key] - value) > slack:
            found.append(f"{key} {line[key]:g} instead of {value:g}")
    for key in ("loss", "grad_norm"):
        if line[key] is None or not math.isfinite(line[key]):
            found.append(f"{key} is not finite")
    if line["skipped"] != before.get("skipped", 0):
        found.append("was skipped")
    return found


def crossings(rehearsal: Rehearsal, lines: Sequence[Metrics], mistakes: Sequence[Sequence[str]]) -> list[Crossing]:
    """Every boundary with the steps beside it and the mistakes of the stretches on both sides, as many as were made."""
    begins = [line["tokens"] - line["batch_size"] * line["seq_len"] for line in lines]
    result = []
    for number, original in enumerate(rehearsal.axis.original[1:]):
        tokens = rehearsal.axis.rehearsed[number + 1]
        before = [line for line, begin in zip(lines, begins, strict=True) if begin < tokens <= line["tokens"]]
        after = [line for line, begin in zip(lines, begins, strict=True) if begin >= tokens]
        is_end = original == rehearsal.axis.original[-1]
        found = [text for stretch in mistakes[number : number + 2] for text in stretch]
        if not found and not (before and (after or is_end)):
            found = ["not crossed"]
        name = "end" if is_end else _what_changes(rehearsal, original)
        sides = before[-1] if before else None, after[0] if after else None
        result.append(Crossing(name, original, *sides, tuple(dict.fromkeys(found))))
    return result


def _what_changes(rehearsal: Rehearsal, tokens: float) -> str:
    """The values of which a piece ends here."""
    names = [
        _NAMES.get(name, name)
        for name, pieces in piecewise(rehearsal.original.timeline)
        if any(piece.until is not None and piece.until == tokens for piece in pieces)
    ]
    return ", ".join(names) or "half of the run"


def row_of(crossing: Crossing) -> list[str]:
    """Where a boundary is and each value before and after it."""

    def both(show: str, key: str) -> str:
        sides = [side for side in (crossing.before, crossing.after) if side is not None]
        return " → ".join(dict.fromkeys(format(side[key], show) for side in sides))

    return [
        crossing.name,
        _exact(crossing.original),
        both(",", "step"),
        both(".3g", "lr"),
        both("g", "batch_size"),
        both("g", "bias_update_speed"),
        both("g", "mtp_weight"),
        both(".3f", "loss"),
    ]


def _exact(tokens: float) -> str:
    """As many digits as tell boundaries apart."""
    unit, size = next(((unit, size) for unit, size in _UNITS if tokens >= size), ("", 1.0))
    return f"{tokens / size:.5g}{unit}"
