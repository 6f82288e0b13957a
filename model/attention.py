"""Multi-head latent attention (MLA; report, section 2.1.1).

    c_q  = RMSNorm(W_DQ h)                 q = [W_UQ c_q ; RoPE(W_QR c_q)]        (without q_lora_rank: q = W_Q h)
    c_kv = RMSNorm(W_DKV h)                k = [W_UK c_kv ; RoPE(W_KR h)], the rotary key shared by all heads
    o    = W_O softmax(q kᵀ · scale) W_UV c_kv

Decoding keeps only c_kv and the rotary key of a token, C + P values a layer, in a `LatentCache`. It attends in one of
two ways that agree: it decompresses keys and values from the latents, or it folds W_UK into the query and W_UV into the
output and attends in the latent space ("absorbed"), which reads far less memory when there are few queries.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from model import flash
from model.config import ModelConfig
from model.linear import Linear
from model.norm import RMSNorm
from model.recompute import Execution
from model.rope import apply_rotary, rotate_heads_, softmax_scale


class SequenceParts(Protocol):
    """Positions that are divided over `size` processes, of which this is the one at `place`: s = S / size of them are
    here, a run of neighbours, and h = H / size of the heads are attended here."""

    place: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """[B, s, ...] of every process to [B, S, ...]."""
        ...

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of some positions, [B, s, H, d], to some heads of all positions, [B, S, h, d]."""
        ...

    def to_positions(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        ...

    def sum(self, counts: Tensor) -> Tensor:
        """The sum over processes, outside autograd."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """What every layer needs to know of the positions: `rotary` [S, P/2, 2] of those that are here and, unless plainly
    causal, a boolean `mask` [B or 1, 1, S, keys] that is true where a query may look; `parts` where other processes
    have other positions."""

    rotary: Tensor
    mask: Tensor | None = None
    parts: SequenceParts | None = None


class LatentCache:
    """Latents and rotary keys of the tokens seen by one layer: [B, capacity, C + P], of which `length` are filled."""

    def __init__(self, batch_size: int, capacity: int, config: ModelConfig, *, like: Tensor) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.entries = like.new_zeros(batch_size, capacity, width)
        self.length = 0

    def append(self, new: Tensor) -> Tensor:
        """Stores [B, S, C + P] and returns all entries so far, [B, length, C + P]."""
        end = self.length + new.shape[1]
        self.entries[:, self.length : end] = new
        self.length = end
        return self.entries[:, :end]


class MultiHeadLatentAttention(nn.Module):
    """Attention of one layer."""

    def __init__(self, config: ModelConfig, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self._recompute = execution.recompute
        self.scale = softmax_scale(config.qk_head_dim, config.rope_scaling)
        heads = config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, heads * config.qk_head_dim, execution, "attention")
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank, execution, "attention")
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, execution, "attention")
        self.kv_a_proj_with_mqa = Linear(
            config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, execution, "attention"
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), execution, "attention"
        )
        self.o_proj = Linear(heads * config.v_head_dim, config.hidden_size, execution, "attention")

    def forward(
        self, x: Tensor, context: AttentionContext, cache: LatentCache | None = None, *, absorbed: bool = False
    ) -> Tensor:
        """[B, S, D] to [B, S, D]. With a cache, x holds the newest positions and attends to all cached ones too."""
        q = self._queries(x, context.rotary)
        latents, k_rope = self._latents(x, context.rotary)
        if cache is not None:
            entries = cache.append(torch.cat((latents, k_rope), dim=-1))
            latents, k_rope = entries.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        if context.parts is not None:
            out = self._attend_in_parts(q, latents, k_rope, context.mask, context.parts)
        else:
            attend = self._attend_in_latent_space if absorbed else self._attend
            out = attend(q, latents, k_rope, context.mask)
        return self.o_proj(out.flatten(-2))

    def _queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Queries with their rotary part turned, [B, S, H, qk_head_dim]."""
        if self.config.q_lora_rank is None:
            return self._recompute.again("mla_up", partial(self._project_queries, self.q_proj), x, rotary)
        latents = self._recompute.again("norms", self.q_a_layernorm, self.q_a_proj(x))
        return self._recompute.again("mla_up", partial(self._project_queries, self.q_b_proj), latents, rotary)

    def _project_queries(self, projection: Linear, x: Tensor, rotary: Tensor) -> Tensor:
        head_dim = self.config.qk_head_dim
        return rotate_heads_(projection(x), rotary, head_dim).unflatten(-1, (-1, head_dim))

    def _split_queries(self, q: Tensor) -> tuple[Tensor, ...]:
        return q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)

    def _latents(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """What a cache keeps: c_kv [B, S, C] and the rotary key [B, S, P]."""
        latents, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1
        )
        latents = self._recompute.again("norms", self.kv_a_layernorm, latents)
        return latents, apply_rotary(k_rope.unsqueeze(-2), rotary).squeeze(-2)

    def _attend(self, q: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """Decompresses keys and values; returns [B, S, H, v_head_dim]."""
        k, v = self._recompute.again("mla_up", self._decompress, latents, k_rope)
        return self._attend_to(q, k, v, mask)

    def _attend_in_parts(
        self, q: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor | None, parts: SequenceParts
    ) -> Tensor:
        """The same where others have the other positions: this process attends some of the heads at all of them."""
        config = self.config
        width = config.num_attention_heads // parts.size * (config.qk_nope_head_dim + config.v_head_dim)
        rows = slice(parts.place * width, (parts.place + 1) * width)
        decompress = partial(self._decompress, rows=rows)
        k, v = self._recompute.again("mla_up", decompress, parts.gather(latents), parts.gather(k_rope))
        return parts.to_positions(self._attend_to(parts.to_heads(q), k, v, mask))

    def _decompress(self, latents: Tensor, k_rope: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Keys [B, S, h, qk_head_dim] and values [B, S, h, v_head_dim] of all heads, or those of some `rows` of
        kv_b_proj."""
        config = self.config
        kv = self.kv_b_proj(latents, rows).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        results: tuple[Tensor, Tensor] = _KeysAndValues.apply(kv, k_rope, config.qk_nope_head_dim)
        return results

    def _attend_to(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and flash.can_attend(q, v):
            return flash.attend(q, k, v, self.scale)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return out.transpose(1, 2)

    def _attend_in_latent_space(self, q: Tensor, latents: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same with W_UK and W_UV folded into query and output; returns [B, S, H, v_head_dim]."""
        config = self.config
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=1
        )
        q_nope, q_rope = self._split_queries(q)
        q_latent = torch.einsum("bshn,hnc->bshc", q_nope, w_uk)
        scores = torch.einsum("bshc,bkc->bhsk", q_latent, latents) + torch.einsum("bshp,bkp->bhsk", q_rope, k_rope)
        scores = scores.float() * self.scale
        if mask is None:
            mask = causal_mask(q.shape[1], latents.shape[1], device=latents.device)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(latents.dtype)
        return torch.einsum("bshc,hvc->bshv", torch.einsum("bhsk,bkc->bshc", weights, latents), w_uv)


def attention_kernel(
    config: ModelConfig, seq_len: int, *, device: torch.device, dtype: torch.dtype, masked: bool = False
) -> str:
    """What attends in training: torch with "cudnn", "flash", "efficient", or "math", which keeps all scores in memory;
    or "FlashAttention 4". `masked` where documents do not see one another."""
    heads = config.num_attention_heads
    q, k, v = (
        torch.empty(1, heads, seq_len, size, device=device, dtype=dtype, requires_grad=True)
        for size in (config.qk_head_dim, config.qk_head_dim, config.v_head_dim)
    )
    if not masked and flash.can_attend(q, v):
        return "FlashAttention 4"
    mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device) if masked else None
    scale = softmax_scale(config.qk_head_dim, config.rope_scaling)
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, is_causal=not masked, scale=scale)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


