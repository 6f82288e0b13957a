"""Transformer Engine against the reference: quantised values to the bit, products within the order of their sums."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import WIDE, finish, read_metrics, start_processes, write_run
from torch import Tensor

from model.fp8 import Fp8, Fp8Config, Kind, Quantizer
from model.fp8_products import REFERENCE
from model.linear import Linear
from model.quantize import encode, quantize_blocks, quantize_tiles, scale_of
from model.recompute import Execution
from pretrain.checkpoints.checkpoint import CheckpointReader, step_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RECIPES = ("block", "current", "delayed")
SHAPES = [(256, 384), (336, 208), (16, 576), (1024, 128)]


def values(name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Matrices whose tiles need every rule of the scales."""
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda")
    if name == "normal":
        return x.to(dtype)
    if name == "wide":
        return (x * torch.logspace(-30, 30, x.numel(), device="cuda").view(shape).t().reshape(shape)).to(dtype)
    # Zeros, whole tiles of them too; numbers whose scale would be infinite, and denormal ones; the largest there are.
    x[:, :130] = 0
    x[1, 1] = 2.0**-120
    x[2] *= 1e-37
    x[3] = 3e-39
    x[4, 5:9] = torch.tensor([torch.inf, -torch.inf, torch.finfo(dtype).max, -torch.finfo(dtype).max], device="cuda")
    x[5] = torch.finfo(dtype).max
    return x.to(dtype)


def quantizer(recipe: str, *, power_of_two: bool = True) -> Quantizer:
    found = Fp8(Fp8Config(recipe=recipe, power_of_two=power_of_two)).quantizer("mlp", 128, 128)  # type: ignore[arg-type]
    assert found is not None
    return found.cuda()


def round_by_engine(rounding: Quantizer, kind: Kind, x: Tensor) -> Any:
    from model.te import TENSOR_CORES

    return TENSOR_CORES.round(rounding, kind, x, rows=True, columns=True, observed=True).tensor


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    ours, theirs = (tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8) for tensor in (ours, theirs))
    assert torch.equal(ours, theirs), int((ours != theirs).sum())


