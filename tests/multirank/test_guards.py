"""Faults planted into runs of several ranks: what each costs, and what is said about it."""

import json
import math
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import RUN
from support import read_events, read_metrics, run_ranks, small_model_toml, write_dataset
from torch import Tensor

import pretrain.guarding
import pretrain.loop
from data.loader import Batch
from parallel.chunk import LossWeights
from parallel.launch import Place
from parallel.optimizer import agreed_norm
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.config import load_config
from pretrain.errors import GuardError, SharedError
from pretrain.guarding import check_health
from pretrain.step import StepResult, train_step

BATCH = 4
FLIPPED = 1.0
GUARDS = ["guards.spike_window=8", "guards.max_skipped_in_a_row=3", 'guards.on_spike="skip"']


@dataclass(frozen=True)
class Planted:
    """In the step with these samples, `factor` times a gradient or a state, on one rank or on all (-1); or after it, a
    flipped bit of the tensor called `what`."""

    what: str
    factor: float
    rank: int = -1


TEN_TIMES = Planted("weights of losses", 10.0)


@contextmanager
def planted(run: Assembly, fault: Planted | None) -> Iterator[None]:
    if fault is None or fault.rank not in (-1, run.place.rank):
        yield
        return
    if fault.what == "weights of losses":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "pretrain.step.LossWeights", lambda *weights: LossWeights(*(fault.factor * w for w in weights))
            )
            yield
        return
    if fault.what not in ("gradient", "state"):
        yield
        flip_bit(run, fault.what)
        return
    if fault.what == "gradient":
        hook: Any = run.model.norm.weight.register_hook(lambda gradient: gradient * fault.factor)
    else:
        hook = run.model.norm.register_forward_hook(lambda module, inputs, output: output * fault.factor)
    yield
    hook.remove()


def flip_bit(run: Assembly, name: str) -> None:
    """The lowest bit of the last element."""
    masters = {f"master of {shard.name}": shard.tensors["param"] for shard in run.optimizer.shards()}
    tensor = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers()), **masters}[name]
    raw = tensor.detach().view(-1).view(torch.uint8)
    raw[-tensor.element_size()] ^= 1


