"""Runs of three steps: plainly in one process, and on the ranks of a layout."""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layouts import Layout
from support import small_model_toml
from torch import Tensor, nn

from data.loader import BatchLoader
from model.init import initialize
from model.router import update_bias
from model.transformer import Transformer
from parallel.launch import Place
from pretrain.assemble import assemble, open_data
from pretrain.config import Config, load_config
from pretrain.loop import plan_batches
from pretrain.state import TrainState, first_state, resume, save
from pretrain.step import train_step

STEPS = 3
# In bf16 a rate at which rounding does not send two runs to different places.
RATES = {"fp32": 1e-3, "bf16": 1e-4}
# A large ε keeps Adam from blowing up the last bits of gradients near zero.
RUN = """
[run]
name = "layout"
dir = "{folder}"
seed = 7

[model]
{model}

[data]
datasets = [{{ path = "{folder}/data" }}]
cross_document_attention = false

[train]
seq_len = 16
micro_batch_size = 1
batch_size = 16
steps = 3

[timeline]
learning_rate = {rate}

[optimizer]
eps = 1e-5

[precision]
dtype = "{dtype}"
"""


@dataclass(frozen=True)
class Numbers:
    """What three steps give: (loss, lm_loss, grad_norm) of each, parameters and expert biases by name, fp32."""

    steps: list[tuple[float, float, float]]
    parameters: dict[str, Tensor]
    biases: dict[str, Tensor]


def write_config(folder: Path, layout: Layout) -> Path:
    path = folder / f"{layout.model_key}-{layout.dtype}.toml"
    if not path.exists():
        path.write_text(
            RUN.format(
                folder=folder, model=small_model_toml(**layout.model), dtype=layout.dtype, rate=RATES[layout.dtype]
            )
        )
    return path


