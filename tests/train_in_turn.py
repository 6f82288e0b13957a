"""`train_in_turn.py CONFIG.toml [[KEY=VALUE, ...], ...]`: the runs of several lists of overrides in the same processes,
as launching each takes longer than its steps. It ends with the first that fails."""

import gc
import json
import sys
import time
from pathlib import Path

import torch

from parallel.launch import find_place, join_processes
from parallel.zero import load_deepspeed
from pretrain.__main__ import exit_now
from pretrain.config import check_layout, load_config
from pretrain.loop import train


def main(config: Path, runs: list[list[str]]) -> None:
    load_deepspeed()
    place = find_place()
    join_processes(place)
    for overrides in runs:
        began = time.perf_counter()
        loaded = load_config(config, overrides)
        check_layout(loaded, place.world_size)
        train(loaded, place)
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{overrides[0]}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_now(1)
    exit_now(0)
