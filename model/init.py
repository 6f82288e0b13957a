"""Initial weights: N(0, initializer_range²) for every matrix, 1 for every norm (report, section 4.2: σ = 0.006).

Every matrix, and every expert's share of a stacked one, is drawn from a generator of its own, seeded by the run's seed,
the parameter's name and the expert's global index. So any part of the model, on any device, gets the same weights.
"""

import hashlib

import torch
from torch import Tensor, nn

from model.config import ModelConfig


@torch.no_grad()
def initialize(module: nn.Module, config: ModelConfig, *, seed: int, first_expert: int = 0) -> None:
    """Fills all parameters of `module` in place; its experts are those from `first_expert` on."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 2:
            _fill(parameter, config.initializer_range, f"{seed}/{name}")
        else:
            for offset, matrix in enumerate(parameter):
                _fill(matrix, config.initializer_range, f"{seed}/{name}/{first_expert + offset}")


def _fill(matrix: Tensor, std: float, key: str) -> None:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    matrix.copy_(torch.empty(matrix.shape, dtype=torch.float32).normal_(std=std, generator=generator))
