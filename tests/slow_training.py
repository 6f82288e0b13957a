"""`slow_training.py PYTHON -m pretrain train ...` in the place of a container: a training whose steps take a second
until it has a checkpoint to start from, so that a test can interfere."""

import sys
import time
from pathlib import Path
from typing import Any

import pretrain.loop
from pretrain.__main__ import build_parser, exit_now, main
from pretrain.config import load_config

STEP_SECONDS = 1.0


def slow_down(run: Path) -> None:
    """Makes each step wait if the run has no checkpoint now."""
    if any((run / "checkpoints").glob("step-*")):
        return
    take_step = pretrain.loop.train_step

    def take_slow_step(*arguments: Any, **options: Any) -> Any:
        time.sleep(STEP_SECONDS)
        return take_step(*arguments, **options)

    pretrain.loop.train_step = take_slow_step


if __name__ == "__main__":
    words = sys.argv[sys.argv.index("train") :]
    given = build_parser().parse_args(words)
    slow_down(load_config(given.config, given.set).run.folder)
    exit_now(main(words))
