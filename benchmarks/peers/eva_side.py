"""Eva's side of step_speed.py: what `pretrain train` runs in each step, from `assemble` and `train_step`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timing import BIAS_UPDATE_SPEED, LEARNING_RATE, Request, count, device, run
from torch import Tensor, nn

import parallel.build
from data.loader import Batch
from model.config import ModelConfig
from parallel.launch import find_place, join_processes
from parallel.zero import load_deepspeed
from pretrain.assemble import assemble, open_data
from pretrain.config import Config
from pretrain.step import train_step


class EvaSide:
    """A run without its loop."""

    def __init__(self, config: Config, request: Request) -> None:
        deepspeed = load_deepspeed()
        place = find_place({})
        join_processes(place)
        # Every rank draws the same weights, matrix by matrix on the CPU, which takes a minute and changes no time here.
        parallel.build.initialize = _initialize
        self._run = assemble(config, place, open_data(config))
        self._values = replace(
            self._run.timeline.at(0), learning_rate=LEARNING_RATE, bias_update_speed=BIAS_UPDATE_SPEED
        )
        self.num_parameters = count(self._run.model.parameters())
        self.versions = {"deepspeed": deepspeed.__version__}
        self.notes = (
            f"{config.precision.dtype} weights, fp32 gradients, masters and moments unless set otherwise, "
            "bias and sequence-wise balance loss"
        )
        self._mark_optimizer()

    def step(self, batch: Batch) -> float | Tensor:
        """One step with the whole batch as one micro-batch."""
        size = batch.spec.batch_size
        config = self._run.config
        sized = replace(config, train=replace(config.train, micro_batch_size=size, batch_size=size))
        return train_step(replace(self._run, config=sized), batch, self._values, stop_requested=False).loss

    def _mark_optimizer(self) -> None:
        step = self._run.optimizer.step

        def marked(learning_rate: float, accepts: Callable[[float], bool]) -> tuple[float, bool]:
            with torch.profiler.record_function("optimizer"):
                return step(learning_rate, accepts)

        self._run.optimizer.step = marked  # type: ignore[method-assign]


@torch.no_grad()
def _initialize(module: nn.Module, config: ModelConfig, *, seed: int, **_: Any) -> None:
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.ones(parameter.shape, device=device())
        if parameter.dim() > 1:
            parameter.normal_(std=config.initializer_range)


if __name__ == "__main__":
    run(EvaSide)
