"""Metrics as they should be are accepted; each planted fault is named."""

from typing import Any

import pytest
from support import PROJECT

from pretrain.config import load_config
from pretrain.rehearsal.check import check_stretch, crossings, row_of
from pretrain.rehearsal.scale import Rehearsal, make_rehearsal


@pytest.fixture(scope="module")
def plan() -> Rehearsal:
    config = load_config(PROJECT / "configs" / "dsv3_671b.toml")
    return make_rehearsal(config, vocab_size=2048, processes=16, steps=2)


def as_planned(plan: Rehearsal) -> list[dict[str, Any]]:
    lines, position = [], 0
    for step, tokens in enumerate(plan.starts(), 1):
        values = plan.config.full_timeline.at(tokens)
        position += values.batch_size
        lines.append(
            {
                "step": step, "tokens": tokens + values.batch_size * values.seq_len, "data_position": position,
                "loss": 7.5, "grad_norm": 0.5, "skipped": 0, "lr": values.learning_rate,
                "bias_update_speed": values.bias_update_speed, "mtp_weight": values.mtp_weight,
                "batch_size": values.batch_size, "seq_len": values.seq_len,
            }
        )  # fmt: skip
    return lines


def check_all(plan: Rehearsal, lines: list[dict[str, Any]]) -> list[list[str]]:
    ends = plan.axis.rehearsed[1:]
    seen = [[line for line in lines if line["tokens"] - line["batch_size"] * line["seq_len"] < end] for end in ends]
    return [check_stretch(plan, number, some, 2) for number, some in enumerate(seen)]


def test_a_rehearsal_as_planned(plan: Rehearsal) -> None:
    lines = as_planned(plan)
    mistakes = check_all(plan, lines)
    assert mistakes == [[]] * 6
    rows = crossings(plan, lines, mistakes)
    assert not any(row.mistakes for row in rows)
    assert [row_of(row)[:6] for row in rows] == [
        ["lr", "28.033B", "3 → 4", "0.000196 → 0.00022", "4 → 6", "0.001"],
        ["batch", "469B", "17 → 18", "0.00022", "20", "0.001"],
        ["lr, MTP", "10T", "19 → 20", "0.00022 → 0.000141", "20", "0.001"],
        ["lr, γ", "14.3T", "21 → 22", "2.4e-05 → 2.2e-05", "20", "0.001 → 0"],
        ["lr", "14.633T", "23 → 24", "2.2e-05 → 7.3e-06", "20", "0"],
        ["end", "14.8T", "25", "7.3e-06", "20", "0"],
    ]
    assert [row_of(row)[6] for row in rows] == ["0.3", "0.3", "0.3 → 0.1", "0.1", "0.1", "0.1"]


FAULTS = {
    "a learning rate that begins anew": (18, {"lr": 0.0}, "step 18: lr 0 instead of 0.00022"),
    "a learning rate a millionth too large": (2, {"lr": 9.778e-5}, "step 2: lr 9.778e-05 instead of 9.77778e-05"),
    "biases that go on moving": (22, {"bias_update_speed": 0.001}, "step 22: bias_update_speed 0.001 instead of 0"),
    "the MTP weight of before": (20, {"mtp_weight": 0.3}, "step 20: mtp_weight 0.3 instead of 0.1"),
    "a batch that does not grow": (6, {"batch_size": 4}, "step 6: batch_size 4 instead of"),
    "a step twice": (4, {"step": 3}, "step 3: step 3 instead of 4"),
    "tokens lost": (20, {"tokens": 6_800}, "step 20: tokens 6,800 instead of 7,296"),
    "samples again": (18, {"data_position": 20}, "step 18: data_position 20 instead of"),
    "a loss that is not finite": (9, {"loss": None}, "step 9: loss is not finite"),
    "a step skipped": (9, {"skipped": 1}, "step 9: was skipped"),
}


@pytest.mark.parametrize(("step", "changes", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(plan: Rehearsal, step: int, changes: dict[str, Any], message: str) -> None:
    lines = as_planned(plan)
    lines[step - 1] |= changes
    mistakes = check_all(plan, lines)
    assert any(text.startswith(message) for stretch in mistakes for text in stretch), mistakes
    assert any(row.mistakes for row in crossings(plan, lines, mistakes))


def test_a_rehearsal_that_ends_early(plan: Rehearsal) -> None:
    lines = as_planned(plan)[:18]
    mistakes = [*check_all(plan, lines)[:2], check_stretch(plan, 2, lines, 2)]
    assert mistakes[2] == ["ends after 6,016 tokens, before the boundary at 6,099", "1 steps, fewer than 2"]
    rows = crossings(plan, lines, mistakes)
    assert [bool(row.mistakes) for row in rows] == [False, True, True, True, True, True]
    assert rows[5].mistakes == ("not crossed",)
