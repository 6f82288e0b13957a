"""Products in FP8 against what they are said to be: rounded operands, multiplied."""

import copy
import math
from typing import Any

import pytest
import torch
from support import small_model
from torch import Tensor

from model import quantize
from model.fp8 import HISTORY_STEPS, KINDS, PARTS_ON_GPU, Fp8, Fp8Config, Quantizer, quantizers
from model.init import initialize
from model.linear import Linear, WeightGradients, grouped_linear
from model.quantize import E4M3, E5M2, dequantize_blocks, dequantize_tiles, quantize_blocks, quantize_tiles
from model.recompute import Execution
from model.transformer import Transformer

RECIPES = ["block", "current", "delayed"]


def config(recipe: Any, **changes: Any) -> Fp8Config:
    return Fp8Config(recipe=recipe, **changes)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiles(x: Tensor) -> Tensor:
    return dequantize_tiles(quantize_tiles(x, power_of_two=True))


def whole(x: Tensor, format: torch.dtype, amax: float | None = None) -> Tensor:
    """A tensor rounded with one scale."""
    largest = torch.finfo(format).max
    scale = torch.tensor(2.0 ** math.floor(math.log2(largest / (float(x.abs().amax()) if amax is None else amax))))
    return (x * scale).clamp(-largest, largest).to(format).float() * (1 / scale)