def skew_routing(biases: list[Tensor], skew: str) -> None:
    for bias in biases:
        if skew == "one takes all":
            bias[0] = 100.0
        elif skew == "half get nothing":
            bias[len(bias) // 2 :] = -100.0


def train_plainly(config: Config, skew: str, dtype: torch.dtype) -> Numbers:
    """The reference, computed in `dtype`. Of a bf16 run the masters begin as the rounded weights in either dtype, so
    that two dtypes differ by what was computed and not by where they began; gradients are added up in fp32."""
    masters, model = Transformer(config.model), Transformer(config.model)
    for network in (masters, model):
        initialize(network, config.model, seed=config.run.seed)
        skew_routing(list(network.expert_biases().values()), skew)
    for parameter in model.parameters():
        rounded = parameter.data.bfloat16() if config.precision.dtype == "bf16" else parameter.data
        parameter.data = rounded.to(dtype)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    for master, parameter in pairs:
        master.data = parameter.data.float()
    matrices = [p for p in masters.parameters() if p.dim() > 1]
    vectors = [p for p in masters.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    rate = config.full_timeline.at(0).learning_rate
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=config.optimizer.eps)
    stream, steps = open_data(config), []
    specs = plan_batches(
        config.full_timeline, stream, TrainState(0, 0, stream.start(config.train.seq_len)), config.train
    )
    with BatchLoader(stream, specs) as batches:
        for batch in itertools.islice(batches, STEPS):
            sums, load = torch.zeros(3, dtype=torch.float64), 0
            rows = list(zip(batch.tokens.long().split(1), batch.documents.split(1), strict=True))
            for tokens, documents in rows:
                losses = model(tokens, documents)
                loss = losses.lm_loss + 0.3 * losses.mtp_loss + config.model.aux_loss_alpha * losses.balance_loss
                (loss / len(rows)).backward()
                for master, parameter in pairs:
                    if parameter.grad is not None:
                        gradient = parameter.grad.float()
                        master.grad = gradient if master.grad is None else master.grad + gradient
                        parameter.grad = None
                sums += torch.stack((loss, losses.lm_loss, losses.balance_loss)).detach().double() / len(rows)
                load = load + losses.load
            norm = nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for master, parameter in pairs:
                    parameter.copy_(master)
            for bias, layer_load in zip(model.expert_biases().values(), load, strict=True):
                update_bias(bias, layer_load, 0.001)
            steps.append((float(sums[0]), float(sums[1]), float(norm)))
    biases = {name: buffer for name, buffer in model.named_buffers() if "bias" in name}
    return Numbers(steps, {name: p.detach() for name, p in masters.named_parameters()}, biases)


@functools.cache
def reference(path: Path, skew: str, dtype: torch.dtype, seed: int = 7) -> Numbers:
    return train_plainly(load_config(path, [f"run.seed={seed}"]), skew, dtype)


@functools.cache
def rounding_gaps(path: Path, skew: str) -> dict[str, float]:
    """How far the reference in bf16 is from itself in fp32, at worst over three runs: other weights, other samples."""
    runs = [[reference(path, skew, dtype, seed) for dtype in (torch.bfloat16, torch.float32)] for seed in (7, 8, 9)]
    gaps = [relative_errors(*run) for run in runs]
    return {name: max(gap[name] for gap in gaps) for name in gaps[0]}


def train_rank(rank: int, path: Path, layout: Layout, begin: int = 0, end: int = STEPS) -> dict[str, Any]:
    """Steps `begin` to `end` on one rank: from the start or from the checkpoint of the run, saved if there is more to
    do."""
    config = load_config(path, layout.overrides)
    place = Place(rank, layout.world_size, rank, torch.device("cpu"), layout.node_size)
    run = assemble(config, place, open_data(config))
    skew_routing(list(run.model.expert_biases().values()), layout.skew)
    state = resume(run) if begin else first_state(run)
    assert state is not None
    assert state.step == begin
    steps, shape = [], run.mesh.shape
    specs = plan_batches(run.timeline, run.stream, state, config.train)
    with BatchLoader(run.stream, specs, dp_rank=shape.dp_rank(rank), dp_size=shape.dp) as batches:
        for batch in itertools.islice(batches, end - begin):
            result = train_step(run, batch, run.timeline.at(state.tokens), stop_requested=False)
            steps.append((result.loss, result.lm_loss, result.grad_norm))
            state = state.after(batch.spec.batch_size, skipped=result.skipped)
    if end < STEPS:
        save(run, state)
    return {
        "steps": steps,
        "shards": [
            (shard.name, shard.start, shard.shape, shard.tensors["param"].float().numpy().copy())
            for shard in run.optimizer.shards()
            if shard.owned
        ],
        "biases": {name: buffer.numpy() for name, buffer in run.model.named_buffers() if "bias" in name},
    }


def put_together(ranks: list[dict[str, Any]]) -> Numbers:
    parameters: dict[str, Tensor] = {}
    covered: dict[str, int] = {}
    biases: dict[str, Tensor] = {}
    for rank in ranks:
        assert rank["steps"] == ranks[0]["steps"], "ranks disagree"
        for name, start, shape, values in rank["shards"]:
            whole = parameters.setdefault(name, torch.full((math.prod(shape),), math.nan))
            whole[start : start + len(values)] = torch.from_numpy(values)
            covered[name] = covered.get(name, 0) + len(values)
        for name, values in rank["biases"].items():
            assert name not in biases or torch.equal(biases[name], torch.from_numpy(values)), name
            biases[name] = torch.from_numpy(values)
    for name, whole in parameters.items():
        assert covered[name] == len(whole), f"{name} is not saved once"
    return Numbers(ranks[0]["steps"], parameters, biases)


def relative_errors(ours: Numbers, expected: Numbers) -> dict[str, float]:
    """The relative error of every parameter as a vector, and the largest over steps of the losses' and the norm's."""
    assert ours.parameters.keys() == expected.parameters.keys()
    errors = {
        name: float((ours.parameters[name].flatten() - value.flatten()).norm() / value.norm())
        for name, value in expected.parameters.items()
    }
    steps = list(zip(ours.steps, expected.steps, strict=True))
    errors["losses"] = max(abs(a - b) / b for step, other in steps for a, b in zip(step[:2], other[:2], strict=True))
    errors["grad_norm"] = max(abs(step[2] - other[2]) / other[2] for step, other in steps)
    return errors
