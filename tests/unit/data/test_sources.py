"""Every kind of source gives the documents that were put into it, however finely it is cut into units."""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data import sources
from data.errors import DataError
from data.readers import EMPTY, NOT_TEXT
from data.sources import SourceOptions, find_source, plan_units

TEXTS = [f"document {number}\n\té ▁ {'x' * (number * 37 % 500)}" for number in range(1100)]


def read(spec: str | Path, options: SourceOptions | None = None) -> tuple[list[str], dict[str, int]]:
    """The texts of a source and how many documents were left out for which reason."""
    options = options or SourceOptions()
    source = find_source(str(spec), options)
    units = plan_units([source], options)
    documents = [document for unit in units for document in unit.documents()]
    assert sum(unit.size for unit in units) >= 0
    skipped = [document.skipped for document in documents if document.skipped]
    return [document.text for document in documents if not document.skipped], {s: skipped.count(s) for s in skipped}


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of about 1 kB, so that small files are cut too."""
    monkeypatch.setattr(sources, "_MIN_UNIT_BYTES", 1000)
    monkeypatch.setattr(sources, "_MAX_UNIT_BYTES", 1000)


def json_lines(key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in TEXTS).encode()


def write_jsonl(folder: Path) -> Path:
    (folder / "corpus.jsonl").write_bytes(json_lines())
    return folder / "corpus.jsonl"


def write_gzip(folder: Path) -> Path:
    lines = json_lines().splitlines(keepends=True)
    parts = (b"".join(lines[:50]), b"".join(lines[50:]))
    (folder / "corpus.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    return folder / "corpus.jsonl.gz"


def write_zstd(folder: Path) -> Path:
    lines = json_lines().splitlines(keepends=True)
    parts = (b"".join(lines[:50]), b"".join(lines[50:]))
    (folder / "corpus.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, parts)))
    return folder / "corpus.jsonl.zst"


def write_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "corpus.parquet", row_group_size=300)
    return folder / "corpus.parquet"


def write_dataset(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"), num_shards=1)
    return folder / "saved"


def write_folder(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return folder


WRITERS: Sequence[Callable[[Path], Path]] = (
    write_jsonl,
    write_gzip,
    write_zstd,
    write_parquet,
    write_dataset,
    write_folder,
)


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_gives_its_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert read(write(tmp_path)) == (TEXTS, {})


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.usefixtures("small_units")
def test_small_units_give_the_same_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    units = plan_units([find_source(str(path), SourceOptions())], SourceOptions())
    compressed = write in (write_gzip, write_zstd)
    assert len(units) == 1 if compressed else len(units) > 1
    assert read(path) == (TEXTS, {})


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("line_bytes", [93, 129, 998, 999, 1000, 1001])
def test_lines_that_end_where_units_do(tmp_path: Path, line_bytes: int) -> None:
    lines = [json.dumps({"text": str(number)}) for number in range(60)]
    padded = [line + " " * (line_bytes - len(line) - 1) + "\n" for line in lines]
    (tmp_path / "a.jsonl").write_text("".join(padded).rstrip("\n"))
    assert read(tmp_path / "a.jsonl") == ([str(number) for number in range(60)], {})


def test_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines("body"))
    assert read(tmp_path / "a.jsonl", SourceOptions(text_key="body")) == (TEXTS, {})
    with pytest.raises(DataError, match=r"a\.jsonl line 1 has no key 'text' \(it has 'id', 'body'\); .*--text-key"):
        read(tmp_path / "a.jsonl")


def test_missing_column(tmp_path: Path) -> None:
    for path in (write_parquet(tmp_path), write_dataset(tmp_path)):
        with pytest.raises(DataError, match=r"no column 'body' \(it has .*'text'\); .*--text-key"):
            read(path, SourceOptions(text_key="body"))
    with pytest.raises(DataError, match=r"int64 in column 'id', where text belongs"):
        read(write_parquet(tmp_path), SourceOptions(text_key="id"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut off', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": 3}', "has a int at 'text', where text belongs"),
        (b'["text"]', "has no key 'text'"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str, suffix: str) -> None:
    content = b'{"text": "a"}\n\n' + line + b"\n"
    path = tmp_path / f"bad.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=rf"bad\.jsonl{suffix} line 3 {message}"):
        read(path)


def test_documents_left_out_are_counted(tmp_path: Path) -> None:
    lines: list[Any] = ["", None, "good", "\ud800"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    assert read(tmp_path / "a.jsonl") == (["good"], {EMPTY: 2, NOT_TEXT: 1})
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {"a": b"", "b": b"\xff\xfe", "c": b"text", "d": b"a\0b"}.items():
        (folder / name).write_bytes(content)
    assert read(folder) == (["text"], {EMPTY: 1, NOT_TEXT: 2})


@pytest.mark.parametrize("write", [write_gzip, write_zstd, write_parquet])
def test_truncated_files_are_named(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"{path.name} is damaged .*copy it again"):
        read(path)


def test_folders_are_sorted_and_filtered(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.py", "a/tests/t.py", "a.py", ".git/config.py", ".hidden.py", "test_b.py", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    assert read(tmp_path)[0] == ["a/tests/t.py", "a/z.py", "a.py", "b.py", "notes.md", "test_b.py"]
    options = SourceOptions(include=("*.py",), exclude=("test*",))
    assert read(tmp_path, options)[0] == ["a/z.py", "a.py", "b.py"]
    assert read(tmp_path, SourceOptions(include=("a/*",)))[0] == ["a/tests/t.py", "a/z.py"]
    assert read(tmp_path, SourceOptions(exclude=("a/tests", "*.md")))[0] == ["a/z.py", "a.py", "b.py", "test_b.py"]
    assert read(tmp_path, SourceOptions(leave_out=tmp_path / "a"))[0] == ["a.py", "b.py", "notes.md", "test_b.py"]
    with pytest.raises(DataError, match="holds no file to read"):
        read(tmp_path, SourceOptions(include=("*.rs",)))


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == ["train"]
    assert read(tmp_path / "saved", SourceOptions(split="test"))[0] == ["test"]
    with pytest.raises(DataError, match=r"no split 'dev' \(it has train, test\); choose with --split"):
        read(tmp_path / "saved", SourceOptions(split="dev"))


def test_dataset_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    saved = datasets.load_from_disk(str(write_dataset(tmp_path)))
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return saved

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("datasets:owner/name", SourceOptions(split="dev", config="small"))[0] == TEXTS
    assert asked == [("owner/name", "small", "dev")]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: saved.select([5, 3]))
    with pytest.raises(DataError, match=r"selects 2 of the 1100 rows"):
        read("datasets:owner/name")


def test_dataset_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot load split 'train' of '.*absent' .*--split, --config"):
        read(f"datasets:{tmp_path / 'absent'}")


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent' does not exist; give a file, a folder, stdlib: or datasets:NAME"):
        read(tmp_path / "absent")
    (tmp_path / "a.txt.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt\.gz is compressed, which is read for JSONL only"):
        read(tmp_path / "a.txt.gz")


def test_standard_library(tmp_path: Path) -> None:
    files = find_source("stdlib:", SourceOptions()).files
    names = {file.name for file in files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)
    assert sum(file.size for file in files) > 8_000_000


def test_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return find_source(str(tmp_path), SourceOptions()).fingerprint

    (tmp_path / "a.txt").write_text("one")
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (tmp_path / "a.txt").write_text("two")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(fingerprint())
    (tmp_path / "b.txt").write_text("")
    seen.append(fingerprint())
    assert len(set(seen)) == 3
