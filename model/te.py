"""FP8 on a GPU by Transformer Engine: its quantisers and products, as functions.

Its modules are not used, because the weight gradient of a product must be able to wait, and because what is rounded and
kept, and when, is decided in `model.linear`. On Hopper the tensor cores take both FP8 operands with the dimension that
is summed last, so whatever is to be summed over its rows is also stored transposed (Transformer Engine's "columnwise").
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.fp8 import E4M3, KINDS, SIZE_MULTIPLE, Kind, Quantizer, Recipe
from model.quantize import scale_of


@lru_cache(maxsize=1)
def _load() -> Any:
    """What is used of it. Importing it takes seconds, and only a GPU has it."""
    from transformer_engine.pytorch import constants, cpp_extensions, quantization, tensor

    names = {"Float8BlockQuantizer", "Float8CurrentScalingQuantizer", "Float8Quantizer"}
    return SimpleNamespace(
        formats={E4M3: constants.DType.kFloat8E4M3, torch.float8_e5m2: constants.DType.kFloat8E5M2},
        multiply=cpp_extensions.general_gemm,
        can_do=quantization.check_fp8_support,
        can_do_blocks=quantization.check_fp8_block_scaling_support,
        **{name: getattr(tensor, name) for name in names},
    )


def reason_against(recipe: Recipe) -> str:
    """Why this GPU or this installation cannot do a recipe; empty if it can."""
    try:
        te = _load()
    except (ImportError, OSError) as error:
        return f"Transformer Engine cannot be imported ({error}); install this package's extra `gpu`"
    can, reason = te.can_do_blocks() if recipe == "block" else te.can_do()
    return "" if can else str(reason).rstrip(".")


class Operand(NamedTuple):
    """What the quantiser made of a matrix of `num_rows`, filled up with rows of zeros to a multiple of 16."""

    tensor: Any
    num_rows: int


class TensorCores:
    """Rounds and multiplies on a GPU, adding up in fp32."""

    def round(
        self,
        quantizer: Quantizer,
        kind: Kind,
        x: Tensor,
        *,
        rows: bool,
        columns: bool,
        observed: bool,
        share: float = 1.0,
    ) -> Operand:
        """As `Quantizer.round`."""
        num_rows = len(x)
        x = F.pad(x, (0, 0, 0, -num_rows % SIZE_MULTIPLE)) if num_rows % SIZE_MULTIPLE else x.contiguous()
        rounding = _rounding(quantizer, kind, x)
        rounding.internal = True
        # Of whole tensors there is no kernel that makes columns alone.
        rounding.set_usage(rowwise=rows or quantizer.config.recipe != "block", columnwise=columns)
        tensor = rounding(x)
        if quantizer.config.recipe == "delayed" and observed:
            seen = quantizer.amax[:, KINDS.index(kind)]
            torch.maximum(seen, rounding.amax, out=seen)
        if observed and rows and quantizer.shared.monitor.active:
            codes = tensor._rowwise_data if quantizer.config.recipe == "block" else tensor._data
            values = tensor.dequantize(dtype=torch.float32)
            quantizer.observe(kind, x, codes.view(quantizer.config.format(kind)), values, share=share)
        return Operand(tensor, num_rows)

    def only_columns(self, operand: Operand) -> Operand:
        """The same without what is summed over rows."""
        operand.tensor.update_usage(rowwise_usage=False, columnwise_usage=True)
        return operand

    def forward(self, x: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
        """x Wᵀ, [T, out]."""
        return _first_rows(_multiply(weight.tensor, x.tensor, "TN", dtype), x.num_rows)

    def input_gradient(self, grad: Operand, weight: Operand, dtype: torch.dtype) -> Tensor:
        """dy W, [T, in]."""
        return _first_rows(_multiply(weight.tensor, grad.tensor, "NN", dtype), grad.num_rows)

    def weight_gradient(self, grad: Operand, x: Operand, dtype: torch.dtype) -> Tensor:
        """dyᵀ x, [out, in]."""
        return _multiply(x.tensor, grad.tensor, "NT", dtype)

    def add_weight_gradient(self, grad: Operand, x: Operand, total: Tensor, *, is_first: bool) -> None:
        """Adds it in fp32 to a total, or puts it there if it `is_first`."""
        _multiply(x.tensor, grad.tensor, "NT", total.dtype, out=total, accumulate=not is_first)


TENSOR_CORES = TensorCores()


def _multiply(a: Any, b: Any, layout: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """b aᵀ ("TN"), b a ("NN") or bᵀ a ("NT")."""
    product: Tensor = _load().multiply(a, b, out_dtype=dtype, layout=layout, use_split_accumulator=True, **options)[0]
    return product


def _first_rows(product: Tensor, num_rows: int) -> Tensor:
    """No view, since autograd lets nobody change a view in place that one of its functions returned."""
    return product if len(product) == num_rows else product[:num_rows].clone()


def _rounding(quantizer: Quantizer, kind: Kind, x: Tensor) -> Any:
    """The quantiser of Transformer Engine for a tensor."""
    config = quantizer.config
    if config.recipe == "delayed":
        return _delayed(quantizer, kind, x)
    return _of_one_tensor(config.recipe, config.format(kind), config.power_of_two, kind == "weight")


@lru_cache
def _of_one_tensor(recipe: Recipe, format: torch.dtype, power_of_two: bool, is_weight: bool) -> Any:
    te = _load()
    if recipe == "current":
        return te.Float8CurrentScalingQuantizer(
            te.formats[format], torch.device("cuda"), force_pow_2_scales=power_of_two
        )
    return te.Float8BlockQuantizer(
        te.formats[format],
        rowwise=True,
        columnwise=True,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=2 if is_weight else 1,
    )


def _delayed(quantizer: Quantizer, kind: Kind, x: Tensor) -> Any:
    """With the scale of the history. Where there is none, the tensor is read once more for its own. The kernel that
    rounds it finds its largest magnitude."""
    te, format = _load(), quantizer.config.format(kind)
    largest = quantizer.earlier(kind) if quantizer.has_history else x.abs().amax().float().view(1)
    scale = scale_of(largest, format, torch.float32, power_of_two=quantizer.config.power_of_two)
    return te.Float8Quantizer(scale, torch.zeros_like(largest), te.formats[format])
