"""The command line of the data package: `python -m data prepare | verify | show`."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data.errors import DataError

_INTERRUPTED = 75
_PREPARE_EXAMPLE = """examples:
  python -m data prepare src/ --include '*.py' --exclude 'test*' --out runs/code --train-tokenizer 32768
  python -m data prepare corpus/*.jsonl.zst --text-key content --out runs/web --tokenizer tokenizer.json
  python -m data prepare stdlib: --out runs/demo/data --train-tokenizer 4096

Interrupted or killed, the same command goes on where it stopped."""
_VERIFY_EXAMPLE = "example:\n  python -m data verify runs/demo/data"
_SHOW_EXAMPLE = "example:\n  python -m data show runs/demo/data --samples 3 --split validation"
_EXAMPLE = """example:
  python -m data prepare stdlib: --out runs/demo/data --train-tokenizer 4096
  python -m data show runs/demo/data --samples 3"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 done, 2 a mistake of the user's, 75 interrupted."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except (DataError, OSError) as error:
        print(f"error: {_describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = "; the same command goes on where it stopped" if command is _prepare else ""
        print(f"interrupted{resumes}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data",
        description="Turns text into token shards, checks them and shows them.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="prepare | verify | show")
    _add_prepare(_add_command(commands, "prepare", "text to token shards", _PREPARE_EXAMPLE, _prepare))
    verify = _add_command(
        commands, "verify", "check every file of a dataset against its checksum", _VERIFY_EXAMPLE, _verify
    )
    verify.add_argument("folder", type=Path, metavar="DIR", help="the dataset")
    show = _add_command(commands, "show", "statistics and decoded samples", _SHOW_EXAMPLE, _show)
    show.add_argument("folder", type=Path, metavar="DIR", help="the dataset")
    show.add_argument("--samples", type=int, default=1, metavar="N", help="documents to print (default: 1)")
    show.add_argument("--split", default="train", choices=("train", "validation"), help="where they come from")
    return parser


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    example: str,
    command: Callable[[argparse.Namespace], None],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="text, JSONL[.gz|.zst] or Parquet file, folder of such files, folder "
        "of save_to_disk, datasets:NAME, or stdlib: for Python's own source",
    )
    add("--stdlib", action="store_true", help="the same as the source stdlib:")
    add("--out", type=Path, required=True, metavar="DIR", help="the dataset's folder")
    add("--tokenizer", type=Path, metavar="PATH", help="a SentencePiece .model or a Hugging Face tokenizer.json")
    add("--train-tokenizer", type=int, metavar="VOCAB_SIZE", help="train a SentencePiece BPE on the sources instead")
    add("--validation", type=float, default=0.01, metavar="FRACTION", help="documents held out (default: 0.01)")
    add("--shard-tokens", type=_count, default=1 << 26, metavar="N", help="most tokens of a shard (default: 67108864)")
    add("--processes", type=int, default=_num_cores(), metavar="N", help="default: one a CPU core")
    add("--restart", action="store_true", help="remove what an earlier prepare left in DIR, and begin anew")
    reading = parser.add_argument_group("reading")
    add = reading.add_argument
    add("--text-key", default="text", metavar="KEY", help="key or column that holds the text (default: text)")
    add(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="of folders, only files with a matching path part",
    )
    add("--exclude", action="append", default=[], metavar="GLOB", help="of folders, no files with a matching path part")
    add("--split", default="train", help="split of a dataset of the datasets library (default: train)")
    add("--config", default="", metavar="NAME", help="configuration of a dataset of the datasets library")
    names = parser.add_argument_group("special tokens", "names, where the tokenizer does not use the usual ones")
    for name in ("eos", "fim-begin", "fim-hole", "fim-end"):
        names.add_argument(f"--{name}", default="", metavar="TOKEN")


def _prepare(options: argparse.Namespace) -> None:
    from data.prepare import PrepareOptions, prepare
    from data.sources import STDLIB, SourceOptions
    from data.tokenizer import SpecialNames

    reading = SourceOptions(
        options.text_key, tuple(options.include), tuple(options.exclude), options.split, options.config
    )
    prepared = prepare(
        PrepareOptions(
            sources=(*options.sources, *([STDLIB] if options.stdlib else [])),
            out=options.out,
            tokenizer=options.tokenizer,
            train_tokenizer=options.train_tokenizer,
            names=SpecialNames(options.eos, options.fim_begin, options.fim_hole, options.fim_end),
            reading=reading,
            validation=options.validation,
            shard_tokens=options.shard_tokens,
            processes=options.processes,
            restart=options.restart,
        )
    )
    print(f"{prepared.folder}: {'was finished already' if prepared.was_finished else 'done'}")
    for split, entries in prepared.index.splits.items():
        documents, tokens = sum(entry.documents for entry in entries), sum(entry.tokens for entry in entries)
        print(f"  {split}: {documents:,} documents, {tokens:,} tokens in {len(entries)} shards")
    for reason, count in prepared.skipped.items():
        if count:
            print(f"  left out: {count:,} ({reason})")


def _verify(options: argparse.Namespace) -> None:
    from data.verify import verify

    index = verify(options.folder)
    shards = sum(map(len, index.splits.values()))
    tokens = sum(entry.tokens for entries in index.splits.values() for entry in entries)
    print(f"{options.folder}: {shards} shards, {tokens:,} tokens and the tokenizer are as they were written")


def _show(options: argparse.Namespace) -> None:
    from rich.console import Console

    from data.show import show

    show(options.folder, options.split, options.samples, Console())


def _count(text: str) -> int:
    """A whole number, which may be written 1e9 or 10_000."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _num_cores() -> int:
    """The cores this process may use, which a batch system often limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