def rounded(recipe: str, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Operands of the three products: x and W, dy and W, dy and x."""
    if recipe == "block":
        square = dequantize_blocks(quantize_blocks(weight, power_of_two=True))
        return tiles(x), square, tiles(grad), tiles(grad.t()).t(), tiles(x.t()).t()
    low, last = whole(x, E4M3), whole(grad, E5M2)
    return low, whole(weight, E4M3), last, last, low


def make_linear(recipe: str, size_in: int, size_out: int, **changes: Any) -> tuple[Linear, Execution]:
    execution = Execution(fp8=Fp8(config(recipe, **changes)))
    layer = Linear(size_in, size_out, execution, "mlp")
    layer.weight.data = normal(size_out, size_in, seed=5)
    return layer, execution


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tokens", "size_in", "size_out"), [(256, 128, 256), (37, 208, 48), (300, 16, 400)])
@pytest.mark.parametrize("deferring", [False, True])
def test_a_layer_is_three_products_of_rounded_operands(
    recipe: str, tokens: int, size_in: int, size_out: int, deferring: bool
) -> None:
    layer, execution = make_linear(recipe, size_in, size_out)
    x = normal(tokens, size_in).requires_grad_()
    grad = normal(tokens, size_out, seed=1)
    low, weight, last, last_columns, columns = rounded(recipe, x.detach(), layer.weight.detach(), grad)
    y = layer(x.view(1, tokens, size_in))
    torch.testing.assert_close(y[0], low @ weight.t(), rtol=1e-5, atol=1e-4)
    execution.weight_gradients.deferring = deferring
    y.backward(grad.unsqueeze(0))
    if deferring:
        assert layer.weight.grad is None
        for work in execution.weight_gradients.take():
            work()
    torch.testing.assert_close(x.grad, last @ weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, last_columns.t() @ columns, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_are_layers_each_for_itself(recipe: str) -> None:
    """The middle one has no rows; the last has more than a tile."""
    counts = torch.tensor([5, 0, 140])
    fp8 = Fp8(config(recipe))
    found = fp8.quantizer("experts", 64, 32, num_experts=3)
    weight = torch.nn.Parameter(normal(3, 32, 64, seed=2) * torch.tensor([1.0, 50.0, 3.0])[:, None, None])
    rows = normal(145, 64) * torch.linspace(0.1, 3, 145)[:, None]
    leaf, grad = rows.clone().requires_grad_(), normal(145, 32, seed=3)
    y = grouped_linear(leaf, weight, counts, WeightGradients(), found)
    y.backward(grad)
    assert leaf.grad is not None
    assert weight.grad is not None
    for expert, (begin, end) in enumerate([(0, 5), (5, 5), (5, 145)]):
        if begin == end:
            assert not weight.grad[expert].any()
            continue
        here = slice(begin, end)
        low, square, last, last_columns, columns = rounded(recipe, rows[here], weight[expert].detach(), grad[here])
        torch.testing.assert_close(y[here], low @ square.t(), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(leaf.grad[here], last @ square, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(weight.grad[expert], last_columns.t() @ columns, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_without_rows(recipe: str) -> None:
    found = Fp8(config(recipe)).quantizer("experts", 32, 16, num_experts=2)
    weight = torch.nn.Parameter(normal(2, 16, 32))
    rows = torch.zeros(0, 32, requires_grad=True)
    y = grouped_linear(rows, weight, torch.zeros(2, dtype=torch.int64), WeightGradients(), found)
    y.sum().backward()
    assert y.shape == (0, 16)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("length", [64, 512, 4096])
def test_the_error_of_a_product_is_that_of_independent_roundings(recipe: str, length: int) -> None:
    """Each factor is off by up to 2^-4 of itself, uniformly below the last bit: 2^-4 / √3 at most as standard
    deviation, less on the mean over mantissas. Over K terms that adds up like √K, as the terms themselves do."""
    layer, _ = make_linear(recipe, length, 64)
    x = normal(64, length)
    with torch.no_grad():
        error, exact = layer(x) - x @ layer.weight.t(), x @ layer.weight.t()
    relative = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    assert 0.02 < relative < 2**-4 * (2 / 3) ** 0.5


def test_a_broken_scale_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the scales of tiles stretch the values fourfold too far, so that the largest are cut off."""
    right = quantize.scale_of

    def wrong(*arguments: Any, **options: Any) -> Tensor:
        return 4 * right(*arguments, **options)

    monkeypatch.setattr(quantize, "scale_of", wrong)
    with pytest.raises(AssertionError):
        test_the_error_of_a_product_is_that_of_independent_roundings("block", 512)


@pytest.mark.parametrize("part", ["attention", "mlp", "experts", "prediction"])
def test_which_products_are_in_fp8(part: Any) -> None:
    fp8 = Fp8(config("block"))
    assert (fp8.quantizer(part, 64, 32) is None) == (part == "prediction")
    assert fp8.quantizer(part, 64, 40) is None
    assert fp8.quantizer(part, 40, 64) is None
    assert Fp8().quantizer(part, 64, 32) is None
    on_gpu = Fp8(config("block", parts=PARTS_ON_GPU, least_size=30.0))
    assert (on_gpu.quantizer(part, 128, 48) is None) == (part in ("prediction", "experts"))
    assert on_gpu.quantizer(part, 64, 48) is None


def test_what_of_a_model_is_in_fp8() -> None:
    sizes = {"q_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 24}
    model = Transformer(small_model(**sizes), fp8=config("block"))
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    expected = {f"layers.{index}.self_attn.{name}.quantizer" for index in range(4) for name in attention}
    for index in range(4):
        mlp = f"layers.{index}.mlp" if index < 1 else f"layers.{index}.mlp.shared_experts"
        expected |= {f"{mlp}.{name}.quantizer" for name in ("gate_up_proj", "down_proj")}
        if index:
            expected |= {f"layers.{index}.mlp.experts.{name}_quantizer" for name in ("gate_up", "down")}
    assert set(quantizers(model)) == expected


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_added_to_sums_in_fp32(recipe: str) -> None:
    """The first takes the place of an old sum."""
    layer, execution = make_linear(recipe, 64, 32)
    weight: Any = layer.weight
    x, grad = normal(48, 64), normal(48, 32, seed=1)
    layer(x).backward(grad)
    once = weight.grad.clone()
    weight.data, weight.grad = weight.data, None
    weight.main_grad, weight.main_grad_is_old = torch.full((32, 64), 9.0), True
    for count in (1, 2, 3):
        execution.weight_gradients.deferring = count == 2
        layer(x).backward(grad)
        for work in execution.weight_gradients.take():
            work()
        assert weight.grad is None
        torch.testing.assert_close(weight.main_grad, count * once)


@pytest.mark.parametrize("recipe", RECIPES)
def test_some_rows_of_a_weight(recipe: str) -> None:
    """At a tile's edge, tiles of a slice are those of the whole."""
    layer, _ = make_linear(recipe, 64, 256)
    x = normal(20, 64).requires_grad_()
    whole_y = layer(x)
    part = layer(x, slice(128, 256))
    assert part.shape == (20, 128)
    if recipe == "block":
        torch.testing.assert_close(part, whole_y[:, 128:])
    part.sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[:128].any()
    assert layer.weight.grad[128:].all()


def test_weights_are_rounded_once_while_they_are_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    right = Quantizer.round
    monkeypatch.setattr(
        Quantizer,
        "round",
        lambda self, kind, *args, **options: (kinds.append(kind), right(self, kind, *args, **options))[1],
    )
    layer, execution = make_linear("block", 64, 32)
    x = normal(16, 64).requires_grad_()
    with execution.fp8.constant_weights():
        for _ in range(3):
            layer(x).sum().backward()
    assert kinds.count("weight") == 1
    with torch.no_grad():
        layer.weight.mul_(2)
        before = layer(x)
    with execution.fp8.constant_weights():
        assert torch.equal(layer(x), before)
    assert kinds.count("weight") == 3


def test_delayed_scales_are_those_of_the_steps_before() -> None:
    layer, _ = make_linear("delayed", 32, 16)
    found = layer.quantizer
    assert found is not None
    amaxes = []
    for step in range(HISTORY_STEPS + 3):
        x = normal(8, 32, seed=step) * (100.0 if step == 1 else 1.0)
        earlier = max(amaxes[-HISTORY_STEPS:], default=None)
        for scale in (1.0, 0.5):
            # Two micro-batches; the larger counts, and both have the scale of the step.
            low = found.round("activation", scale * x, observed=True).rows
            torch.testing.assert_close(low, whole(scale * x, E4M3, earlier))
        found.round("activation", 1e6 * x, observed=False)
        amaxes.append(float(x.abs().amax()))
        found.end_step()
        assert found.amax_history[0, 0].tolist()[-len(amaxes) :] == amaxes[-HISTORY_STEPS:]
        assert not found.amax_history[0, 1:].any()


def test_a_step_that_is_not_finite_leaves_no_trace() -> None:
    found = make_linear("delayed", 32, 16)[0].quantizer
    assert found is not None
    found.round("gradient", torch.tensor([[1.0, torch.inf]]), observed=True)
    found.end_step()
    assert not found.amax_history.any()


@pytest.mark.parametrize("of_experts", [False, True])
def test_the_monitor_counts(of_experts: bool) -> None:
    fp8 = Fp8(config("delayed"))
    found = fp8.quantizer("experts" if of_experts else "mlp", 16, 16, num_experts=2 if of_experts else 0)
    assert found is not None
    found.amax_history[:, 0, -1] = 448.0
    # The scale is 1: the smallest code is 2^-9, whose half is zero, and codes end at 448, to which 463 is rounded.
    x = torch.tensor([[0.0, 2.0**-10, -(2.0**-9), 1.0], [463.0, -465.0, 500.0, 0.0]])
    counts = torch.tensor([1, 1]) if of_experts else None
    found.round("activation", x, counts, observed=True)
    assert fp8.monitor.sums is None
    fp8.monitor.active = True
    found.round("activation", x, counts, observed=True, share=0.5)
    found.round("activation", x, counts, observed=True)
    found.round("activation", x, counts, observed=False)
    assert fp8.monitor.sums is not None
    expected = torch.zeros(2, len(KINDS), 4, dtype=torch.float64)
    expected[int(of_experts), 0] = torch.tensor([500.0, 9.0, 1.5, 3.0])
    assert torch.equal(fp8.monitor.sums, expected)


def run(recipe: str, parts: tuple[str, ...] = (), *, kept: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients. Every token goes to all experts: a choice may change for a small error."""
    everything = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    sizes = small_model(hidden_size=64, q_lora_rank=16, qk_rope_head_dim=16, num_attention_heads=4, **everything)
    model = Transformer(sizes, recompute=frozenset(parts), fp8=config(recipe))
    initialize(model, sizes, seed=0)
    tokens = torch.randint(0, 96, (4, 66), generator=torch.Generator().manual_seed(0))
    fp8 = model.execution.fp8
    with fp8.constant_weights() if kept else copy.copy(torch.enable_grad()):
        losses = model(tokens)
        (losses.lm_loss + losses.mtp_loss + losses.balance_loss).backward()
    return losses.lm_loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_near_its_own_in_full_precision(recipe: str) -> None:
    exact, gradients = run("off")
    loss, low = run(recipe)
    assert 0 < abs(float(loss / exact) - 1) < 5e-3
    ours, theirs = (torch.cat([gradient.flatten() for gradient in found]) for found in (low, gradients))
    assert (ours - theirs).norm() < 0.35 * theirs.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_computed_again_is_the_same(recipe: str) -> None:
    loss, expected = run(recipe)
    for parts, kept in ((("norms", "mla_up", "swiglu"), False), (("mla_up",), True)):
        again, gradients = run(recipe, parts, kept=kept)
        assert torch.equal(again, loss)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.equal(ours, theirs)
