"""litdata's side of loader_speed.py: TokensLoader chunks, read by a shuffled StreamingDataset."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
from timing import time_batches

CHUNK_TOKENS = 1 << 24


def documents(source: str) -> Iterator[torch.Tensor]:
    """All documents, one after another."""
    tokens, ends = np.load(f"{source}/tokens.npy"), np.load(f"{source}/ends.npy").astype(np.int64)
    for begin, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        yield torch.from_numpy(tokens[begin:end])


def prepare(source: str, folder: str, seq_len: int) -> None:
    """Writes chunks of whole blocks, as the documentation of the pretraining format does."""
    block = seq_len + 1
    optimize(
        fn=documents,
        inputs=[source],
        output_dir=folder,
        chunk_size=CHUNK_TOKENS // block * block,
        item_loader=TokensLoader(block_size=block),
        num_workers=1,
    )


def measure(request: dict[str, Any]) -> float:
    """Tokens a second of shuffled blocks."""
    dataset = StreamingDataset(
        request["folder"], item_loader=TokensLoader(block_size=request["seq_len"] + 1), shuffle=True, drop_last=True
    )
    loader = StreamingDataLoader(dataset, batch_size=request["batch_size"], num_workers=request["workers"])
    return time_batches(lambda: loader, request["seq_len"], request["seconds"], getattr(torch, request["dtype"]))


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if request["do"] == "prepare":
        prepare(request["source"], request["folder"], request["seq_len"])
    else:
        print(measure(request))
