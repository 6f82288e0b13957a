"""`prepare` writes what the sources hold, the same bytes for any number of processes and after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_corpora import bytes_of, code_like, make_files, make_hugging_face, make_tokenizer, prepare_simply, texts_of

from data import sources, workers
from data.errors import DataError
from data.merge import text_hash
from data.prepare import PrepareOptions, prepare
from data.shards import open_shard, read_index
from data.sources import SourceOptions
from data.workers import Report, Work, run_work


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model").path


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 3000)
    monkeypatch.setattr(sources, "_MAX_UNIT_BYTES", 3000)


def source_texts(folder: Path) -> list[str]:
    paths = sorted((path for path in folder.rglob("*.py")), key=lambda path: path.relative_to(folder).parts)
    return [path.read_text() for path in paths]


def test_documents_come_back_in_order(tmp_path: Path, tokenizer: Path) -> None:
    folder = make_files(tmp_path / "source", 60)
    prepared = prepare_simply(folder, tmp_path / "out", tokenizer)
    train, held_out = texts_of(tmp_path / "out"), texts_of(tmp_path / "out", "validation")
    texts = source_texts(folder)
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in train]
    entries = [entry for split in prepared.index.splits.values() for entry in split]
    assert sum(entry.text_bytes for entry in entries) == sum(len(text.encode()) for text in texts)
    assert prepared.index == read_index(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dataset.json",
        "prepare.json",
        "tokenizer.model",
        "train-00000.safetensors",
        "validation-00000.safetensors",
    }


@pytest.mark.usefixtures("small_units")
def test_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "source", 60)
    results = []
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        prepare(PrepareOptions((str(folder),), out, train_tokenizer=350, shard_tokens=3000, processes=processes))
        results.append(bytes_of(out))
    assert len(results[0]) > 10
    assert results[0] == results[1] == results[2]


def test_shards_hold_whole_documents_up_to_their_size(tmp_path: Path, tokenizer: Path) -> None:
    folder = make_files(tmp_path / "source", 40)
    options = PrepareOptions((str(folder),), tmp_path / "out", tokenizer=tokenizer, shard_tokens=700, validation=0)
    index = prepare(options).index
    shards = [open_shard(tmp_path / "out", entry, index.dtype) for entry in index.splits["train"]]
    assert all(len(shard.tokens) <= 700 or shard.num_documents == 1 for shard in shards)
    starts = [int(shard.ends[0]) for shard in shards]
    assert all(len(shard.tokens) + start > 700 for shard, start in zip(shards, starts[1:], strict=False))
    assert texts_of(tmp_path / "out") == source_texts(folder)
    assert index.splits["validation"] == ()


def test_wide_vocabulary_is_stored_wide(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({f"w{number}": number for number in range(70_000)}, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w3 w69999")
    index = prepare_simply(tmp_path / "a.txt", tmp_path / "out", tmp_path / "tokenizer.json").index
    assert index.dtype == "uint32"
    assert index.tokenizer.fim_begin == -1
    shard = open_shard(tmp_path / "out", index.splits["train"][0], index.dtype)
    assert shard.tokens.tolist() == [3, 69_999, 70_000]


def test_validation_depends_on_the_text_alone(tmp_path: Path, tokenizer: Path) -> None:
    folder = make_files(tmp_path / "source", 80, num_lines=5)
    lines = [json.dumps({"text": text}) for text in [*reversed(source_texts(folder)), "one more"]]
    (tmp_path / "again.jsonl").write_text("\n".join(lines))
    options = PrepareOptions((str(folder),), tmp_path / "one", tokenizer=tokenizer, validation=0.2)
    prepare(options)
    prepare(replace(options, sources=(str(tmp_path / "again.jsonl"),), out=tmp_path / "two"))
    one, two = texts_of(tmp_path / "one", "validation"), texts_of(tmp_path / "two", "validation")
    assert set(one) == {text for text in source_texts(folder) if text_hash(text.encode()) < 0.2 * 2**64}
    assert set(two) - {"one more"} == set(one)
    assert 5 <= len(one) <= 30


@pytest.mark.parametrize(
    ("texts", "validation", "held_out"),
    [
        (["a", "b"], 1e-12, 1),
        (["a", "b"], 0.999999, 1),
        (["a", "b", "c"], 0, 0),
        (["a"], 0.5, 0),
        (["a", "a"], 0.5, 0),
    ],
)
def test_both_splits_hold_something(
    tmp_path: Path, tokenizer: Path, texts: list[str], validation: float, held_out: int
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare(PrepareOptions((str(tmp_path / "a.jsonl"),), tmp_path / "out", tokenizer=tokenizer, validation=validation))
    assert len(texts_of(tmp_path / "out", "validation")) == held_out
    assert len(texts_of(tmp_path / "out")) == len(texts) - held_out


def test_several_sources_and_documents_left_out(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": ""}\n')
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    names = tuple(str(tmp_path / name) for name in ("b.txt", "a.jsonl", "c.txt"))
    prepared = prepare(PrepareOptions(names, tmp_path / "out", tokenizer=tokenizer, validation=0))
    assert texts_of(tmp_path / "out") == ["second", "first"]
    assert prepared.skipped == {"empty": 1, "not UTF-8 text": 1}


def test_folder_that_holds_its_own_output(tmp_path: Path, tokenizer: Path) -> None:
    make_files(tmp_path, 4)
    prepare_simply(tmp_path, tmp_path / "out", tokenizer)
    assert prepare_simply(tmp_path, tmp_path / "out", tokenizer).was_finished


@pytest.mark.parametrize("content", [b"", b"\xff\xff"])
@pytest.mark.parametrize("trained", [False, True])
def test_no_document_at_all(tmp_path: Path, tokenizer: Path, content: bytes, trained: bool) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    options = PrepareOptions((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer=tokenizer)
    if trained:
        options = replace(options, tokenizer=None, train_tokenizer=300)
    with pytest.raises(DataError, match=r"a\.txt: no (document to prepare \(left out: 1 |text to train)"):
        prepare(options)


def test_finished_and_changed_runs(tmp_path: Path, tokenizer: Path) -> None:
    folder = make_files(tmp_path / "source", 10)
    options = PrepareOptions((str(folder),), tmp_path / "out", tokenizer=tokenizer)
    prepare(options)
    before = bytes_of(tmp_path / "out")
    assert prepare(replace(options, processes=3)).was_finished
    with pytest.raises(DataError, match=r"finished in another way: validation was 0\.01, now it is 0\.5; .*--restart"):
        prepare(replace(options, validation=0.5))
    with pytest.raises(DataError, match=r"exclude was .*, now it is"):
        prepare(replace(options, reading=SourceOptions(exclude=("*9.py",))))
    other = make_hugging_face(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer was .*, now it is"):
        prepare(replace(options, tokenizer=other))
    (folder / "new.py").write_text("new")
    with pytest.raises(DataError, match=r"the files of .*source have changed since; choose another --out"):
        prepare(options)
    assert bytes_of(tmp_path / "out") == before
    prepare(replace(options, tokenizer=other, restart=True))
    assert "tokenizer.model" not in bytes_of(tmp_path / "out")
    assert "new" in texts_of(tmp_path / "out") + texts_of(tmp_path / "out", "validation")


def test_mistake_before_any_work_is_mended_in_place(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    options = PrepareOptions((str(tmp_path / "a.jsonl"),), tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(DataError, match="no key 'text'"):
        prepare(options)
    prepare(replace(options, reading=SourceOptions(text_key="body")))
    assert texts_of(tmp_path / "out") == ["a"]


def test_foreign_folders_are_left_alone(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-00000.safetensors").write_text("mine")
    for restart in (False, True):
        options = PrepareOptions((str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer=tokenizer, restart=restart)
        with pytest.raises(DataError, match=r"is not empty .* choose another --out"):
            prepare(options)
    assert bytes_of(tmp_path / "out") == {"train-00000.safetensors": b"mine"}


def test_two_runs_at_once(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("data.prepare._LOCK_PATIENCE_S", 0.1)
    folder = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another prepare is at work"):
        prepare_simply(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    os.close(folder)
    prepare_simply(tmp_path / "a.txt", tmp_path / "out", tokenizer)


_ROOT = Path(__file__).parents[3]
# The command line, with units so small that a small corpus has many. Tests that a shell runs in the background inherit
# that SIGINT is ignored.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from data import __main__, sources
sources._MIN_UNIT_BYTES = sources._MAX_UNIT_BYTES = 10_000
sys.exit(__main__.main())
"""


