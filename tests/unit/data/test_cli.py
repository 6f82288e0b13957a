"""What a user of `python -m data` types, sees and gets back as exit status."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from text_corpora import make_files, make_hugging_face, make_tokenizer, prepare_simply

from data.__main__ import main
from data.shards import DatasetIndex, write_index, write_shard

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").path


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Path) -> Path:
    prepare_simply(make_files(tmp_path / "source", 30), tmp_path / "dataset", tokenizer)
    return tmp_path / "dataset"


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [[], ["prepare"], ["verify"], ["show"]])
def test_help_has_an_example(command: list[str]) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "data", *command, "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert f"python -m data {' '.join(command) or 'prepare'} " in answer.stdout.partition("example")[2]


def test_help_loads_no_heavy_library() -> None:
    heavy = "{'numpy', 'torch', 'datasets', 'pyarrow', 'rich', 'sentencepiece', 'tokenizers'}"
    program = f"import sys, data.__main__ as m; m._parser(); print({heavy} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert answer.stdout == "set()\n"


def test_from_text_to_shown_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make_files(tmp_path / "source", 30), tmp_path / "out"
    (source / "empty.py").touch()
    (source / "test_x.py").write_text("left out")
    arguments = ("prepare", source, "--out", out, "--train-tokenizer", "380", "--processes", "2", "--exclude", "test*")
    assert run(*arguments, "--shard-tokens", "1e3") == 0
    answer = capsys.readouterr().out
    assert f"{out}: done\n  train: 29 documents" in answer
    assert "left out: 1 (empty)" in answer
    assert run(*arguments, "--shard-tokens", "1_000") == 0
    assert "was finished already" in capsys.readouterr().out
    assert run("verify", out) == 0
    assert "tokens and the tokenizer are as they were written" in capsys.readouterr().out
    assert run("show", out, "--samples", "1000") == 0
    answer = capsys.readouterr().out
    assert "bytes per token" in answer
    assert "train document 28" in answer
    assert "def" in answer
    assert run("show", out, "--split", "validation") == 0
    assert "validation document 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source"], "give either --tokenizer PATH or --train-tokenizer"),
        (["source", "--tokenizer", "t.model", "--train-tokenizer", "400"], "give either --tokenizer PATH or"),
        (["--tokenizer", "t.model"], "no source given"),
        (["source", "--tokenizer", "absent.model"], "no tokenizer at absent.model"),
        (["source", "--tokenizer", "source/file000.py"], "source/file000.py is neither a SentencePiece model nor"),
        (["source", "--tokenizer", "t.model", "--eos", "[END]"], "t.model has no special token '[END]'"),
        (["source", "--train-tokenizer", "400", "--eos", "[END]"], "--eos and --fim-… name tokens of a given"),
        (["source", "--train-tokenizer", "40000"], "cannot train a tokenizer of 40000 tokens"),
        (["absent", "--tokenizer", "t.model"], "source 'absent' does not exist"),
        (["source", "--tokenizer", "t.model", "--include", "*.rs"], "source 'source' holds no file to read"),
        (["source", "--tokenizer", "t.model", "--validation", "1"], "--validation is 1.0, but a fraction"),
        (["source", "--tokenizer", "t.model", "--validation", "nan"], "--validation is nan, but a fraction"),
        (["source", "--tokenizer", "t.model", "--processes", "0"], "--processes 0, but both must be at least 1"),
        (["source", "--tokenizer", "t.model", "--shard-tokens", "0"], "--shard-tokens is 0 and"),
        (["source", "--tokenizer", "t.model", "--out", "source/file000.py"], "source/file000.py: File exists"),
        (["source", "--tokenizer", "t.model", "--out", "source/file000.py/x"], "Not a directory"),
        (["source", "--tokenizer", "t.model", "--out", "source"], "source is not empty"),
    ],
)
def test_mistakes_give_one_message_and_exit_2(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    make_files(tmp_path / "source", 3)
    (tmp_path / "t.model").write_bytes(tokenizer.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run("prepare", "--out", "out", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [[], ["prepare"], ["prepare", "x", "--out", "y", "--shard-tokens", "1.5"], ["no"]]
)
def test_bad_arguments_exit_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_full_disk(tmp_path: Path, tokenizer: Path) -> None:
    command = ["-m", "data", "prepare", make_files(tmp_path / "source", 60), "--out", tmp_path / "out"]
    limit = tokenizer.stat().st_size + 1000

    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    answer = subprocess.run(
        [sys.executable, *command, "--tokenizer", tokenizer],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=no_large_files,
    )
    assert answer.returncode == 2
    assert answer.stderr == "error: [Errno 27] File too large\n"
    assert not list(tmp_path.glob("out/*.safetensors"))
    assert not list(tmp_path.glob("out/parts/*.part"))
    assert run(*command[2:], "--tokenizer", tokenizer) == 0


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("is damaged: its sha256 is", lambda path: flip(path, -1)),
    ("is damaged: its sha256 is", lambda path: flip(path, 20)),
    ("is damaged: its sha256 is", lambda path: path.write_bytes(path.read_bytes()[:-3])),
    ("is missing", Path.unlink),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES)
def test_verify_names_every_damaged_shard(
    dataset: Path, capsys: pytest.CaptureFixture[str], message: str, damage: Callable[[Path], None]
) -> None:
    for name in ("train-00000.safetensors", "validation-00000.safetensors"):
        damage(dataset / name)
    assert run("verify", dataset) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {dataset}: 2 damaged"
    assert [message in line for line in lines[1:]] == [True, True]
    assert "train-00000" in lines[1]
    assert "validation-00000" in lines[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.model", "is not the tokenizer that made this dataset"),
        ("prepare.json", "prepare.json is damaged"),
        ("dataset.json", "dataset.json is damaged"),
    ],
)
def test_verify_names_other_damaged_files(
    dataset: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    flip(dataset / name, 100)
    assert run("verify", dataset) == 2
    assert message in capsys.readouterr().err


def test_wrong_tokenizer(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "tokenizer.model").write_bytes(make_hugging_face(tmp_path / "tokenizer.json").read_bytes())
    for command in ("verify", "show"):
        assert run(command, dataset) == 2
        assert "tokenizer.model is not the tokenizer that made this dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "message"), [([5, 400, 1], "tokens beyond the vocabulary of 400"), ([5, 6, 7], "end-of-document token")]
)
def test_verify_reads_the_tokens(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str], tokens: list[int], message: str
) -> None:
    from data.tokenizer import load_tokenizer

    shard = write_shard(tmp_path / "s.safetensors", np.array(tokens, np.uint16), np.array([3], np.uint64), 1)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    entry = load_tokenizer(tokenizer).entry("tokenizer.model")
    write_index(tmp_path, DatasetIndex(entry, "uint16", {"train": (shard,)}))
    assert run("verify", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_show_neither_trusts_nor_interprets_documents(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("[bold]x[/bold] \x1b[31m \x9b \x07")
    prepare_simply(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    assert run("show", tmp_path / "out") == 0
    answer = capsys.readouterr().out
    assert "[bold]x[/bold] \ufffd[31m \ufffd \ufffd" in answer


def test_show_of_other_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("verify", "show"):
        assert run(command, tmp_path) == 2
        assert "dataset.json is missing; make one with `python -m data prepare`" in capsys.readouterr().err
