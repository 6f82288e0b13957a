"""What a run tells of itself, and how often."""

from dataclasses import dataclass

_AT_LEAST_ONE = ("every", "expert_load_every")
_NEVER_IS_ZERO = ("fp8_every", "phases_every", "parts_every", "ranks_every", "timeline_every")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """`[logging]`: a line in the log every `every` steps; in the metrics every so many steps (0: never)

    `expert_load_every`  the load of each expert, and for each layer how even it is and the range of the biases
    `fp8_every`          what rounding to FP8 did
    `phases_every`       where the time of the step went
    `parts_every`        sizes of gradients, weights and updates by part of the network
    `ranks_every`        how long each rank computed
    `timeline_every`     when the steps of the first pipeline ran, in `pipeline.json`

    `tensorboard`, `wandb` and `mlflow` say who gets all numbers too; the last two under the name `project`.
    `peak_tflops` is what one device can do in the run's precision, for `mfu`; 0 takes the known figure of the device.
    Known are the dense bf16 peaks of a few; in fp32, and on other devices, `mfu` is null without a figure of your own.
    """

    every: int = 10
    expert_load_every: int = 10
    fp8_every: int = 100
    phases_every: int = 1
    parts_every: int = 100
    ranks_every: int = 100
    timeline_every: int = 1000
    tensorboard: bool = True
    wandb: bool = False
    mlflow: bool = False
    project: str = "eva"
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1 step")
        for name in _NEVER_IS_ZERO:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative; 0 is never")
        if not self.project.strip() or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"project = {self.project!r} must be a name without any of / \\ # ? % :, such as 'eva'")
        if self.peak_tflops < 0:
            raise ValueError(f"peak_tflops = {self.peak_tflops} must not be negative; 0 takes the known figure")


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps (0: never) is done in this one."""
    return every > 0 and step % every == 0
