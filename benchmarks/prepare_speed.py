"""How much of the tokenizer's own speed `prepare` keeps, on the Python standard library.

    python benchmarks/prepare_speed.py [--processes N] [--repeats N] [--vocab-size N]

Three contestants take turns in one run, each with N processes of one thread:

    sentencepiece   the bare library encodes the texts, which lie in memory, evenly shared out; results are dropped
    Tokenizer       the same through `data.tokenizer`, which cuts long texts
    prepare         `data.prepare` end to end: finds, reads, encodes, hashes, splits, checksums and writes the dataset

Reported are medians after one warm-up of each. The goal is a `prepare` of at least 0.8 of the bare library.
"""

import argparse
import importlib.metadata
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import sentencepiece

from data.prepare import PrepareOptions, prepare
from data.sources import STDLIB, SourceOptions, find_source, plan_units
from data.tokenizer import load_tokenizer, train_sentencepiece

GOAL = 0.8


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    texts = stdlib_texts()
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        train_sentencepiece(texts, path, options.vocab_size)
        seconds = measure(contestants(texts, path, Path(folder) / "out", options.processes), options.repeats)
    print_table(seconds, megabytes, options.processes, options.vocab_size)


def stdlib_texts() -> list[str]:
    """The documents that `prepare stdlib:` reads."""
    units = plan_units([find_source(STDLIB, SourceOptions())], SourceOptions())
    documents = (document for unit in units for document in unit.documents())
    return [document.text for document in documents if not document.skipped]


def contestants(texts: list[str], path: Path, out: Path, processes: int) -> dict[str, Callable[[], float]]:
    """By name, a function that does the work once and returns its seconds."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    shares = share_out(texts, processes)

    def run_prepare() -> float:
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        prepare(PrepareOptions(sources=(STDLIB,), out=out, tokenizer=path, processes=processes))
        return time.perf_counter() - start

    return {
        "sentencepiece": lambda: in_processes(lambda share: library.encode(share, num_threads=1), shares),
        "Tokenizer": lambda: in_processes(tokenizer.encode_batch, shares),
        "prepare": run_prepare,
    }


def share_out(texts: list[str], processes: int) -> list[list[str]]:
    """Shares of as even a size as can be, so that no process waits for another."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    sizes = np.zeros(processes)
    for text in sorted(texts, key=len, reverse=True):
        smallest = int(sizes.argmin())
        shares[smallest].append(text)
        sizes[smallest] += len(text)
    return shares


def in_processes(work: Callable[[list[str]], object], shares: list[list[str]]) -> float:
    """Seconds until the slowest of the processes has worked through its share."""
    context = multiprocessing.get_context("fork")
    start = time.perf_counter()
    processes = [context.Process(target=work, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - start


def measure(runners: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat by contestant, who take turns so that a busy machine troubles all alike."""
    for runner in runners.values():
        runner()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(repeats):
        for name, runner in runners.items():
            seconds[name].append(runner())
    return seconds


def print_table(seconds: dict[str, list[float]], megabytes: float, processes: int, vocab_size: int) -> None:
    """Medians, their spread and their share of the bare library's speed."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("sentencepiece", "numpy")]
    print(f"{date.today()}, Python {platform.python_version()}, {', '.join(versions)}, {platform.machine()}")
    repeats = len(seconds["prepare"])
    print(f"{megabytes:.1f} MB of text, vocabulary {vocab_size}, {processes} processes, median of {repeats}\n")
    bare = statistics.median(seconds["sentencepiece"])
    print(f"{'':<15}{'median s':>10}{'fastest s':>11}{'slowest s':>11}{'MB/s':>8}{'of bare':>9}")
    for name, values in seconds.items():
        median = statistics.median(values)
        row = f"{name:<15}{median:>10.2f}{min(values):>11.2f}{max(values):>11.2f}"
        print(f"{row}{megabytes / median:>8.2f}{bare / median:>9.2f}")
    reached = bare / statistics.median(seconds["prepare"])
    print(f"\nprepare reaches {reached:.2f} of the bare tokenizer (goal: {GOAL})")


if __name__ == "__main__":
    main()
