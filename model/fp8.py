"""Training in FP8: which products take their operands in 8 bits, and how these are scaled.

A tensor core multiplies 8-bit floats twice as fast as 16-bit ones, and they take half the memory. What they lack is
precision and range. E4M3 has 4 exponent and 3 mantissa bits: a value is off by at most 2^-4 of itself, and those that
keep this precision span only 2^-6 to 448. E5M2 trades a mantissa bit for range: 2^-3, and 2^-14 to 57344. Gradients of
a large model are nowhere near that range, and the values of one tensor spread over more than it. So every tensor is
stretched before it is rounded, by a `scale` that takes its largest magnitude to the end of the range, and the product
is shrunk back:

    y = Σ_k x_k w_k  ≈  (1 / (s_x s_w)) Σ_k fp8(s_x x_k) fp8(s_w w_k)

The products of two such numbers are exact in fp32, where they are added up. So the error is that of rounding alone:
independent, up to 2^-4 in each factor, it grows as √K under a sum that, where terms do not cancel, grows as K. A layer
has three products, and each needs its operands rounded:

    forward             y  = x Wᵀ        sums over inputs
    input gradient      dx = dy W        sums over outputs
    weight gradient     dW = dyᵀ x       sums over tokens

What differs between recipes is who shares a scale, and when it is known.

"delayed"   one scale a tensor, from the largest magnitudes of earlier steps. The tensor is read once, but one outlier
            takes the precision from all others, and growth beyond the history is cut off.
"current"   one scale a tensor, from its own largest magnitude: read twice, never cut off.
"block"     a scale for each 1 × 128 values of activations and gradients and each 128 × 128 of weights (report, section
            3.3.2): an outlier costs only its neighbours. A product can only take scales out of its sums tile by tile,
            so tiles lie along what is summed: dx needs dy in tiles along outputs, but dW needs dy and x in tiles along
            tokens. Each is rounded twice, both times from the original. Square blocks serve both directions. All is
            E4M3, as tiles have range enough; the other recipes take E5M2 for gradients.

Only products with most of the arithmetic are in FP8: projections of attention, MLPs, shared and routed experts. The
embedding, the head, the gate, norms, the attention core and the projection of multi-token prediction are high, as in
the report (section 3.3.1) and its published weights. So are matrices whose sizes are no multiples of 16, which tensor
cores cannot read in FP8. Weights, their fp32 masters and sums of gradients are untouched: FP8 lives in the products.

A scale may be any number, or be rounded down to a power of two. Then it costs up to a bit of the range, but rounding
does not depend on it, unless values leave the range: what shares a scale may differ from rank to rank, and yet a value
becomes the same number. That is the default here, and in Transformer Engine for blocks.

Of a delayed scale, the maximum counts over all ranks with the same weights, so that all of them round alike and a
checkpoint needs one history; the scales of one step are those of its beginning. The first step has no history, and
takes the scales of its own tensors. Of a current scale only the tensor on this rank counts. Routed experts have scales
each for itself: those rows and that matrix are a tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from model.quantize import (
    E4M3,
    E5M2,
    Quantized,
    dequantize_blocks,
    dequantize_tiles,
    encode,
    pad_groups,
    quantize_blocks,
    quantize_tiles,
    scale_of,
)

Recipe = Literal["off", "block", "current", "delayed"]
Part = Literal["attention", "mlp", "experts", "prediction"]
Kind = Literal["activation", "weight", "gradient"]
KINDS: tuple[Kind, ...] = ("activation", "weight", "gradient")
PARTS_IN_FP8: frozenset[Part] = frozenset({"attention", "mlp", "experts"})
# On a GPU those products are in FP8 that are faster for it, with few tokens too. An H200 (2026-11, 32768 tokens,
# forward and backward, with rounding, Transformer Engine 2.20) takes as long in bf16 as in block FP8 times
#     512 → 4096  0.62    2048 → 2048  0.82    2048 → 3072  0.95    2048 → 4096  1.10    8192 → 2048  1.29
# and with 8192 tokens 2048 → 7168 0.88, 7168 → 4096 1.20, 16384 → 7168 1.45: what is gained goes with in · out, and
# rounding with in + out. Routed experts are high there: see benchmarks/README.md.
PARTS_ON_GPU: frozenset[Part] = frozenset({"attention", "mlp"})
LEAST_SIZE_ON_GPU = 1600.0
AMAX_HISTORY = "amax_history"
HISTORY_STEPS = 16
SIZE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """How the products of `parts` are rounded, if in · out / (in + out) of a matrix is at least `least_size`. Where
    `keeps_weights`, rounded weights may be kept as long as weights do not change."""

    recipe: Recipe = "off"
    power_of_two: bool = True
    parts: frozenset[Part] = PARTS_IN_FP8
    least_size: float = 0.0
    keeps_weights: bool = True

    def format(self, kind: Kind) -> torch.dtype:
        """The FP8 format of a kind of tensor."""
        return E5M2 if kind == "gradient" and self.recipe != "block" else E4M3

    def takes(self, part: str, in_features: int, out_features: int) -> bool:
        """Whether a product with a matrix [out, in] of a part of the network is in FP8."""
        fits = in_features % SIZE_MULTIPLE == out_features % SIZE_MULTIPLE == 0
        is_large = in_features * out_features >= self.least_size * (in_features + out_features)
        return self.recipe != "off" and part in self.parts and fits and is_large


class Rounded(NamedTuple):
    """An operand rounded in one or both directions, as the fp32 values of its codes: `rows` to be summed over the last
    dimension, `columns` over the other."""

    rows: Tensor | None
    columns: Tensor | None


class Counts(NamedTuple):
    """Of values that are not zero: the largest magnitude; how many there are, became zero, and were cut off."""

    amax: Tensor
    nonzero: Tensor
    zeroed: Tensor
    clipped: Tensor


class Monitor:
    """What rounding did to the tensors of a step, while `active`: sums [2, 3, 4] in fp64 of `Counts` (the first is a
    maximum), for products that all replicas have or routed experts, by kind."""

    def __init__(self) -> None:
        self.active = False
        self.sums: Tensor | None = None

    def count(self, kind: Kind, x: Tensor, codes: Tensor, values: Tensor, *, of_experts: bool, share: float) -> None:
        """Adds the tensor x, its codes and the values of these; it counts for `share` of itself."""
        if not x.numel():
            return
        magnitudes, largest = x.abs().float(), torch.finfo(codes.dtype).max
        # A number goes beyond rounding to the last code when it is half a step above it.
        beyond = magnitudes > values.abs() * (1 + 0.5 * _last_step(codes.dtype))
        counts = Counts(
            magnitudes.amax(),
            (magnitudes > 0).sum(),
            ((magnitudes > 0) & (values == 0)).sum(),
            (beyond & (codes.float().abs() == largest)).sum(),
        )
        row = torch.stack([count.double() for count in counts])
        if self.sums is None:
            self.sums = torch.zeros(2, len(KINDS), len(counts), dtype=torch.float64, device=x.device)
        sums = self.sums[int(of_experts), KINDS.index(kind)]
        sums[0] = torch.maximum(sums[0], row[0])
        sums[1:] += share * row[1:]


def _last_step(format: torch.dtype) -> float:
    """From the last code but one to the last, relative to the last."""
    return {E4M3: 1 / 14, E5M2: 1 / 7}[format]


class Fp8:
    """FP8 of a rank; a value that its layers share. Gradients are those of a loss times `gradient_unit`: histories and
    monitors do not depend on over how many micro-batches a loss is the mean."""

    def __init__(self, config: Fp8Config | None = None) -> None:
        self.config = config or Fp8Config()
        self.monitor = Monitor()
        self.gradient_unit = 1.0
        self._weights: dict[int, tuple[Any, bool]] | None = None

    def quantizer(self, part: Part, in_features: int, out_features: int, *, num_experts: int = 0) -> "Quantizer | None":
        """How a matrix [out, in], or one for each expert, is multiplied in FP8; None if it is not."""
        return Quantizer(self, num_experts) if self.config.takes(part, in_features, out_features) else None

    @contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Where no weight changes, so that one may be rounded once for all micro-batches."""
        self._weights = {} if self.config.keeps_weights else None
        try:
            yield
        finally:
            self._weights = None

    def known_weight(self, quantizer: "Quantizer", *, observed: bool) -> Any:
        """What `remember_weight` was given, None if nothing or if it has yet to be `observed`."""
        operand, was_observed = (self._weights or {}).get(id(quantizer), (None, False))
        return operand if was_observed or not observed else None

    def remember_weight(self, quantizer: "Quantizer", operand: Any, *, observed: bool) -> None:
        """Keeps a rounded weight as long as weights are constant."""
        if self._weights is not None:
            self._weights[id(quantizer)] = operand, observed


