"""A run begins with what another ended with: weights, expert biases, moments; and with nothing that does not fit."""

from pathlib import Path

import pytest
import torch
from support import run_ranks, write_run

from data.loader import BatchLoader
from model.router import BIAS_NAME
from parallel.launch import Place
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder
from pretrain.config import load_config
from pretrain.errors import SharedError
from pretrain.loop import plan_batches
from pretrain.state import first_state, resume, save
from pretrain.step import train_step
from pretrain.weights import open_weights, write_weights

LONGER = (
    "run.name=longer",
    "train.seq_len=128",
    "model.rope_scaling={factor=2.0, original_max_position_embeddings=64}",
)


def put_together(rank: int, world_size: int, config_file: Path, overrides: tuple[str, ...]) -> Assembly:
    config = load_config(config_file, overrides)
    return assemble(config, Place(rank, world_size, rank, torch.device("cpu")), open_data(config))


def train_and_save(rank: int, config_file: Path, steps: int) -> None:
    run = put_together(rank, 2, config_file, ())
    state = first_state(run)
    with BatchLoader(
        run.stream, plan_batches(run.timeline, run.stream, state, run.config.train), dp_rank=rank, dp_size=2
    ) as batches:
        for _ in range(steps):
            batch = next(batches)
            train_step(run, batch, run.timeline.at(state.tokens), stop_requested=False)
            state = state.after(batch.spec.batch_size, skipped=False)
    save(run, state)


def begin(rank: int, world_size: int, config_file: Path, overrides: tuple[str, ...]) -> dict[str, float]:
    """By kind, how far what a new run begins with is from what the checkpoint holds; and how large that is."""
    run = put_together(rank, world_size, config_file, overrides)
    assert resume(run) is None
    state = first_state(run)
    assert (state.step, state.tokens, state.position.sample, state.position.seq_len) == (0, 0, 0, 128)
    assert run.config.run.init_from is not None
    folder = Path(run.config.run.init_from)
    reader = CheckpointReader(step_folder(folder, 3) if (folder / "checkpoints").is_dir() else folder)
    found: dict[str, float] = {}
    for shard in run.optimizer.shards():
        for kind, tensor in shard.tensors.items():
            known = shard.name in reader.keys(kind)
            there = reader.range(f"{kind}/{shard.name}", shard.start, tensor.numel()) if known else torch.zeros(1)
            found[kind] = max(found.get(kind, 0), float((tensor - there).abs().max()))
            found[f"{kind} size"] = max(found.get(f"{kind} size", 0), float(tensor.abs().max()))
    for name, buffer in run.model.named_buffers():
        if name.endswith(BIAS_NAME):
            there = reader.range(f"buffer/{name}", 0, buffer.numel())
            found["bias"] = max(found.get("bias", 0), float((buffer - there).abs().max()))
            found["bias size"] = max(found.get("bias size", 0), float(buffer.abs().max()))
    for name, parameter in run.model.named_parameters():
        if tuple(parameter.shape) == reader.manifest.shapes[name]:
            there = reader.range(f"param/{name}", 0, parameter.numel()).view_as(parameter)
            found["weights"] = max(found.get("weights", 0), float((parameter.detach().float() - there).abs().max()))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose run has a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("trained")
    load_deepspeed()
    config_file = write_run(folder)
    run_ranks(2, train_and_save, config_file, 3, folder=folder)
    return config_file


@pytest.mark.parametrize(("ranks", "layout"), [(1, ()), (2, ("parallel.ep=2",)), (2, ("parallel.pp=2",))])
def test_a_run_begins_with_the_end_of_another(
    trained: Path, ranks: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = (*LONGER, *layout, f"run.init_from={trained.parent / 'small'}")
    for found in run_ranks(ranks, begin, ranks, trained, overrides, folder=tmp_path):
        assert {name: value for name, value in found.items() if "size" not in name} == {
            "param": 0, "exp_avg": 0, "exp_avg_sq": 0, "bias": 0, "weights": 0,
        }  # fmt: skip
        assert all(value > 0 for name, value in found.items() if "size" in name)


def test_weights_alone_begin_with_fresh_moments(trained: Path, tmp_path: Path) -> None:
    weights = open_weights(trained.parent / "small")
    write_weights(
        tmp_path / "weights", weights.config, weights.tensors(), context_length=64, eos=None, tokenizer_file=None
    )
    overrides = (*LONGER, f"run.init_from={tmp_path / 'weights'}")
    (found,) = run_ranks(1, begin, 1, trained, overrides, folder=tmp_path)
    assert found["param"] == found["bias"] == found["exp_avg size"] == found["exp_avg_sq size"] == 0
    assert found["param size"] > 0


def begin_in_vain(rank: int, config_file: Path, overrides: tuple[str, ...]) -> str:
    run = put_together(rank, 1, config_file, overrides)
    with pytest.raises(SharedError) as caught:
        first_state(run)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("run.init_from=nowhere",), "run.init_from = 'nowhere': there is no such checkpoint"),
        (("model.rope_theta=5000.0",), "model.rope_theta = 5000.0 does not fit checkpoint"),
        (("model.num_nextn_predict_layers=0",), "model.num_nextn_predict_layers = 0 does not fit checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(trained: Path, overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    given = (*LONGER, f"run.init_from={trained.parent / 'small'}", *overrides)
    (said,) = run_ranks(1, begin_in_vain, trained, given, folder=tmp_path)
    assert said.startswith(message)
