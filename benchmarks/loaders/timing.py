"""How every side of loader_speed.py is timed: steady batches of one consumer, start-up of epochs left out."""

import time
from collections.abc import Callable, Iterable

import torch


def time_batches(start_epoch: Callable[[], Iterable[torch.Tensor]], seq_len: int, seconds: float) -> float:
    """Tokens a second of int64 batches [B, seq_len + 1], over as many whole epochs as fill the time.

    The first two batches of an epoch are not counted, nor is its start.
    """
    tokens, elapsed = 0, 0.0
    while elapsed < seconds:
        batches = iter(start_epoch())
        for _ in range(2):
            next(batches)
        began = time.perf_counter()
        for batch in batches:
            assert batch.dtype == torch.int64
            assert batch.shape[1] == seq_len + 1
            tokens += batch.shape[0] * seq_len
        elapsed += time.perf_counter() - began
    return tokens / elapsed