def digest(run: Assembly) -> list[bytes]:
    """The bits of all that a skipped step must not change."""
    tensors: list[Tensor] = [tensor for shard in run.optimizer.shards() for tensor in shard.tensors.values()]
    tensors += run.model.expert_biases().values()
    if run.config.parallel.zero_stage < 3:
        tensors += run.model.parameters()
    return [tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def train_with_faults(
    rank: int, world_size: int, path: Path, overrides: list[str], faults: Mapping[int, Planted]
) -> dict[str, Any]:
    """Trains on this rank; `faults` by the number of the first sample. Returns the samples of steps that left
    everything as it was, and the error."""
    unchanged, said = [], ""

    def sabotaged(run: Assembly, batch: Batch, *arguments: Any, **named: Any) -> StepResult:
        before, sample = digest(run), batch.spec.position.sample
        with planted(run, faults.get(sample)):
            result = train_step(run, batch, *arguments, **named)
        if digest(run) == before:
            unchanged.append(sample)
        if sample not in faults or faults[sample].factor != FLIPPED:
            assert result.skipped == (digest(run) == before)
        return result

    pretrain.guarding.train_step = sabotaged
    # The heartbeat needs the store of a real launch.
    pretrain.loop.watch_ranks = lambda *_: nullcontext()
    try:
        pretrain.loop.train(load_config(path, overrides), Place(rank, world_size, rank, torch.device("cpu")))
    except GuardError as error:
        said = str(error)
    return {"unchanged": unchanged, "said": said}


def start(
    folder: Path, *overrides: str, faults: Mapping[int, Planted], world_size: int = 2, steps: int = 12
) -> tuple[list[dict[str, Any]], Path]:
    """A run of `steps` steps of 4 samples."""
    load_deepspeed()
    if not (folder / "data").exists():
        write_dataset(folder / "data")
    path = folder / "run.toml"
    path.write_text(RUN.format(folder=folder, model=small_model_toml(), dtype="fp32", rate=1e-3))
    meeting = folder / f"meeting{len(list(folder.iterdir()))}"
    meeting.mkdir()
    everything = [*GUARDS, f"train.batch_size={BATCH}", f"train.steps={steps}", "logging.tensorboard=false", *overrides]
    answers = run_ranks(world_size, train_with_faults, world_size, path, everything, faults, folder=meeting)
    return answers, folder / "layout"


@pytest.mark.parametrize("what", ["gradient", "state"])
@pytest.mark.parametrize(
    "layout",
    [
        ["precision.dtype=bf16"],
        ["parallel.zero_stage=0"],
        ["parallel.zero_stage=2", "parallel.ep=2"],
        ["parallel.pp=2"],
    ],
    ids=str,
)
def test_one_nan_on_one_rank_costs_one_step_on_all(tmp_path: Path, what: str, layout: list[str]) -> None:
    answers, run = start(tmp_path, *layout, faults={12: Planted(what, math.nan, rank=1)}, steps=6)
    assert [answer["unchanged"] for answer in answers] == [[12]] * 2
    metrics = read_metrics(run)
    assert [line["skipped"] for line in metrics] == [0, 0, 0, 1, 1, 1]
    assert metrics[3]["grad_norm"] is None
    assert (metrics[3]["loss"] is None) == (what == "state")
    log = (run / "log.txt").read_text()
    assert "step 4: loss or gradient not finite, left out; samples 12 to 15" in log
    assert ("\n  rank 1 on " in log) == (what == "state")
    assert "rank 0 on" not in log


@pytest.mark.parametrize("layout", [["parallel.zero_stage=1"], ["parallel.zero_stage=3"]], ids=str)
def test_too_many_in_a_row_stop_with_a_report(tmp_path: Path, layout: list[str]) -> None:
    faults = {sample: Planted("gradient", math.inf, rank=1) for sample in (8, 12, 16)}
    answers, run = start(tmp_path, *layout, faults=faults)
    for answer in answers:
        assert answer["unchanged"] == [8, 12, 16]
        assert answer["said"].startswith("3 steps in a row were not finite (guards.max_skipped_in_a_row = 3)")
        assert "step 5: loss or gradient not finite, left out; samples 16 to 19\n  rank 1 on " in answer["said"]
        assert "its own gradients of norm.weight" in answer["said"]
        assert "rank 0 on" not in answer["said"]
    assert len(read_metrics(run)) == 5
    assert [(event["step"], event["kind"]) for event in read_events(run)][-3:] == [(n, "skip") for n in (3, 4, 5)]


def test_a_spike_right_after_a_resume_is_skipped(tmp_path: Path) -> None:
    spike = {32: TEN_TIMES}
    start(tmp_path, faults={}, steps=8)
    answers, run = start(tmp_path, faults=spike, steps=12)
    assert [answer["unchanged"] for answer in answers] == [[32]] * 2
    metrics = read_metrics(run)
    assert [line["spikes"] for line in metrics[7:]] == [0, 1, 1, 1, 1]
    assert metrics[8]["grad_norm"] == pytest.approx(10 * metrics[7]["grad_norm"], rel=0.5)
    assert "step 9: spike: loss" in (run / "log.txt").read_text()


def test_a_spike_without_the_window_of_the_checkpoint_is_missed(tmp_path: Path) -> None:
    """The planted fault: a run that begins with that step has nothing to compare it with."""
    answers, _ = start(tmp_path, faults={0: TEN_TIMES}, steps=2)
    assert not any(answer["unchanged"] for answer in answers)


def test_a_spike_rolls_back_and_leaves_its_samples_out(tmp_path: Path) -> None:
    rollback = ['guards.on_spike="rollback"', "checkpoint.every=4"]
    answers, run = start(tmp_path, *rollback, faults={24: TEN_TIMES}, steps=10)
    assert [answer["unchanged"] for answer in answers] == [[24]] * 2
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == list(range(1, 11))
    # Steps 1 to 4 of the checkpoint, then what follows the spike of step 7.
    assert [line["data_position"] for line in metrics] == [4, 8, 12, 16, *range(32, 56, 4)]
    assert [line["spikes"] for line in metrics] == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert "resumed after step 4" in (run / "log.txt").read_text()
    events = [(event["step"], event["kind"]) for event in read_events(run)]
    begun, gone_back = [(0, "start"), (4, "save")], [(7, "spike"), (7, "rollback"), (4, "resume")]
    assert events == [*begun, *gone_back, (8, "save"), (10, "save"), (10, "finish")]


def test_rolling_back_again_and_again_ends(tmp_path: Path) -> None:
    rollback = ['guards.on_spike="rollback"', "checkpoint.every=4"]
    faults = {sample: TEN_TIMES for sample in range(20, 80, 4)}
    answers, _ = start(tmp_path, *rollback, faults=faults, steps=10)
    for answer in answers:
        assert "4 times the run came from step 4 to a spike" in answer["said"]


def test_rollback_needs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"guards.on_spike = .rollback. goes back to the newest checkpoint"):
        start(tmp_path, 'guards.on_spike="rollback"', "checkpoint.every=0", faults={})


