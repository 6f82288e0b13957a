"""Comparisons of runs that are there, from their metrics alone, and everything that is refused before any work."""

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support import write_dataset, write_run

from parallel.launch import leave_processes
from pretrain.__main__ import build_parser, main
from pretrain.compare import plan_comparison
from pretrain.config import dump_config, load_config
from pretrain.errors import GAP_TOO_LARGE, UserError

NUM_STEPS = 400


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("compare"))


def losses(bias: float = 0.0, seed: int = 0) -> list[float | None]:
    """A falling loss; with a bias, and noise of its own around it, unless the seed is 0."""
    steps = np.arange(1, NUM_STEPS + 1)
    loss = 3 + 2 * np.exp(-steps / 50) + 0.1 * np.random.default_rng(1).normal(size=NUM_STEPS)
    noise = 0.0005 * np.random.default_rng(seed).normal(size=NUM_STEPS) if seed else 0.0
    return (loss * (1 + bias + noise)).tolist()


def write_metrics(config: Path, folder: Path, loss: list[float | None], *overrides: str, **changes: Any) -> Path:
    """The folder of a run as `train` leaves it, with these losses."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(load_config(config, overrides)))
    lines = [
        {"step": step, "tokens": 512 * step, "batch_size": 8, "lm_loss": value, "loss": value, "skipped": 0}
        for step, value in enumerate(loss, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | changes) + "\n" for line in lines))
    return folder


def compare(a: Path, b: Path, out: Path, *more: object, expect: int = 0) -> dict[str, Any]:
    assert main(["compare", *map(str, (a, b, "--out", out, *more))]) == expect
    return json.loads((out / "compare.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("bias", "status", "verdict"),
    [(0.001, 0, "within"), (0.005, 3, "beyond"), (-0.005, 3, "beyond"), (0.0, 0, "within")],
)
def test_a_bias_in_the_metrics_is_found(config: Path, tmp_path: Path, bias: float, status: int, verdict: str) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    b = write_metrics(config, tmp_path / "b", losses(bias, seed=2), 'precision.dtype="bf16"')
    numbers = compare(a, b, tmp_path / "out", expect=status)
    assert numbers["verdict"] == verdict
    assert numbers["gap"] == pytest.approx(bias, abs=0.0002)
    assert 0 < numbers["noise"] < 0.0004
    assert numbers["steps_averaged"] == 80
    assert numbers["differences"] == {"precision.dtype": {"a": "fp32", "b": "bf16"}}


def test_equal_runs_have_no_gap(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    numbers = compare(a, write_metrics(config, tmp_path / "b", losses()), tmp_path / "out")
    assert (numbers["gap"], numbers["noise"], numbers["differences"]) == (0, 0, {})
    printed = capsys.readouterr().out
    assert "+0.000 %" in printed
    assert "Within the limit: the gap is at most 0.000 %, below 0.25 %." in printed


def test_too_noisy_is_no_pass(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    noise = 1 + 0.02 * np.random.default_rng(3).normal(size=NUM_STEPS)
    b = write_metrics(config, tmp_path / "b", (np.array(losses()) * noise).tolist())
    assert compare(a, b, tmp_path / "out", expect=GAP_TOO_LARGE)["verdict"] == "undecided"
    assert "compare more steps" in capsys.readouterr().out
    assert compare(a, b, tmp_path / "out", "--limit", 5)["verdict"] == "within"


def test_a_loss_that_is_not_finite_is_no_pass(config: Path, tmp_path: Path) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    b = write_metrics(config, tmp_path / "b", [*losses()[:-200], *[None] * 200])
    numbers = compare(a, b, tmp_path / "out", expect=GAP_TOO_LARGE)
    assert (numbers["verdict"], numbers["gap"], numbers["loss_b"]) == ("not_finite", None, None)
    assert compare(a, b, tmp_path / "before", "--steps", 200)["steps"] == 200


def test_other_seeds_give_a_noise_floor(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    b = write_metrics(config, tmp_path / "b", losses(0.001))
    for number, bias in enumerate((0.003, -0.003), 1):
        write_metrics(config, tmp_path / "out" / f"a-seed-{number}", losses(bias))
    numbers = compare(a, b, tmp_path / "out", "--seeds", 2, "--only-report")
    assert numbers["seed_gaps"] == pytest.approx([0.003, -0.003])
    assert numbers["noise_floor"] == pytest.approx(2**0.5 * 0.003)
    assert "0.424 %" in capsys.readouterr().out
    assert "A with other seeds" in (tmp_path / "out" / "compare.html").read_text()


def test_page_and_picture_are_whole(config: Path, tmp_path: Path) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    compare(a, write_metrics(config, tmp_path / "b", losses(0.001)), tmp_path / "out")
    text = (tmp_path / "out" / "compare.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    for part in ("a against b", "Relative gap of the loss", "Loss over the last fifth", "What differs", "+0.100 %"):
        assert part in text, part
    picture = ElementTree.fromstring((tmp_path / "out" / "compare.svg").read_text())
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    words = " ".join(element.text or "" for element in picture.iter())
    assert "limit, 0.25 %" in words
    assert not re.search(r"#00000\d", ElementTree.tostring(picture, encoding="unicode"))


def test_steps_that_only_one_run_has_do_not_count(config: Path, tmp_path: Path) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    b = write_metrics(config, tmp_path / "b", losses()[:250])
    assert compare(a, b, tmp_path / "out")["last_step"] == 250
    assert compare(a, b, tmp_path / "out", "--steps", 100)["last_step"] == 100


def plan(a: Path, b: Path, *overrides_b: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"overrides": [], "steps": None, "num_seeds": 0, "out": None, "limit": 0.0025}
    return plan_comparison((a, b), overrides_b=overrides_b, **(arguments | changes))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("timeline.learning_rate=1e-4", r"timeline\.learning_rate = \[.*\] in A, 0\.0001 in B"),
        ("timeline.batch_size=8", r"timeline\.batch_size = \[.*\] in A, 8.* in B"),
        ("timeline.mtp_weight=0.1", r"timeline\.mtp_weight = 0\.3 in A, 0\.1 in B"),
        ("run.seed=8", "run.seed = 7 in A, 8 in B"),
        ("run.init_seed=8", "run.init_seed = none in A, 8 in B"),
        ("train.seq_len=32", "train.seq_len = 64 in A, 32 in B"),
        ("train.steps=13", "train.steps = 12 in A, 13 in B"),
        ("data.fim_rate=0", "data.fim_rate = 0.5 in A, 0.* in B"),
        ("data.cross_document_attention=true", "data.cross_document_attention = false in A, true in B"),
        ("model.rms_norm_eps=1e-5", r"model\.rms_norm_eps = 1e-06 in A, 1e-05 in B"),
        ("optimizer.beta2=0.9", "optimizer.beta2 = 0.95 in A, 0.9 in B"),
        ("optimizer.clip=0.5", "optimizer.clip = 1.0 in A, 0.5 in B"),
    ],
)
def test_other_samples_models_and_timelines_are_refused(config: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match="must see the same samples") as caught:
        plan(config, config, override)
    assert re.search(message, str(caught.value))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "override",
    [
        'precision.dtype="bf16"',
        "parallel.zero_stage=0",
        'parallel.recompute=["norms"]',
        'optimizer.moments="bf16"',
        "train.micro_batch_size=1",
        "data.prefetch=0",
        "logging.every=1",
        "checkpoint.every=3",
        "run.deterministic=true",
    ],
)
def test_how_it_is_computed_may_differ(config: Path, override: str) -> None:
    comparison = plan(config, config, override)
    assert comparison.b.config.run.folder == comparison.out / "b"


def test_what_is_planned(config: Path, tmp_path: Path) -> None:
    comparison = plan(config, config, steps=50, num_seeds=2, overrides=["run.dir=elsewhere"])
    assert comparison.out == Path("elsewhere/compare-run-run")
    assert [str(side.folder.relative_to(comparison.out)) for side in comparison.trained] == [
        "a", "b", "a-seed-1", "a-seed-2",
    ]  # fmt: skip
    runs = [side.config.run for side in comparison.trained]
    assert [(run.seed, run.weights_seed) for run in runs] == [(7, 7), (7, 7), (7, 8), (7, 9)]
    assert {(side.config.train.steps, side.config.train.tokens) for side in comparison.trained} == {(50, None)}
    folder = write_metrics(config, tmp_path / "baseline", losses())
    comparison = plan(folder, config, out=tmp_path)
    assert [side.folder for side in comparison.trained] == [tmp_path / "b"]
    assert comparison.a.folder == folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    try:
        assert main(["compare", *map(str, arguments)]) == 2
    finally:
        # A command that fails leaves that to the end of its process.
        leave_processes()
    return capsys.readouterr().err


def test_refusals(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "--steps = 9 must be at least 10" in refused(capsys, config, config, "--steps", 9)
    assert "no configuration at nowhere.toml" in refused(capsys, config, "nowhere.toml")
    assert f"no metrics at {empty / 'metrics.jsonl'}" in refused(capsys, empty, a)
    said = refused(capsys, a, config, "--set", "logging.every=1")
    assert f"--set logging.every=1 cannot change {a}" in said
    assert f"--set-b logging.every=1 cannot change {a}" in refused(capsys, config, a, "--set-b", "logging.every=1")
    short = write_metrics(config, tmp_path / "short", losses()[:9])
    assert f"{a} and {short} have 9 steps in common" in refused(capsys, a, short, "--out", tmp_path)
    said = refused(capsys, config, config, "--only-report", "--out", tmp_path / "new")
    assert f"no metrics at {tmp_path / 'new' / 'a' / 'metrics.jsonl'}" in said
    (a / "config.toml").write_text("[run]\nnom = 1\n")
    assert f"{a / 'config.toml'}, which that run has left, cannot be used: run.nom" in refused(capsys, a, config)


@pytest.mark.parametrize(("key", "value"), [("tokens", 100), ("batch_size", 4)])
def test_metrics_of_other_samples_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: int
) -> None:
    a = write_metrics(config, tmp_path / "a", losses())
    b = write_metrics(config, tmp_path / "b", losses(), **{key: value})
    said = refused(capsys, a, b, "--out", tmp_path)
    assert f"step 1 has {key} = {512 if key == 'tokens' else 8} in {a}, but {value} in {b}" in said


def test_other_data_are_refused_before_a_step(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = shutil.copytree(config.parent / "data", tmp_path / "same")
    other = write_dataset(tmp_path / "other", seed=1)
    comparison = plan(config, config, f'data.datasets=[{{ path = "{same}" }}]', out=tmp_path / "out")
    assert comparison.b.config.data.datasets != comparison.a.config.data.datasets
    said = refused(
        capsys, config, config, "--set-b", f'data.datasets=[{{ path = "{other}" }}]', "--out", tmp_path / "out"
    )
    assert "data.datasets of B has other samples than data.datasets of A" in said
    assert not (tmp_path / "out").exists()


def test_arguments_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("--limit", "0"), ("--limit", "nan"), ("--steps", "0"), ("--seeds", "-1")):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["compare", "a.toml", "b.toml", f"{name}={value}"])
        assert f"argument {name}: {value} must be" in capsys.readouterr().err
