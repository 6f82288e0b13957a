"""Every command of `python -m pretrain`, one after another on one small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import PROJECT, finish, start_training

from pretrain.checkpoints.checkpoint import CheckpointReader, list_checkpoints

SENTENCES = ("def add(a, b):\n    return a + b\n", "for item in items:\n    print(item)\n", "class Thing:\n    pass\n")
OVERRIDES = (
    "model.vocab_size=320",
    "model.hidden_size=32",
    "train.steps=3",
    "train.validate_every=3",
    "train.seq_len=32",
    "data.cross_document_attention=false",
    "logging.expert_load_every=1",
)


def run(*arguments: object, module: str = "pretrain", expect: int = 0, folder: Path = PROJECT) -> str:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, its tokens, and a run of three steps."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text").mkdir()
    for number in range(60):
        text = "".join(SENTENCES[(number + shift) % 3] * (number % 5 + 1) for shift in range(3))
        (folder / "text" / f"{number:02d}.py").write_text(f"# file {number}\n{text}")
    run(
        "prepare",
        folder / "text",
        "--out",
        folder / "data",
        "--train-tokenizer",
        320,
        "--validation",
        0.2,
        module="data",
    )
    overrides = (*OVERRIDES, f"run.dir={folder}", f'data.datasets=[{{ path = "{folder}/data" }}]')
    finish(start_training(Path("configs/tiny.toml"), *overrides))
    return folder


def test_run_folder(trained: Path) -> None:
    names = {path.name for path in (trained / "tiny").iterdir()}
    assert names == {
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "log.txt",
        "events.jsonl",
        "lock",
        "origin.json",
    }
    last = json.loads((trained / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = [
        "step",
        "tokens",
        "loss",
        "lm_loss",
        "mtp_loss",
        "balance_loss",
        "lr",
        "bias_update_speed",
        "mtp_weight",
        "batch_size",
        "grad_norm",
        "step_time_s",
        "tokens_per_s",
        "tflops_per_gpu",
        "mfu",
        "max_memory_gib",
        "load_max_violation",
        "dead_experts",
        "data_position",
        "skipped",
    ]
    assert set(wanted) <= last.keys()
    assert last["val_loss"] > 0
    assert last["loss"] == pytest.approx(last["lm_loss"] + 0.3 * last["mtp_loss"] + 1e-4 * last["balance_loss"])


def test_eval_beside_ngrams(trained: Path) -> None:
    output = run("eval", trained / "tiny", "--data", trained / "data", "--baselines")
    for row in ("step-00000003", "interpolated bigram", "unigram"):
        assert row in output
    last = json.loads((trained / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['val_loss']:.4f}" in output
    assert "no dataset at nowhere" in run("eval", trained / "tiny", "--data", "nowhere", expect=2)


def test_eval_at_another_length(trained: Path) -> None:
    evaluate = ("eval", trained / "tiny", "--data", trained / "data")
    assert " 40 held-out tokens" in f" {run(*evaluate, '--seq-len', 20, '--samples', 2)}"
    refusal = run(*evaluate, "--seq-len", 163840, expect=2)
    assert "sequences of 163840 tokens cannot be scored" in refusal
    assert "choose with --seq-len" in refusal
    assert "allow 2 to" in run(*evaluate, "--seq-len", 1, expect=2)


def test_generate_continues_the_prompt(trained: Path) -> None:
    prompt = "for item in"
    first = run("generate", trained / "tiny", "--prompt", prompt, "--max-new-tokens", 12)
    assert first.startswith(prompt)
    assert first == run("generate", trained / "tiny", "--prompt", prompt, "--max-new-tokens", 12, "--decompress")
    drawn = [
        run("generate", trained / "tiny", "--prompt", prompt, "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "--prompt is empty" in run("generate", trained / "tiny", "--prompt", "", expect=2)


def test_export_and_import_give_the_same_back(trained: Path) -> None:
    run("export", trained / "tiny", trained / "exported")
    run("import", trained / "exported", trained / "imported")
    run("export", trained / "imported", trained / "again")
    first, second = (load_file(trained / name / "model.safetensors") for name in ("exported", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    for name in ("config.json", "tokenizer.model"):
        assert (trained / "exported" / name).read_bytes() == (trained / "again" / name).read_bytes()
    original = CheckpointReader(list_checkpoints(trained / "tiny")[-1])
    imported = CheckpointReader(trained / "imported")
    for name in original.manifest.shapes:
        assert torch.equal(original.parameter(name), imported.parameter(name)), name
    text = [
        run("generate", trained / name, "--prompt", "class", "--max-new-tokens", 8) for name in ("tiny", "imported")
    ]
    assert text[0] == text[1]
    assert "is not an empty folder" in run("export", trained / "tiny", trained / "exported", expect=2)
    assert "exists; name a new folder" in run("import", trained / "exported", trained / "imported", expect=2)


def test_report_is_one_page(trained: Path) -> None:
    path = Path(run("report", trained / "tiny").strip())
    assert path == trained / "tiny" / "report.html"
    assert "http://" not in path.read_text().replace("http://www.w3.org", "")
    assert "no metrics" in run("report", trained, expect=2)


def test_plan_prints_the_saving_of_the_cache() -> None:
    output = run("plan", "configs/dsv3_671b.toml", "--world-size", 1024)
    assert "98.2 %" in output
    assert "671" in output


def test_help_from_an_empty_folder(tmp_path: Path) -> None:
    assert "example: python -m pretrain train" in run("--help", folder=tmp_path)
    for command in ("train", "plan", "report", "watch", "export", "import", "eval", "generate"):
        assert f"pretrain {command}" in run(command, "--help", folder=tmp_path)


def test_data_that_does_not_fit_is_refused_before_the_first_step(trained: Path) -> None:
    here = (f"run.dir={trained}", "run.name=refused", "train.seq_len=32")
    data = f'data.datasets=[{{ path = "{trained}/data" }}]'
    output = finish(start_training(Path("configs/tiny.toml"), *here, data, "model.vocab_size=300"), expect=2)
    assert "300" in output
    assert "vocab_size" in output
    output = finish(
        start_training(Path("configs/tiny.toml"), *here, data, "model.vocab_size=320", "train.batch_size=6"), expect=2
    )
    assert "train.batch_size = 6 must be a multiple of train.micro_batch_size" in output
    assert [path.name for path in (trained / "refused").iterdir()] == ["lock"]
