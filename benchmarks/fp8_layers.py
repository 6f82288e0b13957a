"""Each product of a layer in FP8 beside bf16 on one GPU: forward, both gradients, and what rounding costs.

`python benchmarks/fp8_layers.py [CONFIG.toml] [tokens of a micro-batch]`. Weight gradients are added to an fp32 sum,
and weights are rounded once for each backward pass, as in a step of one micro-batch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from model.fp8 import Fp8, Fp8Config, Recipe
from model.linear import Linear
from model.recompute import Execution
from model.transformer import ModelPart, Transformer
from parallel.optimizer import sum_in_fp32
from pretrain.config import load_config

PROJECT = Path(__file__).parent.parent
RECIPES: tuple[Recipe, ...] = ("off", "block", "current", "delayed")
REPEATS = 20


def milliseconds(work: Callable[[], object]) -> float:
    """The median of one run."""
    times = []
    for number in range(REPEATS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return median(times)


def shapes(config_file: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the products of a dense and an expert layer, by name."""
    model = load_config(config_file).model
    part = ModelPart(
        layers=(0, model.first_k_dense_replace), embedding=False, head=False, first_expert=0, num_local_experts=1
    )
    with torch.device("meta"):
        modules = Transformer(model, part).named_modules()
    return {
        name.partition(".")[2].partition(".")[2]: (module.weight.shape[1], module.weight.shape[0])
        for name, module in modules
        if isinstance(module, Linear)
    }


def time_layer(recipe: Recipe, size_in: int, size_out: int, tokens: int) -> float:
    """Forward and backward pass."""
    execution = Execution(fp8=Fp8(Fp8Config(recipe=recipe)))
    layer = Linear(size_in, size_out, execution, "mlp").cuda()
    layer.weight.data = torch.randn_like(layer.weight, dtype=torch.bfloat16)
    sum_in_fp32(layer.weight, torch.zeros_like(layer.weight, dtype=torch.float32))
    x = torch.randn(tokens, size_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, size_out, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        x.grad = None
        with execution.fp8.constant_weights():
            layer(x).backward(grad)

    step()
    if recipe == "delayed" and layer.quantizer is not None:
        layer.quantizer.end_step()
    return milliseconds(step)


def time_rounding(size_in: int, size_out: int, tokens: int) -> tuple[float, float]:
    """Of what a step of the layer rounds in blocks: for the forward pass, and for the backward pass."""
    from model.te import TENSOR_CORES

    quantizer = Fp8(Fp8Config(recipe="block")).quantizer("mlp", size_in, size_out)
    assert quantizer is not None
    x, grad, weight = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16)
        for size in ((tokens, size_in), (tokens, size_out), (size_out, size_in))
    )

    def forward() -> None:
        TENSOR_CORES.round(quantizer, "activation", x, rows=True, columns=False, observed=False)
        TENSOR_CORES.round(quantizer, "weight", weight, rows=True, columns=True, observed=False)

    def backward() -> None:
        TENSOR_CORES.round(quantizer, "gradient", grad, rows=True, columns=True, observed=False)
        TENSOR_CORES.round(quantizer, "activation", x, rows=False, columns=True, observed=False)

    return milliseconds(forward), milliseconds(backward)


def main() -> None:
    config_file = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "configs/dsv3_2b.toml"
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 8 * 4096
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens; ms forward and backward")
    print(f"| product | in | out | {' | '.join(RECIPES)} | off / block | rounding in blocks: forward | backward |")
    print("|---|---|---|" + "---|" * (len(RECIPES) + 3))
    for name, (size_in, size_out) in shapes(config_file).items():
        times = {recipe: time_layer(recipe, size_in, size_out, tokens) for recipe in RECIPES}
        cells = [f"{times[recipe]:.3f}" for recipe in RECIPES] + [f"{times['off'] / times['block']:.2f}"]
        cells += [f"{time:.3f}" for time in time_rounding(size_in, size_out, tokens)]
        print(f"| {name} | {size_in} | {size_out} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