def _command(source: Path, out: Path) -> list[str]:
    options = ["--train-tokenizer", "400", "--shard-tokens", "800", "--processes", "2", "--validation", "0.2"]
    return [sys.executable, "-c", _PROGRAM, "prepare", str(source), "--out", str(out), *options]


def _stop_when(command: list[str], condition: Callable[[], bool], number: signal.Signals) -> tuple[int, str, set[int]]:
    """Runs the command until the condition holds and sends a signal: SIGKILL to the command alone, others also to its
    workers, as a terminal does. Gives exit status, stderr and the workers.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=_ROOT, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = set(map(int, children.read_text().split())) if children.is_file() else set()
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    return process.wait(60), process.communicate()[1], workers


def _corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(code_like(number, 150))
    return folder


def _moments(out: Path) -> list[Callable[[], bool]]:
    """From the first file to the last; every one comes later in the work than the one before."""

    def parts() -> int:
        return len(list(out.glob("parts/*.part")))

    def shards() -> int:
        return len(list(out.glob("*.safetensors")))

    return [
        lambda: (out / "prepare.json").exists(),
        lambda: (out / "tokenizer.model").exists(),
        lambda: parts() >= 1,
        lambda: parts() >= 4,
        lambda: shards() >= 1,
        lambda: shards() >= 40,
        lambda: (out / "dataset.json").exists(),
    ]


def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    source = _corpus(tmp_path / "source")
    subprocess.run(_command(source, tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL, cwd=_ROOT)
    out = tmp_path / "killed"
    statuses, workers = [], set()
    for condition in _moments(out):
        status, _, children = _stop_when(_command(source, out), condition, signal.SIGKILL)
        statuses.append(status)
        workers |= children
    # The last moment may come too late for the signal.
    assert statuses[:-1] == [-signal.SIGKILL] * 6
    assert workers
    subprocess.run(_command(source, out), check=True, stdout=subprocess.DEVNULL, cwd=_ROOT)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    deadline = time.monotonic() + 30
    while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
        assert time.monotonic() < deadline, f"workers {left} outlived the process that started them"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    source, out = _corpus(tmp_path / "source"), tmp_path / "out"
    status, message, _ = _stop_when(_command(source, out), _moments(out)[2], number)
    assert status == 75
    assert message == "interrupted; the same command goes on where it stopped\n"
    finished = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("*.part")}
    assert finished
    status, _, _ = _stop_when(_command(source, out), _moments(out)[4], number)
    assert status == 75
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in finished} == finished


def test_work_is_done_once_and_reported() -> None:
    def make_work() -> Work:
        return lambda number, report: report(10**number)

    for processes in (1, 3, 20):
        reports: list[int] = []
        run_work(make_work, [0, 2, 3, 5], processes, reports.append)
        assert sorted(amount for amount in reports if amount) == [1, 100, 1000, 100_000]


def test_a_signal_finds_no_worker_before_it_ignores_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = workers._serve

    def interrupted(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        serve(*arguments)

    monkeypatch.setattr(workers, "_serve", interrupted)
    reports: list[int] = []
    run_work(lambda: lambda number, report: report(number), [1, 2], 2, reports.append)
    assert sorted(filter(None, reports)) == [1, 2]


def test_worker_errors_come_through() -> None:
    def make_work() -> Work:
        def work(number: int, report: Report) -> None:
            if number == 2:
                raise KeyError("two")
            if number == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        return work

    run_work(make_work, [], 2, print)
    with pytest.raises(KeyError, match="two") as caught:
        run_work(make_work, [1, 2], 2, lambda amount: None)
    assert "in work" in caught.value.__notes__[0]
    with pytest.raises(DataError, match=r"worker process died \(exit status -9\).*run the same command again"):
        run_work(make_work, [1, 3, 4], 2, lambda amount: None)


def test_hash_is_fixed() -> None:
    """Another hash would move documents between the splits of datasets made before and after."""
    assert [text_hash(content) for content in (b"", b"a")] == [13020603013274838756, 3405396810240292928]
