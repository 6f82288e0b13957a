"""`train_in_turn.py CONFIG.toml [[KEY=VALUE, ...], ...]`: the runs of several lists of overrides in the same processes,
as launching each takes longer than its steps. It ends with the first that fails. With SHARED_GPU set, ranks share the
first GPU and speak through gloo, as NCCL gives each one of its own."""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

from parallel.launch import JOIN_TIMEOUT, Place, find_place, join_processes, keep_compiled_kernels
from parallel.zero import load_deepspeed
from pretrain.__main__ import exit_now
from pretrain.config import check_layout, load_config
from pretrain.loop import train


def main(config: Path, runs: list[list[str]]) -> None:
    load_deepspeed()
    place = join_on_one_gpu() if "SHARED_GPU" in os.environ else join()
    for overrides in runs:
        began = time.perf_counter()
        loaded = load_config(config, overrides)
        check_layout(loaded, place.world_size)
        train(loaded, place)
        gc.collect()
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{overrides[0]}: {time.perf_counter() - began:.1f} s", flush=True)


def join() -> Place:
    place = find_place()
    join_processes(place)
    return place


def join_on_one_gpu() -> Place:
    # DeepSpeed computes on the GPU of this number.
    os.environ["LOCAL_RANK"] = "0"
    place = find_place()
    torch.cuda.set_device(place.device)
    keep_compiled_kernels()
    dist.init_process_group("gloo", timeout=JOIN_TIMEOUT)
    return place


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_now(1)
    exit_now(0)
