"""Preparing a dataset: sources to tokens to shards, by several processes, resumed after any kill.

The folder goes through these states, each reached by one atomic rename:

    prepare.json                 the plan: what is read and how; a changed plan is refused
    tokenizer.model | .json      trained or copied
    parts/00000000.part …        finished units of work, in any order
    *.safetensors                the parts merged in order
    dataset.json                 the index; from here on the dataset exists, and parts/ is removed

Units, their documents and the merge depend on the sources alone, so the bytes are the same for any number of processes
and any number of interruptions.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.merge import Survey, merge_parts, survey_parts, text_hash
from data.parts import Frame, part_path, write_frame
from data.progress import progress
from data.readers import SKIP_REASONS, Document, Unit
from data.shards import (
    INDEX_NAME,
    SPLITS,
    DatasetIndex,
    file_sha256,
    open_atomically,
    read_index,
    read_sealed_json,
    token_dtype,
    write_atomically,
    write_index,
    write_sealed_json,
)
from data.sources import Source, SourceOptions, find_source, plan_units
from data.tokenizer import SpecialNames, Tokenizer, load_tokenizer, train_sentencepiece
from data.workers import Report, Work, run_work

PLAN_NAME = "prepare.json"
PARTS_NAME = "parts"
_PLAN_VERSION = 1
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 1 << 12
_TRAINING_BYTES = 64 << 20
_LOCK_PATIENCE_S = 5.0


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. Exactly one of `tokenizer` (a file) and `train_tokenizer` (a vocabulary size) is given.

    `validation` is the fraction of documents held out, `shard_tokens` the most tokens of a shard; a longer document
    gets a shard of its own.
    """

    sources: tuple[str, ...]
    out: Path
    tokenizer: Path | None = None
    train_tokenizer: int | None = None
    names: SpecialNames = field(default_factory=SpecialNames)
    reading: SourceOptions = field(default_factory=SourceOptions)
    validation: float = 0.01
    shard_tokens: int = 1 << 26
    processes: int = 1
    restart: bool = False


@dataclass(frozen=True)
class Prepared:
    """A finished dataset. `skipped` counts documents left out by reason; `was_finished` when nothing was to be done."""

    folder: Path
    index: DatasetIndex
    skipped: dict[str, int]
    was_finished: bool


def prepare(options: PrepareOptions) -> Prepared:
    """Prepares a dataset, or goes on where an interrupted call of the same options stopped.

    Raises DataError for options, sources and tokenizers that cannot be used, and when the folder holds something else.
    """
    _check(options)
    reading = replace(options.reading, leave_out=options.out)
    sources = [find_source(spec, reading) for spec in options.sources]
    units = plan_units(sources, reading)
    plan = _plan(options, sources)
    with _locked(options.out):
        if options.restart:
            _clear(options.out)
        _adopt_plan(options.out, plan)
        if (options.out / INDEX_NAME).is_file():
            shutil.rmtree(options.out / PARTS_NAME, ignore_errors=True)
            return Prepared(options.out, read_index(options.out), {}, was_finished=True)
        return _prepare(options, units)


def _prepare(options: PrepareOptions, units: list[Unit]) -> Prepared:
    parts_folder = options.out / PARTS_NAME
    parts_folder.mkdir(exist_ok=True)
    tokenizer = _tokenizer(options, units)
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [part_path(parts_folder, number) for number in range(len(units))]
    _tokenize(units, parts, tokenizer, options.processes)

    survey = survey_parts(parts, dtype)
    if not survey.documents:
        raise DataError(f"{', '.join(options.sources)}: no document to prepare{_describe_skipped(survey)}")
    with progress("writing shards", sum(part.stat().st_size for part in parts)) as report:
        splits = merge_parts(parts, options.out, dtype, options.validation, options.shard_tokens, survey, report)
    index = DatasetIndex(tokenizer.entry(tokenizer.path.name), dtype.name, splits)
    write_index(options.out, index)
    shutil.rmtree(parts_folder)
    return Prepared(options.out, index, dict(zip(SKIP_REASONS, survey.skipped, strict=True)), was_finished=False)


