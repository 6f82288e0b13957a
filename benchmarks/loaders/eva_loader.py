"""Eva's side of loader_speed.py: `prepare` writes the tokens as an Eva dataset, `measure` times its batches."""

import json
import sys
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import time_batches

from data.config import DataConfig, DatasetConfig
from data.loader import BatchLoader, BatchSpec
from data.shards import DatasetIndex, TokenizerEntry, write_index, write_shard
from data.stream import open_stream

NUM_SHARDS = 4
VOCAB_SIZE = 1 << 15


def prepare(source: Path, folder: Path) -> None:
    """Writes documents of `source`/tokens.npy that end at `source`/ends.npy."""
    tokens, ends = np.load(source / "tokens.npy"), np.load(source / "ends.npy")
    cuts = len(ends) * np.arange(NUM_SHARDS + 1) // NUM_SHARDS
    shards = []
    for number, (first, last) in enumerate(pairwise(cuts)):
        begin = int(ends[first - 1]) if first else 0
        path = folder / f"train-{number:05d}.safetensors"
        inside = tokens[begin : int(ends[last - 1])], (ends[first:last] - begin).astype(np.uint64)
        shards.append(write_shard(path, *inside, text_bytes=0))
    tokenizer = TokenizerEntry("tokenizer.json", "0" * 64, VOCAB_SIZE, eos=0, fim_begin=1, fim_hole=2, fim_end=3)
    write_index(folder, DatasetIndex(tokenizer, "uint16", {"train": tuple(shards)}))


def measure(request: dict[str, Any]) -> float:
    """Tokens a second of packed batches of shuffled documents."""
    config = DataConfig(
        datasets=(DatasetConfig(path=request["folder"]),),
        fim_rate=request["fim_rate"],
        cross_document_attention=not request["masks"],
    )
    stream = open_stream(config, seed=0, extra=1, vocab_size=VOCAB_SIZE)
    start, size, seq_len = stream.start(request["seq_len"]), request["batch_size"], request["seq_len"]
    specs = (BatchSpec(start.advanced(number * size), size) for number in count())
    epoch = stream.datasets[0].num_tokens // (seq_len * size)
    with BatchLoader(stream, specs, prefetch=4 if request["workers"] else 0) as loader:
        return time_batches(
            lambda: (batch.tokens for batch in islice(loader, epoch)),
            seq_len,
            request["seconds"],
            getattr(torch, request["dtype"]),
        )


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if request["do"] == "prepare":
        prepare(Path(request["source"]), Path(request["folder"]))
    else:
        print(measure(request))
