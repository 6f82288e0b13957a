"""What is asked of Transformer Engine, by one that does it in plain torch: operands, layouts, sums. Its own numbers are
tested on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import te
from model.fp8 import E4M3, KINDS, Fp8, Fp8Config, Quantizer
from model.fp8_products import REFERENCE
from model.quantize import E5M2, encode, scale_of


class Stored:
    """A tensor with one scale, and its transpose."""

    def __init__(self, x: Tensor, scale: Tensor, format: torch.dtype, *, rowwise: bool, columnwise: bool) -> None:
        codes = encode(x, scale, format)
        values = codes.float() / scale
        self._data = codes.view(torch.uint8) if rowwise else None
        self.rows, self.columns = values if rowwise else None, values if columnwise else None

    def dequantize(self, *, dtype: torch.dtype) -> Tensor:
        assert self.rows is not None
        return self.rows.to(dtype)

    def update_usage(self, *, rowwise_usage: bool, columnwise_usage: bool) -> None:
        self.rows = self.rows if rowwise_usage else None
        assert (self.columns is not None) == columnwise_usage


class PerTensor:
    """Its two quantisers of whole tensors; neither makes columns alone."""

    def __init__(self, scale: Any, amax: Any, format: torch.dtype, power_of_two: bool) -> None:
        self.scale, self.amax, self.format, self.power_of_two = scale, amax, format, power_of_two

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        assert rowwise
        self.usage = {"rowwise": rowwise, "columnwise": columnwise}

    def __call__(self, x: Tensor) -> Stored:
        assert len(x) % 16 == 0
        assert x.is_contiguous()
        amax = x.abs().amax().float().view(1)
        scale = self.scale
        if scale is None:
            scale = scale_of(amax, self.format, torch.float32, power_of_two=self.power_of_two)
        else:
            self.amax.copy_(torch.maximum(self.amax, amax))
        return Stored(x, scale, self.format, **self.usage)


def multiply(
    a: Stored,
    b: Stored,
    *,
    out_dtype: torch.dtype,
    layout: str,
    use_split_accumulator: bool,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, None]:
    """As its `general_gemm`: column-major operands, so the second comes first in row-major terms."""
    assert use_split_accumulator
    left = b.columns.t() if layout[1] == "T" else b.rows  # type: ignore[union-attr]
    right = a.rows.t() if layout[0] == "T" else a.columns  # type: ignore[union-attr]
    product = (left @ right).to(out_dtype)  # type: ignore[operator]
    if out is None:
        return product, None
    out.copy_(out + product if accumulate else product)
    return out, None


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        formats={E4M3: E4M3, E5M2: E5M2},
        multiply=multiply,
        Float8CurrentScalingQuantizer=lambda format, device, force_pow_2_scales: PerTensor(
            None, None, format, force_pow_2_scales
        ),
        Float8Quantizer=lambda scale, amax, format: PerTensor(scale, amax, format, False),
    )
    te._of_one_tensor.cache_clear()
    monkeypatch.setattr(te, "_load", lambda: fake)


def quantizer(recipe: Any) -> Quantizer:
    found = Fp8(Fp8Config(recipe=recipe)).quantizer("mlp", 32, 48)
    assert found is not None
    return found


@pytest.mark.parametrize("recipe", ["current", "delayed"])
@pytest.mark.parametrize("num_rows", [32, 21])
def test_three_products(recipe: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"activation": (num_rows, 32), "weight": (48, 32), "gradient": (num_rows, 48)}
    ours, theirs = {}, {}
    found = quantizer(recipe)
    for kind, size in sizes.items():
        x: Any = torch.randn(size, generator=generator)
        ours[kind] = REFERENCE.round(found, kind, x, rows=True, columns=True, observed=False)
        theirs[kind] = te.TENSOR_CORES.round(found, kind, x, rows=True, columns=True, observed=False)
    for function, pair in (
        ("forward", ("activation", "weight")),
        ("input_gradient", ("gradient", "weight")),
        ("weight_gradient", ("gradient", "activation")),
    ):
        expected, product = (
            getattr(arithmetic, function)(*(operands[kind] for kind in pair), torch.float32)
            for arithmetic, operands in ((REFERENCE, ours), (te.TENSOR_CORES, theirs))
        )
        torch.testing.assert_close(product, expected)
    columns = te.TENSOR_CORES.only_columns(theirs["gradient"])
    total = torch.full((48, 32), 7.0)
    for count, is_first in ((1, True), (2, False)):
        te.TENSOR_CORES.add_weight_gradient(columns, theirs["activation"], total, is_first=is_first)
        torch.testing.assert_close(total, count * expected)


def test_delayed_scales_and_magnitudes_are_those_of_the_reference() -> None:
    found, other = quantizer("delayed"), quantizer("delayed")
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for _ in range(2):
            for kind in KINDS:
                x = torch.randn(16, 32, generator=generator)
                expected = other.round(kind, x, observed=True).rows
                tensor = te.TENSOR_CORES.round(found, kind, x, rows=True, columns=False, observed=True).tensor
                torch.testing.assert_close(tensor.rows, expected)
            te.TENSOR_CORES.round(found, "activation", 1e5 * x, rows=True, columns=False, observed=False)
        assert torch.equal(found.amax, other.amax)
        found.end_step()
        other.end_step()


def test_the_monitor_sees_what_the_reference_shows_it() -> None:
    found, other = quantizer("current"), quantizer("current")
    for one in (found, other):
        one.shared.monitor.active = True
    x = torch.randn(21, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 32)
    te.TENSOR_CORES.round(found, "gradient", x, rows=True, columns=True, observed=True)
    other.round("gradient", x, observed=True)
    assert found.shared.monitor.sums is not None
    assert torch.equal(found.shared.monitor.sums, other.shared.monitor.sums)