def _check(options: PrepareOptions) -> None:
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise DataError("give either --tokenizer PATH or --train-tokenizer VOCAB_SIZE")
    if options.train_tokenizer is not None and options.names != SpecialNames():
        raise DataError("--eos and --fim-… name tokens of a given --tokenizer; a trained one has its own")
    if not 0 <= options.validation < 1:
        raise DataError(f"--validation is {options.validation}, but a fraction from 0 to below 1 is needed")
    if options.shard_tokens < 1 or options.processes < 1:
        raise DataError(
            f"--shard-tokens is {options.shard_tokens} and --processes {options.processes}, but both must be at least 1"
        )
    if not options.sources:
        raise DataError("no source given; name files, folders, stdlib: or datasets:NAME")


def _plan(options: PrepareOptions, sources: Sequence[Source]) -> dict[str, Any]:
    """Everything the result depends on, as JSON values."""
    reading = asdict(options.reading)
    del reading["leave_out"]
    return {
        "version": _PLAN_VERSION,
        "sources": [source.spec for source in sources],
        "tokenizer": _tokenizer_sha256(options.tokenizer) if options.tokenizer else None,
        "train_tokenizer": options.train_tokenizer,
        "special_names": asdict(options.names),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in reading.items()},
        "validation": options.validation,
        "shard_tokens": options.shard_tokens,
        "files": [
            {"count": len(source.files), "bytes": source.size, "state": source.fingerprint} for source in sources
        ],
    }


def _tokenizer_sha256(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}; give a SentencePiece .model or a Hugging Face tokenizer.json")
    return file_sha256(path)


def _adopt_plan(out: Path, plan: dict[str, Any]) -> None:
    """Writes the plan into an empty folder, or checks that it is the one that was begun there."""
    path = out / PLAN_NAME
    begun = read_sealed_json(path) if path.is_file() else None
    if begun not in (None, plan) and not (out / INDEX_NAME).exists() and not any(out.glob(f"{PARTS_NAME}/*.part")):
        # Nothing was done yet: most likely the mistake in the options was just mended.
        _clear(out)
        begun = None
    if begun is None:
        others = sorted(child.name for child in out.iterdir() if child.name != f"{PLAN_NAME}.partial")
        if others:
            raise DataError(
                f"{out} is not empty (it holds {others[0]!r}) and was not made by prepare; choose another --out"
            )
        write_sealed_json(path, plan)
        return
    changed = [key for key in {**begun, **plan} if begun.get(key) != plan.get(key)]
    if changed:
        done = "finished" if (out / INDEX_NAME).is_file() else "begun"
        raise DataError(
            f"{out} holds a dataset {done} in another way: {_describe_change(changed[0], begun, plan)}; "
            "choose another --out, or give --restart to make it anew"
        )


def _describe_change(key: str, begun: dict[str, Any], plan: dict[str, Any]) -> str:
    if key == "files":
        changed = [spec for spec, old, new in zip(plan["sources"], begun[key], plan[key], strict=False) if old != new]
        return f"the files of {', '.join(changed)} have changed since"
    return f"{key.replace('_', '-')} was {begun.get(key)!r}, now it is {plan.get(key)!r}"


def _clear(out: Path) -> None:
    """Removes what an earlier `prepare` left, and nothing else; the index goes first, the plan last."""
    if not (out / PLAN_NAME).is_file():
        return
    (out / INDEX_NAME).unlink(missing_ok=True)
    shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
    for pattern in (*(f"{split}-[0-9]*.safetensors*" for split in SPLITS), "tokenizer.*", f"{PLAN_NAME}*"):
        for path in sorted(out.glob(pattern)):
            path.unlink()


