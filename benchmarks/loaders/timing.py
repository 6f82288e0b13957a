"""How every side of loader_speed.py is timed: steady batches of one consumer, start-up of epochs left out."""

import time
from collections.abc import Callable, Iterable

import torch


def time_batches(
    start_epoch: Callable[[], Iterable[torch.Tensor]], seq_len: int, seconds: float, dtype: torch.dtype
) -> float:
    """Tokens a second of batches [B, seq_len + 1], for so many seconds, over as many epochs as that takes.

    All sides store uint16 and must yield it. With `dtype` int64 each batch is then widened, the same way for all. The
    first two batches of an epoch are not counted, nor is its start.
    """
    tokens, elapsed = 0, 0.0
    while elapsed < seconds:
        batches = iter(start_epoch())
        for _ in range(2):
            next(batches)
        began = time.perf_counter()
        for batch in batches:
            assert batch.dtype == torch.uint16
            assert batch.shape[1] == seq_len + 1
            ready = batch.to(dtype)
            tokens += ready.shape[0] * seq_len
            if time.perf_counter() - began > seconds - elapsed:
                break
        elapsed += time.perf_counter() - began
    return tokens / elapsed
