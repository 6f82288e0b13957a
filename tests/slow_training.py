"""`slow_training.py PYTHON -m pretrain train ...` in the place of a container: a training whose steps take a second
until it has a checkpoint to start from, so that a test can interfere."""

import sys
import time
from pathlib import Path

from data.loader import Batch, BatchLoader
from pretrain.__main__ import build_parser, exit_now, main
from pretrain.config import load_config

STEP_SECONDS = 1.0


def slow_down(run: Path) -> None:
    """Makes each batch wait if the run has no checkpoint now."""
    if any((run / "checkpoints").glob("step-*")):
        return
    take_next = BatchLoader.__next__

    def take_next_slowly(batches: BatchLoader) -> Batch:
        time.sleep(STEP_SECONDS)
        return take_next(batches)

    BatchLoader.__next__ = take_next_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    words = sys.argv[sys.argv.index("train") :]
    given = build_parser().parse_args(words)
    slow_down(load_config(given.config, given.set).run.folder)
    exit_now(main(words))