def _tokenizer(options: PrepareOptions, units: list[Unit]) -> Tokenizer:
    """The tokenizer in the dataset's own folder, copied or trained unless an earlier call did that."""
    if options.tokenizer is not None:
        content = options.tokenizer.read_bytes()
        is_json = content.lstrip()[:1] == b"{"
        load_tokenizer(options.tokenizer, options.names)
        path = options.out / ("tokenizer.json" if is_json else "tokenizer.model")
        write_atomically(path, content)
        return load_tokenizer(path, options.names)
    path = options.out / "tokenizer.model"
    if not path.is_file():
        vocab_size = options.train_tokenizer or 0

        def train(number: int, report: Report) -> None:
            texts = list(_training_texts(units, options.validation))
            if not any(texts):
                raise DataError(f"{', '.join(options.sources)}: no text to train a tokenizer on")
            train_sentencepiece(texts, path, vocab_size)

        with progress("training the tokenizer", None) as report:
            # In a process of its own, so that Ctrl-C need not wait for it.
            run_work(lambda: train, [0], 1, report)
    return load_tokenizer(path)


def _training_texts(units: list[Unit], validation: float) -> Iterator[str]:
    """Up to `_TRAINING_BYTES` of text, spread evenly over the corpus, held-out documents left out."""
    total = sum(unit.size for unit in units)
    stride = max(1, -(-total // _TRAINING_BYTES))
    chosen = units[::stride]
    allowance = _TRAINING_BYTES // max(len(chosen), 1)
    for unit in chosen:
        used = 0
        for document in unit.documents():
            content = document.text.encode()
            if text_hash(content) >= validation * 2**64:
                yield document.text[:allowance]
            used += len(content)
            if used >= allowance:
                break


def _tokenize(units: list[Unit], parts: list[Path], tokenizer: Tokenizer, processes: int) -> None:
    """Makes the parts that are not there yet."""
    missing = [number for number, part in enumerate(parts) if not part.is_file()]

    def make_work() -> Work:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

        def tokenize(number: int, report: Report) -> None:
            with open_atomically(parts[number]) as file:
                for batch in _batches(units[number].documents()):
                    write_frame(file, _encode(batch, tokenizer))
                    report(sum(document.size for document in batch))

        return tokenize

    total = sum(unit.size for unit in units)
    done = total - sum(units[number].size for number in missing)
    with progress("tokenizing", total, done) as report:
        run_work(make_work, missing, processes, report)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer) -> Frame:
    """Token ids of the documents of a batch, each followed by end-of-document."""
    dtype = token_dtype(tokenizer.vocab_size)
    texts = [document.text for document in batch if not document.skipped]
    ids = tokenizer.encode_batch(texts)
    contents = [text.encode() for text in texts]
    lengths = np.array([len(tokens) + 1 for tokens in ids], np.uint64)
    stream = np.full(int(lengths.sum()), tokenizer.eos, dtype)
    is_text = np.ones(len(stream), bool)
    is_text[np.cumsum(lengths).astype(np.int64) - 1] = False
    stream[is_text] = np.concatenate([np.empty(0, np.int32), *ids])
    return Frame(
        tokens=stream,
        lengths=lengths,
        text_bytes=np.array([len(content) for content in contents], np.uint64),
        hashes=np.array([text_hash(content) for content in contents], np.uint64),
        skipped=tuple(sum(document.skipped == reason for document in batch) for reason in SKIP_REASONS),
    )


def _describe_skipped(survey: Survey) -> str:
    counts = [f"{count} {reason}" for reason, count in zip(SKIP_REASONS, survey.skipped, strict=True) if count]
    return f" (left out: {', '.join(counts)})" if counts else ""


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps other runs away from the folder. Forked workers share the lock, so it also waits for orphans to end."""
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"another prepare is at work in {out}; wait for it, or choose another --out"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(folder)