class Quantizer(nn.Module):
    """Rounds the operands of one product, or with `num_experts` of one for each of that many; in "delayed" it holds the
    largest magnitudes of earlier steps, [1 or experts, 3 kinds, steps], oldest first, and those of this step."""

    amax_history: Tensor
    amax: Tensor

    def __init__(self, shared: Fp8, num_experts: int) -> None:
        super().__init__()
        self.shared, self.config = shared, shared.config
        self.of_experts = num_experts > 0
        # Whether there is any history. What a device holds is not looked at during a step.
        self.has_history = False
        if self.config.recipe == "delayed":
            shape = max(num_experts, 1), len(KINDS)
            self.register_buffer(AMAX_HISTORY, torch.zeros(*shape, HISTORY_STEPS))
            self.register_buffer("amax", torch.zeros(shape), persistent=False)

    def round(
        self,
        kind: Kind,
        x: Tensor,
        counts: Tensor | None = None,
        *,
        rows: bool = True,
        columns: bool = True,
        observed: bool = False,
        share: float = 1.0,
    ) -> Rounded:
        """Rounds x [R, D], of experts ordered by expert with `counts` [E] rows each, or their weights [E, out, in].
        What is `observed` counts for the monitor, for `share` of itself, and for delayed scales."""
        if self.config.recipe != "block":
            quantized = self._quantize_tensors(kind, x, counts, observed=observed)
            values = quantized.codes.float() * quantized.scale_inv
            rounded = Rounded(values, values)
        elif kind == "weight":
            quantized = quantize_blocks(x, power_of_two=self.config.power_of_two)
            values = dequantize_blocks(quantized)
            rounded = Rounded(values, values)
        else:
            along_tokens = self._round_columns(x, counts) if columns else None
            if not rows:
                return Rounded(None, along_tokens)
            quantized = quantize_tiles(x, power_of_two=self.config.power_of_two)
            rounded = Rounded(dequantize_tiles(quantized), along_tokens)
        if observed and self.shared.monitor.active:
            assert rounded.rows is not None
            self.observe(kind, x, quantized.codes, rounded.rows, share=share)
        return rounded

    def observe(self, kind: Kind, x: Tensor, codes: Tensor, values: Tensor, *, share: float = 1.0) -> None:
        """Shows a rounded tensor to the monitor."""
        self.shared.monitor.count(kind, x, codes, values, of_experts=self.of_experts, share=share)

    def _round_columns(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """Tiles along the rows of x; those of experts begin anew with each."""
        if counts is None:
            return dequantize_tiles(quantize_tiles(x.t(), power_of_two=self.config.power_of_two)).t()
        groups = pad_groups(counts, len(x))
        tiles = groups.spread(x).transpose(1, 2)
        values = dequantize_tiles(quantize_tiles(tiles.flatten(0, 1), power_of_two=self.config.power_of_two))
        return values.view_as(tiles).transpose(1, 2).flatten(0, 1).index_select(0, groups.places)

    def _quantize_tensors(self, kind: Kind, x: Tensor, counts: Tensor | None, *, observed: bool) -> Quantized:
        """One scale for all of x, or for each expert; its inverse is broadcast over x."""
        amax = self._largest(x, counts)
        if self.config.recipe == "delayed":
            amax = self._delayed(kind, amax, observed=observed)
        scale = scale_of(amax, self.config.format(kind), torch.float32, power_of_two=self.config.power_of_two)
        if counts is not None:
            scale = scale.repeat_interleave(counts, output_size=len(x))
        scale = scale.view(-1, *[1] * (x.dim() - 1))
        return Quantized(encode(x, scale, self.config.format(kind)), 1 / scale)

    def _largest(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """The largest magnitude, [1], or that of each expert, [E]."""
        if counts is not None:
            zeros = torch.zeros(len(counts), device=x.device)
            experts = torch.arange(len(counts), device=x.device).repeat_interleave(counts, output_size=len(x))
            return zeros.scatter_reduce(0, experts, x.abs().amax(1).float(), "amax")
        if self.of_experts:
            return x.abs().amax((1, 2)).float()
        return x.abs().amax().float().view(1) if x.numel() else torch.zeros(1, device=x.device)

    def _delayed(self, kind: Kind, amax: Tensor, *, observed: bool) -> Tensor:
        """The largest magnitude in the history, or where there is none that of now."""
        number = KINDS.index(kind)
        if observed:
            self.amax[:, number] = torch.maximum(self.amax[:, number], amax)
        earlier = self.earlier(kind)
        return torch.where(earlier > 0, earlier, amax)

    def earlier(self, kind: Kind) -> Tensor:
        """The largest magnitude in the history, [1] or [E]; 0 where there is none."""
        largest = self.amax_history[:, KINDS.index(kind)].amax(-1)
        return largest * self.shared.gradient_unit if kind == "gradient" else largest

    @torch.no_grad()
    def end_step(self) -> None:
        """Moves the largest magnitudes of this step into the history. What is not finite is no magnitude."""
        amax = torch.where(self.amax.isfinite(), self.amax, 0.0)
        amax[:, KINDS.index("gradient")] /= self.shared.gradient_unit
        self.amax_history.copy_(torch.cat((self.amax_history[..., 1:], amax.unsqueeze(-1)), dim=-1))
        self.amax.zero_()
        self.has_history = True


def quantizers(module: nn.Module) -> dict[str, Quantizer]:
    """All that a module holds, by name."""
    return {name: found for name, found in module.named_modules() if isinstance(found, Quantizer)}