def test_the_state_of_guards_is_plain_json(tmp_path: Path) -> None:
    _, run = start(tmp_path, faults={}, steps=3)
    manifest = json.loads((run / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    text = json.dumps(manifest)
    assert '"guards"' in text


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("norm.weight", ["precision.dtype=bf16"]),
        ("layers.1.mlp.experts.down_proj", ["parallel.zero_stage=2"]),
        ("layers.1.mlp.gate.e_score_correction_bias", ["parallel.zero_stage=3"]),
        ("master of norm.weight", ["parallel.zero_stage=0", "precision.dtype=bf16"]),
        ("embed_tokens.weight", ["parallel.pp=2", "parallel.schedule=dualpipe"]),
    ],
    ids=str,
)
def test_a_flipped_bit_is_found(tmp_path: Path, name: str, layout: list[str]) -> None:
    fault = {8: Planted(name, FLIPPED, rank=1)}
    overrides = [*layout, "guards.check_replicas_every=1", f"train.batch_size={2 * BATCH}"]
    answers, run = start(tmp_path, *overrides, faults=fault, steps=6)
    for answer in answers:
        assert answer["said"].startswith("step 2: copies of parameters are no longer equal bit for bit:\n")
        assert f"  {name.removeprefix('master of ')}" in answer["said"]
        assert "ranks 0 against 1 (" in answer["said"]
        assert answer["said"].count("against") == 1
    assert len(read_metrics(run)) == 2
    last = read_events(run)[-1]
    assert (last["step"], last["kind"], last["text"]) == (2, "unequal", answers[0]["said"])


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.pp=2", "parallel.schedule=dualpipe", "precision.dtype=bf16"],
        ["parallel.pp=2", "parallel.schedule=zbv"],
        ["parallel.ep=2", "parallel.zero_stage=3"],
    ],
    ids=str,
)
def test_sound_copies_are_equal_after_every_step(tmp_path: Path, layout: list[str]) -> None:
    answers, run = start(tmp_path, *layout, "guards.check_replicas_every=1", "train.batch_size=8", faults={}, steps=3)
    assert not any(answer["said"] for answer in answers)
    assert len(read_metrics(run)) == 3


def look_at_ranks(rank: int, path: Path) -> list[str]:
    """What check_health says: nothing, of too little room, and after rank 3 gave a wrong number to its sums."""
    config = load_config(path, ["parallel.pp=2"])
    run = assemble(config, Place(rank, 4, rank, torch.device("cpu")), open_data(config))
    said = []
    for change in (
        ("pretrain.guarding._free_bytes", lambda folder: 10**12),
        ("pretrain.guarding._free_bytes", lambda folder: 0),
        ("parallel.health.torch.full", lambda *_, **__: torch.tensor(rank + 1 + (rank == 3))),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*change)
            try:
                check_health(run)
                said.append("")
            except SharedError as error:
                said.append(f"{error.exit_status} {error}")
    return said


def test_ranks_are_looked_at(tmp_path: Path) -> None:
    load_deepspeed()
    write_dataset(tmp_path / "data")
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path, model=small_model_toml(), dtype="bf16", rate=1e-3))
    (tmp_path / "meeting").mkdir()
    everyone = run_ranks(4, look_at_ranks, path, folder=tmp_path / "meeting")
    assert everyone == [everyone[0]] * 4
    healthy, no_room, wrong_sum = everyone[0]
    assert healthy == ""
    assert no_room.startswith(f"2 run.dir = '{tmp_path}' has 0.0 GiB free, a checkpoint takes 0.0 GiB; make room")
    assert wrong_sum.startswith("77 these ranks cannot take part:\n")
    assert f"rank 3 on {socket.gethostname()}: a sum over its pipeline, pipeline_back, " in wrong_sum
    assert "rank 1 on" in wrong_sum
    assert "rank 0 on" not in wrong_sum
    assert (tmp_path / "layout" / "unhealthy_hosts").read_text() == f"{socket.gethostname()}\n"


def norms_that_differ(rank: int) -> list[float]:
    cpu = torch.device("cpu")
    last_bit = torch.tensor(1.0 + rank * 2**-23)
    return [agreed_norm(value, cpu) for value in (last_bit, math.nan if rank else 1.0, -1.0, torch.tensor(math.inf))]


def test_ranks_agree_on_the_norm(tmp_path: Path) -> None:
    assert run_ranks(2, norms_that_differ, folder=tmp_path) == [[1 + 2**-23, math.inf, math.inf, math.inf]] * 2