class _KeysAndValues(torch.autograd.Function):
    """Keys [B, S, h, N + P] and values [B, S, h, V] from what kv_b_proj gives, [B, S, h, N + V], and the rotary key
    [B, S, P] that all heads share. Values stay where they are."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, k_rope: Tensor, nope_dim: int) -> tuple[Tensor, Tensor]:
        ctx.nope_dim = nope_dim
        if kv.is_cuda:
            from model.kernels.rope import make_keys

            keys = make_keys(kv, k_rope, nope_dim)
        else:
            keys = torch.cat((kv[..., :nope_dim], k_rope.unsqueeze(-2).expand(-1, -1, kv.shape[2], -1)), dim=-1)
        return keys, kv[..., nope_dim:]

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor, None]:
        nope_dim = ctx.nope_dim
        if grad_keys.is_cuda:
            from model.kernels.rope import make_keys_backward

            return *make_keys_backward(grad_keys, grad_values, nope_dim), None
        grad_rope = grad_keys[..., nope_dim:].sum(2, dtype=torch.float32).to(grad_keys.dtype)
        return torch.cat((grad_keys[..., :nope_dim], grad_values), dim=-1), grad_rope, None


def causal_mask(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """True where a query may look, when the queries are the last of the keys: [1, 1, num_queries, num_keys]."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)[None, None]


def document_mask(documents: Tensor) -> Tensor:
    """Causal and inside one document: documents [B, S] (any integer ids) to [B, 1, S, S]."""
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.unsqueeze(1) & causal_mask(documents.shape[1], documents.shape[1], device=documents.device)
