"""The sizes that a configuration gives to the estimates of memory and work."""

import torch

from model.experts import fused_in
from pretrain.config import Config
from pretrain.fp8 import fp8_config
from pretrain.planning.activations import NODE_SIZE, Activations
from pretrain.planning.memory import Device, Memory, least_held, rank_memories


def activations_of(config: Config, *, seq_len: int, node_size: int = NODE_SIZE, device: Device = "cuda") -> Activations:
    """Of the run's micro-batches at one sequence length, on nodes of so many ranks."""
    return Activations(
        model=config.model,
        parallel=config.parallel,
        num_bytes=_dtype(config).itemsize,
        micro_batch_size=config.train.micro_batch_size,
        seq_len=seq_len,
        masked_documents=not config.data.cross_document_attention,
        node_size=node_size,
        fused_experts=device == "cuda" and fuses_experts(config),
    )


def fuses_experts(config: Config) -> bool:
    """Whether routed experts keep gates and ups alone on a GPU, in all steps."""
    fp8, watched = fp8_config(config, "cuda"), config.logging.fp8_every > 0
    return fused_in(config.model, _dtype(config), fp8, watched=watched) is not None


def memories_of(config: Config, world_size: int, device: Device = "cuda") -> tuple[Memory, ...]:
    """Of a rank at each place of the pipeline, with the longest sequences and the largest batch of the run."""
    timeline, train = config.timeline, config.train
    lengths = [piece.value for piece in timeline.seq_len] if isinstance(timeline.seq_len, tuple) else []
    sizes = [config.full_timeline.at(tokens).batch_size for tokens in (0, *config.full_timeline.boundaries())]
    data_ranks = config.parallel.mesh_shape(world_size).dp
    return rank_memories(
        activations_of(config, seq_len=round(max([train.seq_len, *lengths])), device=device),
        dtype=_dtype(config),
        optimizer=config.optimizer,
        world_size=world_size,
        num_micro_batches=max(sizes) // (data_ranks * train.micro_batch_size),
        fp8=fp8_config(config, "cuda"),
        device=device,
    )


def held_by_all(config: Config, world_size: int) -> int:
    """Bytes that the rank with most parameters holds in any case, however little else there is."""
    return least_held(
        config.model, config.parallel, dtype=_dtype(config), optimizer=config.optimizer, world_size=world_size
    )


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
