"""What a run will take on given hardware, in bf16 and in FP8: every step of its timeline as `Predictor` predicts it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from pretrain.config import Config
from pretrain.fp8 import fp8_config
from pretrain.planning.footprint import activations_of
from pretrain.planning.hardware import Hardware
from pretrain.planning.prediction import Predictor, StepPrediction, Traffic
from pretrain.planning.steps import Stretch

_HOUR = 3600


@dataclass(frozen=True)
class Forecast:
    """In one `precision`: the `last` step, with its share of the bf16 peak and the bytes that a rank sends in it by
    purpose and link; and of the whole run the seconds and the tokens."""

    precision: str
    world_size: int
    last: StepPrediction
    mfu: float
    traffic: Traffic
    seconds: float
    tokens: int

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.world_size * self.seconds / _HOUR

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU, on the mean over the run."""
        return self.tokens / self.seconds / self.world_size

    @property
    def last_tokens_per_s(self) -> float:
        """Of one GPU, in the last step."""
        return self.last.tokens / self.last.seconds / self.world_size


def forecasts(config: Config, steps: Iterable[Stretch], world_size: int, hardware: Hardware) -> tuple[Forecast, ...]:
    """In bf16 and in FP8, the one of them that is configured as it is; nothing for a run in fp32, whose rates no file
    has."""
    if config.precision.dtype != "bf16":
        return ()
    stretches, found = list(steps), []
    for name, variant in (("bf16", _in_bf16(config)), ("FP8", _in_fp8(config))):
        found.append(_forecast(name, variant, stretches, world_size, hardware))
    return tuple(found)


def predictor(config: Config, seq_len: int, world_size: int, hardware: Hardware) -> Predictor:
    """Of a run's steps at one sequence length. Where experts gain by FP8, kernels are better than ours and all gain."""
    if config.precision.fp8 != "off" and "grouped fp8" in hardware.flops:
        config = replace(config, precision=replace(config.precision, fp8_everywhere=True))
    return Predictor(
        sizes=activations_of(config, seq_len=seq_len, node_size=hardware.gpus_per_node),
        optimizer=config.optimizer,
        world_size=world_size,
        fp8=fp8_config(config, "cuda"),
        hardware=hardware,
    )


def _forecast(name: str, config: Config, stretches: list[Stretch], world_size: int, hardware: Hardware) -> Forecast:
    share = config.parallel.mesh_shape(world_size).dp * config.train.micro_batch_size

    @cache
    def of_length(seq_len: int) -> Predictor:
        return predictor(config, seq_len, world_size, hardware)

    @cache
    def step(seq_len: int, num_micro_batches: int) -> StepPrediction:
        return of_length(seq_len).step(num_micro_batches)

    seconds = sum(
        stretch.num_steps * step(stretch.seq_len, stretch.batch_size // share).seconds for stretch in stretches
    )
    end = stretches[-1]
    last, longest = step(end.seq_len, end.batch_size // share), of_length(end.seq_len)
    return Forecast(
        precision=name,
        world_size=world_size,
        last=last,
        mfu=longest.mfu(last),
        traffic=longest.traffic(end.batch_size // share),
        seconds=seconds,
        tokens=end.end,
    )


def _in_bf16(config: Config) -> Config:
    if config.precision.fp8 == "off":
        return config
    return replace(
        config,
        precision=replace(config.precision, fp8="off", fp8_power_of_two=True, fp8_everywhere=False),
        parallel=replace(config.parallel, fp8_dispatch=False),
    )


def _in_fp8(config: Config) -> Config:
    if config.precision.fp8 != "off":
        return config
    return replace(
        config,
        precision=replace(config.precision, fp8="block"),
        parallel=replace(config.parallel, fp8_dispatch=config.parallel.ep > 1),
    )
