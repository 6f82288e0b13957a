"""The samples of a rehearsal: real text by way of `python -m data prepare`, unless the run's own tokens are there, and
of a small vocabulary."""

import json
import sysconfig
from pathlib import Path

from data.config import DataConfig, DatasetConfig
from data.errors import DataError
from data.prepare import PrepareOptions, prepare
from data.shards import read_index, write_atomically
from pretrain.assemble import open_data
from pretrain.config import Config
from pretrain.loop import plan_batches
from pretrain.state import TrainState

VOCAB_SIZE = 2048
_LARGEST_VOCAB = 8192
# Parts of Python's own library: enough text for any rehearsal, prepared in a second.
_PARTS = ("asyncio", "email", "json")


def samples(config: DataConfig, folder: Path) -> tuple[DataConfig, int, str]:
    """The `[data]` table of a rehearsal, its vocabulary, and where the text is from. Prepares a dataset in `folder` if
    it needs one. Raises DataError where that cannot be."""
    own = _vocabularies(config)
    if own and len(set(own)) == 1 and own[0] <= _LARGEST_VOCAB:
        return config, own[0], f"the run's own, {', '.join(dataset.path for dataset in config.datasets)}"
    text = folder.parent / "text.jsonl"
    if not text.is_file():
        write_atomically(text, "".join(json.dumps({"text": part}) + "\n" for part in _passages()).encode())
    out = prepare(PrepareOptions(sources=(str(text),), out=folder, train_tokenizer=VOCAB_SIZE, validation=0.05)).folder
    where = f"Python's own library, {VOCAB_SIZE:,} tokens in the vocabulary, in place of {len(config.datasets)} dataset"
    small = DataConfig(
        datasets=(DatasetConfig(path=str(out)),),
        fim_rate=config.fim_rate,
        cross_document_attention=config.cross_document_attention,
        prefetch=config.prefetch,
        verify=config.verify,
    )
    return small, VOCAB_SIZE, where + ("s" if len(config.datasets) > 1 else "")


def count_ends(config: Config) -> tuple[int, int, int]:
    """How many samples a run reads, how many documents end in them, and how many were rewritten for FIM."""
    stream = open_data(config)
    samples = ends = rewritten = 0
    tokenizer = stream.datasets[0].tokenizer
    position = stream.start(config.train.seq_len)
    for spec in plan_batches(config.full_timeline, stream, TrainState(0, 0, position), config.train):
        tokens = stream.read(spec.position, 0, spec.batch_size).tokens
        samples += spec.batch_size
        ends += int((tokens == tokenizer.eos).sum())
        rewritten += int((tokens == tokenizer.fim_begin).sum())
    return samples, ends, rewritten


def _vocabularies(config: DataConfig) -> list[int]:
    """The vocabulary of every dataset; none if one cannot be read."""
    try:
        return [read_index(Path(dataset.path)).tokenizer.vocab_size for dataset in config.datasets]
    except (DataError, OSError):
        return []


def _passages() -> list[str]:
    """Short documents, several to a sample, so that packing and fill-in-the-middle have ends to work on."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for part in _PARTS for file in (folder / part).glob("*.py"))
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    return [part for part in text.split("\n\n") if part.strip()]