@pytest.mark.parametrize("name", ["normal", "wide", "special"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_tiles_and_blocks_to_the_bit(name: str, shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool) -> None:
    x, rounding = values(name, shape, dtype), quantizer("block", power_of_two=power_of_two)
    num_rows, num_columns = shape
    theirs = round_by_engine(rounding, "activation", x)
    for ours, codes, scale_inv, length in (
        (quantize_tiles(x, power_of_two=power_of_two), theirs._rowwise_data, theirs._rowwise_scale_inv, num_rows),
        (
            quantize_tiles(x.t(), power_of_two=power_of_two),
            theirs._columnwise_data,
            theirs._columnwise_scale_inv,
            num_columns,
        ),
    ):
        assert_same_bits(ours.scale_inv.t(), scale_inv[:, :length])
        assert_same_bits(ours.codes, codes)
    theirs = round_by_engine(rounding, "weight", x)
    ours = quantize_blocks(x, power_of_two=power_of_two)
    assert_same_bits(ours.scale_inv, theirs._rowwise_scale_inv[:, : ours.scale_inv.shape[1]])
    assert_same_bits(ours.scale_inv.t(), theirs._columnwise_scale_inv[:, : ours.scale_inv.shape[0]])
    assert_same_bits(ours.codes, theirs._rowwise_data)
    assert_same_bits(ours.codes.t(), theirs._columnwise_data)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("kind", ["activation", "gradient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_whole_tensors_to_the_bit(recipe: str, kind: Kind, dtype: torch.dtype, power_of_two: bool) -> None:
    rounding = quantizer(recipe, power_of_two=power_of_two)
    format = rounding.config.format(kind)
    amaxes: list[float] = []
    for step, factor in enumerate((1.0, 3.0, 1e-3, 0.0)):
        x = values("normal", (336, 208), dtype) * factor
        amaxes.append(float(x.abs().amax()))
        amax = max(amaxes[:-1]) if recipe == "delayed" and step else amaxes[-1]
        scale = scale_of(torch.tensor([amax], device="cuda"), format, torch.float32, power_of_two=power_of_two)
        # The second of two micro-batches has the smaller values, and the same scale if that is delayed.
        theirs = round_by_engine(rounding, kind, x)
        if recipe == "delayed" and step:
            round_by_engine(rounding, kind, x / 2)
        assert_same_bits(encode(x, scale, format), theirs._data)
        assert_same_bits(encode(x, scale, format).t(), theirs._transpose)
        assert_same_bits(1 / scale, theirs._scale_inv)
        if recipe == "delayed":
            rounding.end_step()
            number = ("activation", "weight", "gradient").index(kind)
            assert rounding.amax_history[0, number, -len(amaxes) :].tolist() == amaxes


@pytest.mark.parametrize("recipe", ["block", "current", "delayed"])
@pytest.mark.parametrize("shape", [(384, 512, 256), (336, 208, 576), (20, 64, 48)], ids=str)
def test_products_differ_by_the_order_of_sums(recipe: str, shape: tuple[int, int, int]) -> None:
    """Sums over K of exact products, each within 2^-11 of the sum of magnitudes: tensor cores align the products of a
    few steps to the largest and keep 13 bits below it, before they are added up in fp32."""
    from model.te import TENSOR_CORES

    num_rows, size_in, size_out = shape
    torch.manual_seed(1)
    tensors = {"activation": (num_rows, size_in), "weight": (size_out, size_in), "gradient": (num_rows, size_out)}
    rounding = quantizer(recipe)
    ours, theirs = {}, {}
    for kind, size in tensors.items():
        x = torch.randn(size, device="cuda", dtype=torch.bfloat16) * 3
        ours[kind] = REFERENCE.round(rounding, kind, x, rows=True, columns=True, observed=False)
        theirs[kind] = TENSOR_CORES.round(rounding, kind, x, rows=True, columns=True, observed=False)
    for function, pair in (
        ("forward", ("activation", "weight")),
        ("input_gradient", ("gradient", "weight")),
        ("weight_gradient", ("gradient", "activation")),
    ):
        exact, product = (
            getattr(arithmetic, function)(*(operands[kind] for kind in pair), torch.float32)
            for arithmetic, operands in ((REFERENCE, ours), (TENSOR_CORES, theirs))
        )
        magnitudes = [type(ours[kind])(*(part.abs() for part in ours[kind])) for kind in pair]
        bound = getattr(REFERENCE, function)(*magnitudes, torch.float32)
        worst = float(((product - exact).abs() / bound.clamp(min=1e-30)).max())
        print(recipe, shape, function, f"2^{torch.tensor(worst).log2():.1f}")
        assert worst < 2.0**-11, function
    total = torch.ones(size_out, size_in, device="cuda")
    for is_first, count in ((False, 1), (True, 1), (False, 2)):
        grad, x = theirs["gradient"], theirs["activation"]
        TENSOR_CORES.add_weight_gradient(grad, x, total, is_first=is_first)
        one = TENSOR_CORES.weight_gradient(grad, x, torch.float32)
        torch.testing.assert_close(total, count * one + (not is_first and count == 1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("recipe", ["block", "current", "delayed"])
@pytest.mark.parametrize("num_tokens", [256, 37])
def test_a_layer_as_on_the_cpu(recipe: str, num_tokens: int) -> None:
    torch.manual_seed(2)
    x, grad = torch.randn(num_tokens, 192).bfloat16(), torch.randn(num_tokens, 320).bfloat16()
    weight = torch.randn(320, 192).bfloat16() * 0.1
    results = {}
    for device in ("cpu", "cuda"):
        execution = Execution(fp8=Fp8(Fp8Config(recipe=recipe)))  # type: ignore[arg-type]
        layer = Linear(192, 320, execution, "mlp").to(device)
        layer.weight.data = weight.to(device)
        leaf = x.to(device).detach().requires_grad_()
        execution.fp8.monitor.active = True
        y = layer(leaf)
        y.backward(grad.to(device))
        sums = execution.fp8.monitor.sums
        assert leaf.grad is not None
        assert layer.weight.grad is not None
        assert sums is not None
        results[device] = [tensor.detach().float().cpu() for tensor in (y, leaf.grad, layer.weight.grad, sums)]
    *products, sums = zip(results["cpu"], results["cuda"], strict=True)
    for ours, theirs in products:
        assert (ours - theirs).norm() < 2e-3 * ours.norm()
    torch.testing.assert_close(*sums)


def test_training_in_fp8(tmp_path: Path) -> None:
    """Every recipe follows bf16, and goes on to the bit after an interruption."""
    config = write_run(tmp_path, **WIDE)
    exact = ("precision.dtype=bf16", "run.deterministic=true", "timeline.learning_rate=1e-3", "logging.fp8_every=3")
    runs = [["run.name=bf16", *exact]]
    for recipe in RECIPES:
        settings = (*exact, f"precision.fp8={recipe}", "precision.fp8_everywhere=true")
        runs.append([f"run.name={recipe}", *settings])
        runs.append([f"run.name={recipe}-broken", "train.steps=5", *settings])
        runs.append([f"run.name={recipe}-broken", *settings])
    finish(start_processes(["tests/train_in_turn.py", str(config), json.dumps(runs)], processes=1))
    for recipe in RECIPES:
        metrics = read_metrics(tmp_path / recipe)
        for high, low in zip(read_metrics(tmp_path / "bf16"), metrics, strict=True):
            assert low["lm_loss"] == pytest.approx(high["lm_loss"], rel=5e-3), (recipe, high["step"])
        assert metrics[2]["fp8_amax_gradient"] > 0
        straight, broken = (CheckpointReader(step_folder(tmp_path / f"{recipe}{end}", 12)) for end in ("", "-broken"))
        for kind in ("param", "exp_avg", "exp_avg_sq", "buffer", "fp8"):
            assert straight.keys(kind) or kind == "fp8"
            for name in straight.keys(kind):
                assert torch.equal(straight.tensor(f"{kind}/{name}"), broken.tensor(f"{kind}/{name}")), name
