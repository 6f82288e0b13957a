"""What several tests need: small models and datasets, and ranks as forked processes."""

import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from data.shards import DatasetIndex, TokenizerEntry, file_sha256, token_dtype, write_index, write_shard
from model.config import ModelConfig
from parallel.zero import load_deepspeed

PROJECT = Path(__file__).parent.parent
RANKS_TIMEOUT_S = 120
# Metrics that differ between two runs of the same.
TIMINGS = {"step_time_s", "tokens_per_s", "tflops_per_gpu", "max_memory_gib", "time", "phases", "ranks"}


SMALL_RUN = """
[run]
name = "small"
dir = "{folder}"
seed = 7

[model]
{model}

[data]
datasets = [{{ path = "{folder}/data" }}]
fim_rate = 0.5
cross_document_attention = false

[train]
seq_len = 64
micro_batch_size = 2
steps = 12

[timeline]
learning_rate = [{{ shape = "linear", start = 0.0, value = 1e-2, until = 2000 }}, {{ value = 1e-2 }}]
batch_size = [{{ shape = "linear", start = 4, value = 12, until = 4000 }}, {{ value = 12 }}]
batch_size_multiple = 4

[precision]
dtype = "fp32"

[checkpoint]
every = 5
keep = 0
"""

# Sizes that the kernels of a GPU take, for models of `write_run`.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "initializer_range": 0.02,
}


def small_model(**changes: Any) -> ModelConfig:
    """A model with every part of the architecture, a few thousand parameters large."""
    sizes: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.1,
    }
    return ModelConfig(**{**sizes, **changes})


def write_dataset(folder: Path, *, vocab_size: int = 96, documents: int = 200, seed: int = 0) -> Path:
    """A dataset of random documents with both splits; ids 0 to 3 are eos and the FIM tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(b"not a tokenizer, but a file with a checksum")
    generator = np.random.default_rng(seed)
    dtype = token_dtype(vocab_size)
    splits = {}
    for split, count in (("train", documents), ("validation", max(documents // 10, 1))):
        lengths = generator.integers(1, 60, count)
        tokens = generator.integers(4, vocab_size, int(lengths.sum())).astype(dtype)
        ends = np.cumsum(lengths).astype(np.uint64)
        tokens[ends - 1] = 0
        splits[split] = (write_shard(folder / f"{split}-00000.safetensors", tokens, ends, text_bytes=len(tokens)),)
    entry = TokenizerEntry(tokenizer.name, file_sha256(tokenizer), vocab_size, 0, 1, 2, 3)
    write_index(folder, DatasetIndex(entry, dtype.name, splits))
    return folder


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Calls `function(rank, *arguments)` in forked processes joined by gloo and returns what each gave, in order.

    `folder` is an empty one for the meeting point. Any failure, or silence for two minutes, fails the test.
    """
    _import_for_all()
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    # What there is already is nothing that the collector of a forked process need look at, and so copy.
    gc.freeze()
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(rank, world_size, folder, sender, function, arguments))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    gc.unfreeze()
    deadline = time.monotonic() + RANKS_TIMEOUT_S
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                raise AssertionError(f"rank {rank} of {world_size} did not answer within {RANKS_TIMEOUT_S} s")
            answers.append(pipe.recv())
    except EOFError:
        raise AssertionError(f"rank {rank} of {world_size} died") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in enumerate(answers) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in answers]


@functools.cache
def _import_for_all() -> None:
    """What each rank would import for itself when it makes an optimizer, in seconds: once, before they are forked."""
    load_deepspeed()
    for name in ("torch._dynamo", "deepspeed.runtime.zero.muon.original_muon"):
        importlib.import_module(name)


def _rank_main(
    rank: int, world_size: int, folder: Path, sender: Any, function: Callable[..., Any], arguments: Any
) -> None:
    # Without this, the first parallel region of a forked process can wait for threads that only its parent has.
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        sender.send((True, function(rank, *arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        sys.stdout.flush()
        # Skips the parent's exit handlers, which are not this process's to run.
        os._exit(0)


def write_run(folder: Path, **model: Any) -> Path:
    """A configuration of twelve steps over a small dataset, both in `folder`, with a batch that grows."""
    write_dataset(folder / "data")
    config = folder / "run.toml"
    config.write_text(SMALL_RUN.format(folder=folder, model=small_model_toml(**model)))
    return config


def small_model_toml(**changes: Any) -> str:
    """The lines of `[model]` for `small_model`."""
    sizes = asdict(small_model(**changes)).items()
    return "\n".join(f"{key} = {value}" for key, value in sizes if isinstance(value, int | float))


def gpus_reach_one_another() -> bool:
    """Whether all of this machine's do, or there is one."""
    pairs = itertools.combinations(range(torch.cuda.device_count()), 2)
    return all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)


def start_training(
    config: Path, *overrides: str, processes: int = 1, launcher_options: Sequence[str] = (), share_gpu: bool = False
) -> subprocess.Popen[str]:
    """`python -m pretrain train`, or the same under torchrun, in a process group of its own."""
    command = ["-m", "pretrain", "train", str(config)]
    for override in overrides:
        command += ["--set", override]
    return start_processes(command, processes=processes, launcher_options=launcher_options, share_gpu=share_gpu)


def start_processes(
    command: Sequence[str], *, processes: int, launcher_options: Sequence[str] = (), share_gpu: bool = False
) -> subprocess.Popen[str]:
    """`python COMMAND` in the project's folder, or `torchrun COMMAND`, in a process group of its own. With `share_gpu`
    all processes compute on the first GPU."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *launcher_options,
        ]
    if share_gpu:
        launcher.append("tests/share_gpu.py")
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [*launcher, *command],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, expect: int = 0) -> str:
    """Waits for the end and checks the exit status; returns what was printed."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == expect, output
    return output


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_events(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
