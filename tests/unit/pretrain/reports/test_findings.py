"""What is wrong with a run is named, and nothing else is."""

import json
from pathlib import Path

import pytest
from run_records import Faults, Recipe, write_synthetic_run

from pretrain.reports.findings import Finding, find
from pretrain.reports.loss_spikes import find_spikes
from pretrain.reports.rank_times import find_slow_ranks
from pretrain.reports.run_record import read_record

EIGHT_ALIKE = ("train.batch_size=32",)
A_RANK_EACH = ("parallel.pp=4", "train.batch_size=32")


CLEAN, USUAL = Faults(), Recipe()


def found(folder: Path, faults: Faults = CLEAN, recipe: Recipe = USUAL) -> list[Finding]:
    return find(read_record(write_synthetic_run(folder, recipe, faults)))


@pytest.mark.parametrize("seed", range(4))
def test_a_clean_run_has_no_finding(tmp_path: Path, seed: int) -> None:
    assert found(tmp_path / "run", recipe=Recipe(seed=seed)) == []


@pytest.mark.parametrize("overrides", [EIGHT_ALIKE, A_RANK_EACH])
def test_other_layouts_are_clean_too(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    world_size = 4 if overrides is A_RANK_EACH else 8
    assert found(tmp_path / "run", recipe=Recipe(world_size=world_size, overrides=overrides)) == []


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (Faults(dead=(("2", 5, 120),)), "Dead expert: layer 2, expert 5: no token since step 130 (520K tokens)."),
        (
            Faults(dead=(("1", 2, 0), ("1", 7, 100))),
            "Dead experts: layer 1, 2 of 8 experts: 2, 7: no token since the first look, at step 10 (40.0K tokens).",
        ),
        (Faults(slow=(6, 1.4, 150)), "Slow rank: rank 6 computes 39 % longer than the median of the 4 ranks with"),
        (Faults(slow=(0, 1.25, 0)), "Slow rank: rank 0 computes 2"),
        (Faults(spikes={200: 1.5, 201: 0.9}), "Loss spike at step 200: 3.9"),
        (Faults(skipped=(77, 78)), "Skipped: 2 steps changed no weights, steps 77, 78. The last: step 78: loss or"),
        (Faults(failed_saves=(200,)), "Failed saves: 1 checkpoint could not be written; the last: step 200 not saved"),
        (Faults(memory=78.0), "Memory: 77.9 GiB of the device's 79.6 GiB are taken, 98 %"),
        (Faults(memory=73.0), "Memory: 73.0 GiB of the device's 79.6 GiB are taken, 92 %"),
        (Faults(underflow=0.2), "FP8 underflow: 20.0 % of the gradient values"),
        (Faults(violation=1.6), "Imbalance: the fullest expert of a layer gets 2.7 times the mean load"),
        (Faults(received=3.0), "Rows of a rank: the fullest rank receives 3.0 times"),
        (Faults(data=0.2), "Data: 16 % of a step is spent waiting for the batch"),
        (Faults(slowed_from=200), "Slower than before: "),
        (Faults(resumed=(100, 250)), "Restarted 2 times, after steps 100, 250."),
        (Faults(resumed=(100,)), "Restarted once, after step 100."),
        (Faults(events=({"time": 1, "step": 9, "kind": "unequal", "text": "a\nb"},)), "Ranks held unlike copies"),
        (Faults(events=({"time": 1, "step": 9, "kind": "rollback", "text": "x"},)), "Rolled back once, after step 9."),
        (Faults(events=({"time": 1, "step": 9, "kind": "spike", "text": "norm"},)), "Spikes told by the guards at"),
        (Faults(changes={"parts": {"gates": {"grad_norm": 0.0}}}), "No gradient reaches gates"),
        (Faults(changes={"rounds_max": 2}), "Rounds: rows were sent to the experts in up to 2 rounds"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_the_one_finding(tmp_path: Path, faults: Faults, sentence: str) -> None:
    texts = [finding.text for finding in found(tmp_path / "run", faults)]
    assert len(texts) == 1, texts
    assert texts[0].startswith(sentence)


def test_the_worst_comes_first(tmp_path: Path) -> None:
    findings = found(tmp_path / "run", Faults(resumed=(10,), dead=(("3", 1, 0),), data=0.3))
    assert [finding.is_bad for finding in findings] == [True, False, False]


def test_many_are_counted(tmp_path: Path) -> None:
    dead = tuple((layer, expert, 0) for layer in ("1", "2", "3") for expert in range(7))
    recipe = Recipe(overrides=("model.num_hidden_layers=7", "parallel.ep=2"))
    texts = [finding.text for finding in found(tmp_path / "run", Faults(dead=(*dead, ("5", 1, 0))), recipe)]
    assert texts[0].startswith("Dead experts: layer 1, 7 of 8 experts: 0, 1, 2, 3, 4, 5 and 1 more: ")
    assert texts[-1] == "Dead experts: 1 more in layers 5."


def test_an_expert_that_came_back_or_is_seldom_looked_at_is_not_dead(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", faults=Faults(dead=(("1", 3, 0),)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["expert_load"]["1"][3] = 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find(read_record(folder)) == []
    # Few tokens a look: chance may leave an expert out.
    for line in lines:
        line["expert_load"] = {"1": [1, 0, 2, 1]} if line["step"] % 50 == 0 else None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find(read_record(folder)) == []


def test_a_loss_that_stays_high(tmp_path: Path) -> None:
    texts = [f.text for f in found(tmp_path / "run", Faults(spikes={step: 2.0 for step in range(200, 301)}))]
    assert texts[0].startswith("Loss jumped at step 2")
    assert "did not come back" in texts[0]


def test_longer_sequences_are_no_spike(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[200:]:
        line["lm_loss"] += 1.5
    changed = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(changed)
    assert len(find_spikes(read_record(folder))) == 1
    for line in lines[200:]:
        line["seq_len"] = 4096
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find_spikes(read_record(folder)) == []


def test_ranks_with_other_layers_are_not_compared(tmp_path: Path) -> None:
    """In a pipeline of single ranks the last may take twice as long by its head; what becomes slower is named."""
    one_each = Recipe(world_size=4, overrides=A_RANK_EACH)
    for since, count in ((0, 0), (200, 1)):
        folder = write_synthetic_run(tmp_path / f"{since}", one_each, Faults(slow=(3, 2.0, since)))
        found = find_slow_ranks(read_record(folder))
        assert [(slow.rank, slow.since) for slow in found] == [(3, 200)] * count


def test_a_rank_that_was_repaired_is_not_named(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", Recipe(num_steps=400, parts_every=5), Faults(slow=(2, 1.5, 0)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [slow.rank for slow in find_slow_ranks(read_record(folder))] == [2]
    for line in lines[250:]:
        if "ranks" in line:
            line["ranks"]["busy_s"][2] = line["ranks"]["busy_s"][1]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert find_slow_ranks(read_record(folder)) == []


def test_whatever_lies_there_instead_of_numbers(tmp_path: Path) -> None:
    folder = write_synthetic_run(tmp_path / "run", faults=Faults(resumed=(5,)))
    for odd in (None, [], "x", {"busy_s": ["a", None]}, {"busy_s": {}}, {"1": {"max_violation": "x"}}, {"1": 3}, 1e400):
        line = {key: odd for key in ("ranks", "parts", "moe", "phases", "received_rows", "fp8_x", "rounds_max", "lr")}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 301, "tokens": 1_300_000, **line}) + "\n")
    for name in ("events.jsonl", "pipeline.json", "origin.json"):
        (folder / name).write_bytes(b'{"kind": 3}\n[1]\n{"kind": "resume", "text": "t", "step": 1e999}\n\xff\xfe{torn')
    assert [finding.text[:9] for finding in find(read_record(folder))] in ([], ["Restarted"])
