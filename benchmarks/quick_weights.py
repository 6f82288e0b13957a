"""Weights for benchmarks, drawn on the GPU: `model.init` draws those of all experts of a run on the CPU, on every rank,
which takes a minute for a few billion parameters and changes no time. Ranks that share a parameter draw the same."""

from zlib import crc32

import torch
from torch import nn

import parallel.build
from model.config import ModelConfig


def draw_on_gpu() -> None:
    """From now on `parallel.build` draws weights so; on a machine without a GPU, on its CPU."""
    parallel.build.initialize = _initialize


@torch.no_grad()
def _initialize(module: nn.Module, config: ModelConfig, *, seed: int, first_expert: int = 0) -> None:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    generator = torch.Generator(device)
    for name, parameter in module.named_parameters():
        generator.manual_seed(crc32(f"{seed} {name} {first_expert if '.mlp.experts.' in name else 0}".encode()))
        parameter.data = torch.ones(parameter.shape, device=device)
        if parameter.dim() > 1:
            parameter.normal_(std=config.initializer_range, generator=generator)
