"""FP8 of a run: what its configuration means on a device, and what its log says of it."""

import torch

from model.fp8 import LEAST_SIZE_ON_GPU, PARTS_IN_FP8, PARTS_ON_GPU, Fp8Config
from model.transformer import products_in_fp8
from pretrain.config import Config
from pretrain.errors import UserError


def fp8_config(config: Config, device_type: str) -> Fp8Config:
    """How the products of a run are rounded on a kind of device, "cpu" or "cuda": on a GPU, those that are faster for
    it, unless the configuration wants all."""
    chooses = device_type == "cuda" and not config.precision.fp8_everywhere
    return Fp8Config(
        recipe=config.precision.fp8,
        power_of_two=config.precision.fp8_power_of_two,
        parts=PARTS_ON_GPU if chooses else PARTS_IN_FP8,
        least_size=LEAST_SIZE_ON_GPU if chooses else 0.0,
        keeps_weights=config.parallel.zero_stage < 3,
    )


def check_fp8(config: Config, device: torch.device) -> None:
    """Raises UserError, with the reason, where the device or its libraries cannot do the recipe."""
    recipe = config.precision.fp8
    if recipe == "off" or device.type != "cuda":
        return
    from model.te import reason_against

    if reason := reason_against(recipe):
        raise UserError(f'precision.fp8 = "{recipe}" is not possible here: {reason}; or set precision.fp8 = "off"')


def describe_fp8(config: Config, fp8: Fp8Config) -> str:
    """Which products are in FP8, and which are not though they could be: by their sizes, or by what a device gains."""
    low, high = products_in_fp8(config.model, fp8)
    rest = f"; in {config.precision.dtype}: {', '.join(high)}" if high else ""
    return f"fp8 = {config.precision.fp8}: {', '.join(low) or 'nothing'}{rest}"


def monitors_fp8(config: Config, step: int) -> bool:
    """Whether metrics of FP8 are wanted for a step, counted from 1."""
    every = config.logging.fp8_every
    return config.precision.fp8 != "off" and every > 0 and step % every == 0
