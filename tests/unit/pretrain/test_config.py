"""A configuration is read as written, inherits and is overridden; a mistake in it is told with the key, the value, the
rule and the remedy."""

import tomllib
from pathlib import Path

import pytest
from run_config import RUN
from support import PROJECT

from model.config import RopeScaling
from pretrain.__main__ import main
from pretrain.config import Config, check_layout, dump_config, load_config, parse_config
from pretrain.errors import UserError
from pretrain.timeline import Piece

SHIPPED = sorted((PROJECT / "configs").glob("*.toml"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


def refusal(path: Path, *overrides: str) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_survive_being_written_out(path: Path) -> None:
    config = load_config(path)
    assert parse_config(tomllib.loads(dump_config(config))) == config


def test_all_configurations_of_the_contract_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} == {
        "tiny", "small", "dsv3_2b", "dsv3_16b", "dsv3_671b", "dsv3_671b_32k", "dsv3_671b_128k",
    }  # fmt: skip


def test_numbers_may_be_written_in_any_way(run: Path) -> None:
    config = load(run, "train.steps=1_000", "timeline.learning_rate=1", "train.seq_len=6.4e1")
    assert (config.train.steps, config.train.seq_len) == (1000, 64)
    assert config.timeline.learning_rate == 1.0
    assert type(config.train.seq_len) is int


def test_overrides_replace_single_keys_and_texts_need_no_quotes(run: Path) -> None:
    config = load(run, "run.name=other", 'run.dir="a b"', "optimizer.clip=0.5", "data.datasets=[{path='x', weight=2}]")
    assert (config.run.name, config.run.dir, config.optimizer.clip) == ("other", "a b", 0.5)
    assert config.data.datasets[0].weight == 2.0
    assert config.train == load(run).train
    assert config.run.folder == Path("a b/other")


def test_an_override_reaches_into_nested_tables(run: Path) -> None:
    scaling = "model.rope_scaling"
    config = load(run, f"{scaling}.factor=40", f"{scaling}.original_max_position_embeddings=4096")
    assert config.model.rope_scaling == RopeScaling(factor=40.0, original_max_position_embeddings=4096)


def test_a_base_is_merged_table_by_table_and_found_beside_its_heir(run: Path, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    middle = tmp_path / "deeper" / "middle.toml"
    middle.write_text('base = "../run.toml"\n[train]\nsteps = 7\n[optimizer]\nclip = 2.0\n')
    heir = tmp_path / "heir.toml"
    heir.write_text('base = "deeper/middle.toml"\n[run]\nname = "heir"\n[train]\nseq_len = 32\n')
    config = load(heir)
    assert (config.run.name, config.train.seq_len, config.train.steps, config.optimizer.clip) == ("heir", 32, 7, 2.0)
    assert config.model == load(run).model


def test_pieces_become_a_timeline(run: Path) -> None:
    config = load(run, "timeline.mtp_weight=[{value=0.3, until=10e12}, {value=0.1}]")
    assert config.timeline.mtp_weight == (Piece(value=0.3, until=10e12), Piece(value=0.1))
    assert config.full_timeline.at(11_000_000_000_000).mtp_weight == 0.1


MISTAKES = {
    "a bound that no round can keep": (
        ["parallel.ep=4", "parallel.max_expert_rows=4"],
        "parallel.max_expert_rows = 4 must be above ep = 4, as each of these ranks may send a row in a round; "
        "raise it, or set it to 0 for no bound",
    ),
    "a bound without ranks to send rows": (
        ["parallel.max_expert_rows=64"],
        "parallel.max_expert_rows = 64 has no effect with ep = 1, where no row is sent; remove it",
    ),
    "gathered weights in rounds": (
        ["parallel.ep=2", "parallel.zero_stage=3", "parallel.max_expert_rows=64"],
        "parallel.max_expert_rows = 64 needs zero_stage below 3: expert groups may take different numbers of rounds, "
        "but would gather the experts' weights in each; set it to 0, or lower zero_stage",
    ),
    "unknown key": (
        ["model.hidden_sizes=32"],
        "model.hidden_sizes is not a known key; did you mean 'hidden_size'?",
    ),
    "unknown table": (
        ["modle.hidden_size=32"],
        "modle is not a known key; did you mean 'model'?",
    ),
    "unknown key without a near one": (
        ["precision.zzz=1"],
        "precision.zzz is not a known key; known here: dtype, fp8, fp8_everywhere, fp8_power_of_two",
    ),
    "unknown key in a piece": (
        ["timeline.learning_rate=[{value=1, untill=10}, {value=2}]"],
        "timeline.learning_rate, entry 1: untill is not a known key; did you mean 'until'?",
    ),
    "unknown key of a dataset": (
        ["data.datasets=[{path='a'}, {pth='b'}]"],
        "data.datasets, entry 2: pth is not a known key; did you mean 'path'?",
    ),
    "text for a number": (
        ["train.seq_len=long"],
        "train.seq_len = 'long' must be a whole number",
    ),
    "number in quotes": (
        ["train.seq_len='64'"],
        "train.seq_len = '64' must be a whole number",
    ),
    "fraction for a whole number": (
        ["train.steps=1.5"],
        "train.steps = 1.5 must be a whole number",
    ),
    "truth for a number": (
        ["train.micro_batch_size=true"],
        "train.micro_batch_size = True must be a whole number",
    ),
    "number for a truth": (
        ["run.deterministic=1"],
        "run.deterministic = 1 must be true or false",
    ),
    "number for a text": (
        ["run.name=7"],
        "run.name = 7 must be a text in quotes",
    ),
    "not a number": (
        ["optimizer.eps=nan"],
        "optimizer.eps = nan must be finite",
    ),
    "value for a table": (
        ["model.rope_scaling=yarn"],
        "model.rope_scaling = 'yarn' must be a table",
    ),
    "value for a list": (
        ["data.datasets=somewhere"],
        "data.datasets = 'somewhere' must be a list",
    ),
    "neither number nor pieces": (
        ["timeline.learning_rate=fast"],
        "timeline.learning_rate = 'fast' must be a number or a list",
    ),
    "none of the choices": (
        ["precision.dtype=fp16"],
        "precision.dtype = 'fp16' must be 'bf16' or 'fp32'",
    ),
    "no rank for the layers": (
        ["parallel.pp=0"],
        "parallel.pp = 0 must be at least 1",
    ),
    "a schedule that there is not": (
        ["parallel.schedule=gpipe"],
        "parallel.schedule = 'gpipe' must be '1f1b' or 'zb1p' or 'zbv' or 'dualpipe' or 'dualpipev'",
    ),
    "sharded gradients in a pipeline": (
        ["parallel.pp=2", "parallel.zero_stage=2"],
        "parallel.zero_stage = 2 needs pp = 1, not 2: with a pipeline, gradients and weights are needed whole until "
        "the step ends; use zero_stage = 1",
    ),
    "out of range": (
        ["train.micro_batch_size=0"],
        "train.micro_batch_size = 0 must be at least 1",
    ),
    "out of range with a remedy": (
        ["data.fim_rate=1.5"],
        "data.fim_rate = 1.5 must lie between 0 and 1; the report uses 0.1",
    ),
    "rule of a nested table": (
        ["model.rope_scaling={factor=0.5, original_max_position_embeddings=64}"],
        "model.rope_scaling.factor = 0.5 must be at least 1; the report uses 40",
    ),
    "rule of the model": (
        ["model.topk_group=9"],
        "model.topk_group = 9 must not exceed n_group = 4",
    ),
    "rule inside a list": (
        ["data.datasets=[{path=''}]"],
        "data.datasets.path = '' must name a folder written by `python -m data prepare`",
    ),
    "steps and tokens": (
        ["train.tokens=1e6"],
        "train.steps or tokens says where to stop: both are given, 100 and 1000000; give exactly one",
    ),
    "two batch sizes": (
        ["timeline.batch_size=4"],
        "train.batch_size is constant, timeline.batch_size may change over the run: both are given, "
        "train.batch_size = 8; give exactly one",
    ),
    "prediction deeper than the sequence": (
        ["model.num_nextn_predict_layers=4", "train.seq_len=4"],
        "model.num_nextn_predict_layers = 4 must be below train.seq_len = 4",
    ),
    "two sequence lengths": (
        ["timeline.seq_len=[{value=32, until=1e6}, {value=128}]"],
        "timeline.seq_len starts at 32, but train.seq_len = 64; make them equal",
    ),
    "piece without until": (
        ["timeline.learning_rate=[{value=1e-3}, {value=1e-4}]"],
        "timeline.learning_rate, piece 1: `until` is missing; only a last, constant piece may go without",
    ),
    "pieces out of order": (
        ["timeline.learning_rate=[{value=1, until=10}, {value=2, until=5}, {value=3}]"],
        "timeline.learning_rate, piece 2: until = 5 must be above 10 tokens",
    ),
    "empty batch": (
        ["timeline.batch_size=0"],
        "timeline.batch_size = 0 must be a whole number, at least 1",
    ),
    "batch of a fraction": (
        ["timeline.batch_size=[{shape='linear', start=0.5, value=8, until=1e6}, {value=8}]"],
        "timeline.batch_size, piece 1: start = 0.5 must be a whole number, at least 1",
    ),
    "later length of a fraction": (
        ["timeline.seq_len=[{value=64, until=1e6}, {value=100.4}]"],
        "timeline.seq_len, piece 2: value = 100.4 must be a whole number, at least 1",
    ),
    "prediction deeper than a later sequence": (
        ["model.num_nextn_predict_layers=4", "timeline.seq_len=[{value=64, until=1e6}, {value=4}]"],
        "model.num_nextn_predict_layers = 4 must be below timeline.seq_len, piece 2: value = 4",
    ),
    "a ramp from nowhere": (
        ["timeline.learning_rate=[{shape='linear', value=1e-3, until=1e6}, {value=1e-3}]"],
        "timeline.learning_rate, piece 1: `start` is missing; no value comes before a first piece",
    ),
    "multiple of a constant batch": (
        ["timeline.batch_size_multiple=4"],
        "timeline.batch_size_multiple = 4 rounds timeline.batch_size, but the batch is constant, train.batch_size = 8; "
        "remove one of them",
    ),
    "the name of a field that is no key": (
        ["checkpoint.async_=true"],
        "checkpoint.async_ is not a known key; did you mean 'async'?",
    ),
    "an average that forgets nothing": (
        ["checkpoint.ema=1.0"],
        "checkpoint.ema = 1.0 must lie in [0, 1); 0.999 averages about 1000 steps, 0 is no average",
    ),
    "a wish to keep some of all": (
        ["checkpoint.keep=0", "checkpoint.keep_every=100"],
        "checkpoint.keep_every = 100 has no effect with keep = 0, which keeps all; remove it",
    ),
    "recomputation of everything": (
        ["parallel.recompute=true"],
        "parallel.recompute = True must be a list",
    ),
    "recomputation of what cannot be": (
        ["parallel.recompute=['norms', 'attention']"],
        "parallel.recompute, entry 2 = 'attention' must be 'norms' or 'mla_up' or 'swiglu' or 'expert_rows' or 'block'",
    ),
    "negative peak": (
        ["logging.peak_tflops=-1"],
        "logging.peak_tflops = -1.0 must not be negative; 0 takes the known figure",
    ),
    "unknown recipe of FP8": (
        ["precision.fp8=mxfp8"],
        "precision.fp8 = 'mxfp8' must be 'off' or 'block' or 'current' or 'delayed'",
    ),
    "scales without FP8": (
        ["precision.fp8_power_of_two=false"],
        'precision.fp8_power_of_two = false has no effect with fp8 = "off"; remove it, or set fp8',
    ),
    "monitors at negative steps": (
        ["logging.fp8_every=-1"],
        "logging.fp8_every = -1 must not be negative; 0 is never",
    ),
    "parts at negative steps": (
        ["logging.parts_every=-3"],
        "logging.parts_every = -3 must not be negative; 0 is never",
    ),
    "a project that trackers refuse": (
        ["logging.project=a/b"],
        "logging.project = 'a/b' must be a name without any of / \\ # ? % :, such as 'eva'",
    ),
    "negative piece": (
        ["timeline.mtp_weight=[{value=-1, until=10}, {value=2}]"],
        "timeline.mtp_weight, piece 1: value = -1.0 must be a finite number, not below 0",
    ),
    "piece without value": (
        ["timeline.learning_rate=[{until=10}, {value=2}]"],
        "timeline.learning_rate, entry 1: value is missing and has no default; add it to the file",
    ),
    "folder as a name": (
        ["run.name=a/b"],
        "run.name = 'a/b' must be a plain folder name; the folder above it is run.dir",
    ),
    "override without a value": (
        ["train.steps"],
        "--set train.steps must read table.key=value, such as --set train.steps=100",
    ),
    "override of a table": (
        ["train=3"],
        "--set train=3 must read table.key=value, such as --set train.steps=100",
    ),
    "override below a value": (
        ["train.steps.more=3"],
        "--set train.steps.more=3: steps is a value, not a table",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told(run: Path, overrides: list[str], message: str) -> None:
    assert refusal(run, *overrides) == message


def test_all_mistakes_are_told_at_once(run: Path) -> None:
    lines = refusal(run, "model.hiden_size=3", "train.steps=many").splitlines()
    assert lines == [
        "model.hiden_size is not a known key; did you mean 'hidden_size'?",
        "train.steps = 'many' must be a whole number",
    ]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (
            "seq_len = 64",
            "train.seq_len is missing and has no default; add it to the file, or use --set train.seq_len=...",
        ),
        (
            "steps = 100",
            "train.steps or tokens says where to stop: neither is given; give exactly one",
        ),
        (
            "batch_size = 8",
            "train.batch_size is constant, timeline.batch_size may change over the run: neither is given; "
            "give exactly one",
        ),
        ('[data]\ndatasets = [{ path = "somewhere" }]', "data is missing and has no default; add it to the file"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(run: Path, removed: str, message: str) -> None:
    assert removed in RUN
    run.write_text(RUN.replace(f"\n{removed}\n", "\n"))
    assert refusal(run) == message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "absent.toml"
    assert refusal(path) == f"no configuration at {path}"


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "heir.toml"
    path.write_text('base = "absent.toml"\n')
    assert refusal(path) == f"no configuration at {tmp_path}/absent.toml, the base of {path}"


def test_a_base_that_is_no_path(tmp_path: Path) -> None:
    path = tmp_path / "heir.toml"
    path.write_text("base = 3\n")
    assert refusal(path) == f"base = 3 in {path} must be the path of another file"


def test_bases_in_a_circle(tmp_path: Path) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('base = "second.toml"\n')
    second.write_text('base = "first.toml"\n')
    assert refusal(first) == f"{first} is its own base, through first.toml → second.toml; remove one `base`"


def test_what_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[run\n")
    assert refusal(path).startswith(f"{path} is not valid TOML: ")
    path.write_bytes(b"\xff\xfe")
    assert refusal(path).startswith(f"{path} cannot be read: ")
    path.write_text("a = " + "[" * 100_000)
    assert refusal(path).startswith(f"{path} is not valid TOML: ")


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (
            [],
            3,
            "train.batch_size = 8 must be a multiple of train.micro_batch_size × data ranks = 2 × 3 = 6; use 6 or 12",
        ),
        (
            ["train.micro_batch_size=16"],
            1,
            "train.batch_size = 8 must be a multiple of train.micro_batch_size × data ranks = 16 × 1 = 16; use 16",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_divide(run: Path, overrides: list[str], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_layout(load(run, *overrides), ranks)
    assert str(caught.value) == message


def test_the_command_line_says_it_in_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run), "--set", "train.seq_len=long"]) == 2
    printed = capsys.readouterr()
    assert printed.err.strip().endswith("train.seq_len = 'long' must be a whole number")
    assert "Traceback" not in printed.err + printed.out
