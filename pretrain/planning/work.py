"""What a rank computes, moves and sends in a pass of a micro-batch: counted off the code, nothing measured.

A product of T rows, from n to m values, takes 2Tnm FLOPs forward, as many for the gradient of its input (I) and as many
for that of its weight (W). Causal attention over S positions takes 2T·H·(d_qk + d_v)·S/2 forward and twice that in I.
Beside them are passes that only move bytes in the device's memory: norms, rotation, SwiGLU, permutation, residuals,
rounding to FP8, sums of gradients. Rows go to experts and back once forward and once in I; what `parallel.recompute`
lists is done again in I. Experts get the mean load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from model.config import ModelConfig
from model.fp8 import Fp8Config
from pretrain.planning.activations import Activations

Link = Literal["node", "network"]
Key = TypeVar("Key")
_FP32, _INT64 = 4, 8
_FP8_ROW = 1 + _FP32 / 128
"""Bytes of a value in a row that is sent in FP8, its share of a scale included."""


@dataclass(frozen=True)
class Work:
    """FLOPs by kind of arithmetic, bytes `moved` in memory, bytes `sent` by purpose and link."""

    flops: Mapping[str, float] = field(default_factory=dict)
    moved: float = 0.0
    sent: Mapping[tuple[str, Link], float] = field(default_factory=dict)

    def __add__(self, other: "Work") -> "Work":
        return Work(_added(self.flops, other.flops), self.moved + other.moved, _added(self.sent, other.sent))

    def times(self, factor: float) -> "Work":
        """As much as so many of it."""
        return Work(
            {kind: factor * value for kind, value in self.flops.items()},
            factor * self.moved,
            {key: factor * value for key, value in self.sent.items()},
        )


def _added(one: Mapping[Key, float], other: Mapping[Key, float]) -> dict[Key, float]:
    return {key: one.get(key, 0.0) + other.get(key, 0.0) for key in {**one, **other}}


NOTHING = Work()


@dataclass(frozen=True)
class Passes:
    """The work of a forward pass, and of the two halves of a backward pass."""

    forward: Work = NOTHING
    input_grad: Work = NOTHING
    weight_grad: Work = NOTHING

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.forward + other.forward,
            self.input_grad + other.input_grad,
            self.weight_grad + other.weight_grad,
        )


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Counts the work of stages with the micro-batches of `sizes`; `fp8` says which products are rounded, of routed
    experts only with `fp8_experts`."""

    sizes: Activations
    fp8: Fp8Config
    fp8_experts: bool = False

    def stage(self, layers: Sequence[int], *, is_last: bool) -> Passes:
        """Of a stage of some main layers; the last has the head and multi-token prediction too."""
        model = self._model
        kinds = [index in model.moe_layers for index in layers]
        total = Passes()
        if is_last:
            kinds += [True] * model.num_nextn_predict_layers
            total = self._tail
        for is_moe in (False, True):
            total += _times(self._layers[is_moe], kinds.count(is_moe))
        return total

    @property
    def _model(self) -> ModelConfig:
        return self.sizes.model

    @property
    def _width(self) -> int:
        return self.sizes.num_bytes

    def _recomputes(self, part: str) -> bool:
        return part in self.sizes.parallel.recompute

    @cached_property
    def _layers(self) -> dict[bool, Passes]:
        """A layer with a dense MLP, and one with experts."""
        return {is_moe: self._layer(is_moe) for is_moe in (False, True)}

    def _layer(self, is_moe: bool) -> Passes:
        passes = self._attention()
        if is_moe:
            inner = self._model.n_shared_experts * self._model.moe_intermediate_size
            passes += self._routing() + self._experts()
            passes += self._swiglu("dense", "mlp", inner) if inner else Passes()
        else:
            passes += self._swiglu("dense", "mlp", self._model.intermediate_size)
        if self._recomputes("block"):
            passes += Passes(input_grad=passes.forward)
        return passes

    def _product(self, kind: str, part: str, values_in: int, values_out: int, rows: int = 1, copies: int = 1) -> Passes:
        """A product for so many rows of every token, with `copies` such weights on this rank."""
        tokens, width = rows * self.sizes.tokens, self._width
        if part == "experts":
            in_fp8 = self.fp8.recipe != "off" and self.fp8_experts
        else:
            in_fp8 = self.fp8.takes(part, values_in, values_out)
        flops = {f"{kind} fp8" if in_fp8 else kind: 2.0 * tokens * values_in * values_out}
        # Rounding reads a value and writes a byte.
        rounding = (width + 1) * tokens if in_fp8 else 0
        # Sums of gradients are read and written.
        sums = 2 * _FP32 * copies * values_in * values_out
        return Passes(
            Work(flops, rounding * values_in),
            Work(flops, rounding * values_out),
            Work(flops, rounding * (values_in + values_out) + sums),
        )

    def _moving(self, forward: float, backward: float) -> Passes:
        """Passes over so many values of every token."""
        bytes_each = self.sizes.tokens * self._width
        return Passes(Work(moved=forward * bytes_each), Work(moved=backward * bytes_each))

    def _attention(self) -> Passes:
        model, tokens = self._model, self.sizes.tokens
        heads, hidden, latents = model.num_attention_heads, model.hidden_size, model.kv_lora_rank
        queries = heads * model.qk_head_dim
        keys_and_values = heads * (model.qk_nope_head_dim + model.v_head_dim)
        down = self._product("dense", "attention", hidden, latents + model.qk_rope_head_dim)
        if model.q_lora_rank is None:
            up = self._product("dense", "attention", hidden, queries)
        else:
            down += self._product("dense", "attention", hidden, model.q_lora_rank)
            up = self._product("dense", "attention", model.q_lora_rank, queries)
        up += self._product("dense", "attention", latents, keys_and_values)
        # Rotation turns the queries' in place; keys are put together from two.
        turned = 2 * heads * model.qk_rope_head_dim + heads * model.qk_nope_head_dim + queries
        up += self._moving(turned, turned + heads * model.v_head_dim)
        norms = 2 * hidden + 2 * (latents + (model.q_lora_rank or 0))
        core = 2.0 * tokens * heads * (model.qk_head_dim + model.v_head_dim) * self.sizes.seq_len / 2
        passes = down + up + self._product("dense", "attention", heads * model.v_head_dim, hidden)
        passes += Passes(Work({"attention": core}), Work({"attention": 2 * core}))
        # Two norms of states, the second with the residual.
        passes += self._moving(norms + 4 * hidden, 1.5 * norms + 4 * hidden) + self._context()
        again = up.forward if self._recomputes("mla_up") else NOTHING
        if self._recomputes("norms"):
            again += self._moving(norms, 0).forward
        return passes + Passes(input_grad=again)

    def _swiglu(self, kind: str, part: str, inner: int, rows: int = 1, copies: int = 1) -> Passes:
        """An MLP for so many rows of every token, with its result added to others."""
        hidden, values = self._model.hidden_size, rows * inner
        passes = self._product(kind, part, hidden, 2 * inner, rows, copies)
        passes += self._product(kind, part, inner, hidden, rows, copies)
        # Packed inputs are read, and written in half as many bytes; and back.
        packing = 3 * values if self.sizes.parallel.fp8_swiglu else 0
        again = packing + (3 * values if self._recomputes("swiglu") else 0)
        return passes + self._moving(3 * values + 3 * hidden + packing, 5 * values + 3 * hidden + again)

    def _routing(self) -> Passes:
        return self._product("dense", "gate", self._model.hidden_size, self._model.n_routed_experts)

    def _experts(self) -> Passes:
        """The products of routed experts with the ways there and back; in rounds, all of it twice."""
        model = self._model
        hidden, choices = model.hidden_size, model.num_experts_per_tok
        here = model.n_routed_experts // self.sizes.parallel.ep
        # Rows are read and copied, and results read and added up.
        rows = 2 * (1 + choices) * hidden
        work = self._swiglu("grouped", "experts", model.moe_intermediate_size, choices, here)
        work += self._moving(rows, rows + ((1 + choices) * hidden if self._recomputes("expert_rows") else 0))
        ways = [self._way(number) for number in range(len(self.sizes.copies))]
        last = work + ways[-1] if ways else work
        before = ways[0] if len(ways) > 1 else Passes()
        if self.sizes.num_rounds > 1:
            # Their weight gradients do not wait either.
            last = Passes(last.forward, last.forward + last.input_grad + last.weight_grad)
        return last + before

    def _way(self, number: int) -> Passes:
        """One hop there and back: copies are made and added up, and all but those for this rank are sent."""
        sizes, hidden = self.sizes, self._model.hidden_size
        copies, (members, link) = sizes.copies[number], self._hops[number]
        leaving = sizes.tokens * copies * (members - 1) / members
        choices = self._model.num_experts_per_tok * (_INT64 + _FP32)
        row, weights = self._width * hidden, self._model.num_experts_per_tok * _FP32
        there = _FP8_ROW * hidden if sizes.parallel.fp8_dispatch else row
        moved = self._moving(2 * (1 + copies) * hidden, 2 * (1 + copies) * hidden)
        return moved + Passes(
            Work(sent={("dispatch", link): leaving * (there + choices), ("combine", link): leaving * row}),
            Work(sent={("dispatch", link): leaving * row, ("combine", link): leaving * (row + weights)}),
        )

    @cached_property
    def _hops(self) -> tuple[tuple[int, Link], ...]:
        """Members and link of each hop."""
        ep, size = self.sizes.parallel.ep, self.sizes.node_size
        if len(self.sizes.copies) > 1:
            return (ep // size, "network"), (size, "node")
        return ((ep, "node" if not size or size % ep == 0 else "network"),)

    def _context(self) -> Passes:
        """Latents to all ranks of a sequence, queries to heads and results to positions; gradients go back."""
        model, sizes = self._model, self.sizes
        cp, size = sizes.parallel.cp, sizes.node_size
        if cp == 1:
            return Passes()
        heads = model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
        to_each = sizes.tokens * self._width * (model.kv_lora_rank + model.qk_rope_head_dim + heads / cp)
        here = min(cp, size or cp) - 1
        sent: dict[tuple[str, Link], float] = {("context", "node"): here * to_each}
        if cp - 1 > here:
            sent["context", "network"] = (cp - 1 - here) * to_each
        return Passes(Work(sent=sent), Work(sent=sent))

    @cached_property
    def _tail(self) -> Passes:
        """Norms, heads and what joins the halves of each prediction depth. Losses compute their gradients in the
        forward pass."""
        model, depth = self._model, self._model.num_nextn_predict_layers
        hidden = model.hidden_size
        head = self._product("dense", "head", hidden, model.vocab_size)
        losses = head.forward + head.input_grad + head.weight_grad
        logits = self._moving(4 * model.vocab_size, 0).forward
        passes = _times(Passes(losses + logits), 1 + depth)
        passes += self._moving(2 * hidden * (1 + 3 * depth), 3 * hidden * (1 + 3 * depth))
        return passes + _times(self._product("dense", "prediction", 2 * hidden, hidden), depth)


def _times(passes: Passes, count: int) -> Passes:
    return Passes(*(work.times(count) for work in (passes.forward, passes.input_grad, passes.weight_grad)))
