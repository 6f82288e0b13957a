"""A run that is killed and started again computes the same bits as one that is not."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from support import TIMINGS, finish, read_metrics, start_training, write_run

from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder


def without_timings(run: Path) -> list[dict[str, object]]:
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_metrics(run)]


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    reader.verify()
    kinds = ("param", "exp_avg", "exp_avg_sq", "buffer", "rng")
    return {f"{kind}/{name}": reader.tensor(f"{kind}/{name}") for kind in kinds for name in reader.keys(kind)}


def kill_once_saved(config: Path, checkpoint: Path, processes: int) -> None:
    """Trains until a checkpoint appears, then kills every process at once."""
    process = start_training(config, "run.name=killed", processes=processes)
    while not checkpoint.is_dir():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)
    # torchrun puts its workers into sessions of their own.
    for victim in [process, *psutil.Process(process.pid).children(recursive=True)]:
        victim.kill()
    process.communicate()


@pytest.mark.parametrize(("processes", "dtype"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_killed_run_goes_on_bit_for_bit(tmp_path: Path, processes: int, dtype: str) -> None:
    config = write_run(tmp_path, hidden_size=128, intermediate_size=256)
    config.write_text(config.read_text().replace('dtype = "fp32"', f'dtype = "{dtype}"'))
    finish(start_training(config, "run.name=straight", processes=processes))

    killed = tmp_path / "killed"
    kill_once_saved(config, step_folder(killed, 5), processes)
    assert not step_folder(killed, 12).exists(), "the run ended before it could be killed"
    output = finish(start_training(config, "run.name=killed", processes=processes))
    assert "resumed after step" in output

    straight = tmp_path / "straight"
    assert [line["step"] for line in read_metrics(straight)] == list(range(1, 13))
    assert without_timings(killed) == without_timings(straight)
    expected = saved_tensors(step_folder(straight, 12))
    resumed = saved_tensors(step_folder(killed, 12))
    assert resumed.keys() == expected.keys()
    assert sum(key.startswith("rng/cpu") for key in expected) == processes
    for key, tensor in expected.items():
        assert torch.equal(resumed[key], tensor), key
    state = CheckpointReader(step_folder(straight, 12)).manifest.state
    assert CheckpointReader(step_folder(killed, 12)).manifest.state == state


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_signal_saves_and_exits_75(tmp_path: Path, processes: int) -> None:
    config = write_run(tmp_path)
    run = tmp_path / "small"
    process = start_training(config, "train.steps=100000", "checkpoint.every=0", processes=processes)
    while not (run / "metrics.jsonl").is_file() or len(read_metrics(run)) < 3:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    # torchrun has a status of its own for workers that end with another than 0.
    finish(process, expect=75 if processes == 1 else 1)

    steps = read_metrics(run)[-1]["step"]
    assert step_folder(run, steps).is_dir()
    finish(start_training(config, f"train.steps={steps + 1}"))
    assert [line["step"] for line in read_metrics(run)] == list(range(1, steps + 2))


def test_layouts_agree(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    for processes in (1, 2):
        finish(start_training(config, f"run.name=on{processes}", "train.steps=6", processes=processes))
    for one, two in zip(read_metrics(tmp_path / "on1"), read_metrics(tmp_path / "on2"), strict=True):
        for key in ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
        assert two["data_position"] == one["data_position"]


def test_changed_run_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    finish(start_training(config, "train.steps=1"))
    refused = finish(start_training(config, "model.hidden_size=64"), expect=2)
    assert "model.hidden_size = 64 does not fit checkpoint" in refused
    assert "whose run has 32" in refused
    assert "choose another run.name" in refused
    assert "Traceback" not in refused
    refused = finish(start_training(config, "model.num_experts_per_tok=3"), expect=2)
    assert "model.num_experts_per_tok = 3 does not fit checkpoint" in refused
    refused = finish(start_training(config, "run.seed=8"), expect=2)
    assert "[data] or run.seed changed since checkpoint" in refused


def test_a_run_without_a_good_checkpoint_is_refused(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    finish(start_training(config, "train.steps=1"))
    folder = step_folder(tmp_path / "small", 1)
    path = folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    refused = finish(start_training(config, "train.steps=2"), expect=2)
    damage = r"step-00000001 is damaged: rank-00000\.safetensors is damaged in \S+, which does not match its checksum"
    assert re.search(damage, refused)
    assert "no checkpoint of" in refused
    assert "set aside in" in refused
    assert "step-00000001.damaged: put a good copy in their place" in refused
    assert "Traceback" not in refused
    assert (folder.with_name("step-00000001.damaged") / path.name).read_bytes() == content
    assert re.search(damage, (tmp_path / "small" / "log.txt").read_text())
