"""What a rank holds in memory, by part: exactly for weights and optimizer, estimated for activations.

Weights and optimizer follow `parallel.zero`. With N parameters over D data ranks, fp32 weights take 4N bytes, their
gradients 4N, masters and moments 12N/D. In bf16 weights and gradients take 2N each, and the fp32 sums of gradients 4N.

Activations are the tensors that autograd keeps of one micro-batch, counted from the code of `model` with the fused
attention and norms of a GPU; nothing is recomputed but the loss of long batches. They are gone when the step ends and
its own buffers appear, so a rank's peak is what it always holds and the larger of the two. On an H200 the peak of
`small` and `dsv3_2b` came out within 1 % of this, and the GPU's own count 1.9 to 2.4 GiB above it.
"""

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.transformer import LOSS_CHUNK, Transformer
from parallel.zero import BUCKET_ELEMENTS

GIB = 1 << 30
DEVICE_OVERHEAD = 2 * GIB

_INT64, _FP32 = 8, 4
_ALIGNMENT = 2
_REDUCED_AT_ONCE = 500_000_000


@dataclass(frozen=True)
class Part:
    """A part of the memory in bytes, and what it is."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True)
class Memory:
    """The memory of one rank: `held` all the time, `micro_batch` until its backward pass ends, `step` at its end."""

    held: tuple[Part, ...]
    micro_batch: tuple[Part, ...]
    step: tuple[Part, ...]

    @property
    def peak(self) -> int:
        """Bytes of all tensors at once, without the `DEVICE_OVERHEAD` of driver and allocator."""
        return total(self.held) + max(total(self.micro_batch), total(self.step))


@dataclass(frozen=True)
class ParameterSizes:
    """Elements of the parameters: those of the two optimizer groups, and of the largest one."""

    matrices: int
    vectors: int
    largest: int

    @property
    def all(self) -> int:
        """Every trained parameter."""
        return self.matrices + self.vectors


def total(parts: tuple[Part, ...]) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in parts)


def rank_memory(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    data_ranks: int,
    micro_batch_size: int,
    seq_len: int,
    masked_documents: bool = False,
) -> Memory:
    """The memory of a rank that trains all layers with ZeRO-1 over `data_ranks`."""
    sizes = parameter_sizes(model)
    tokens = micro_batch_size * seq_len
    activations = activation_parts(
        model, num_bytes=dtype.itemsize, tokens=tokens, seq_len=seq_len, masked_documents=masked_documents
    )
    # The logits' two gradients are gone before the first gradient of a weight appears.
    largest = max(2 * _logit_bytes(model, tokens), dtype.itemsize * sizes.largest)
    return Memory(
        held=_held(sizes, dtype, data_ranks),
        micro_batch=(*activations, Part("backward pass", largest, "its largest gradients")),
        step=_step_buffers(sizes, dtype, data_ranks),
    )


def parameter_sizes(model: ModelConfig) -> ParameterSizes:
    """Counts on the meta device."""
    with torch.device("meta"):
        parameters = list(Transformer(model).parameters())
    return ParameterSizes(
        matrices=sum(p.numel() for p in parameters if p.dim() > 1),
        vectors=sum(p.numel() for p in parameters if p.dim() == 1),
        largest=max(p.numel() for p in parameters),
    )


def _held(sizes: ParameterSizes, dtype: torch.dtype, data_ranks: int) -> tuple[Part, ...]:
    padded = sum(_padded(numel, data_ranks) for numel in (sizes.matrices, sizes.vectors))
    width, name = dtype.itemsize, "fp32" if dtype == torch.float32 else "bf16"
    parts = [
        Part("weights", width * padded, f"{name}, whole on every rank"),
        Part("gradients", width * sizes.all, f"{name}, of a micro-batch" if width < _FP32 else "fp32, summed in place"),
    ]
    if width < _FP32:
        parts.append(Part("gradient sums", _FP32 * padded, "fp32, whole on every rank"))
    else:
        parts.append(Part("bucket", _FP32 * BUCKET_ELEMENTS, "in which gradients are reduced"))
    share = f"1/{data_ranks} of them" if data_ranks > 1 else "all of them"
    parts.append(Part("masters and moments", 3 * _FP32 * (padded // data_ranks), f"fp32, {share}"))
    return tuple(parts)


def _step_buffers(sizes: ParameterSizes, dtype: torch.dtype, data_ranks: int) -> tuple[Part, ...]:
    if dtype == torch.float32:
        share = _padded(sizes.matrices, data_ranks) // data_ranks
        return (Part("own gradients", _FP32 * share, "this rank's share, flat"),)
    # Gradient sums that fit into one bucket together are reduced in a copy; a larger one is reduced where it is.
    copied = sizes.all if sizes.matrices <= _REDUCED_AT_ONCE else sizes.largest
    return (Part("reduction", _FP32 * copied, "fp32 copies of gradients"),)


def activation_parts(
    model: ModelConfig, *, num_bytes: int, tokens: int, seq_len: int, masked_documents: bool = False
) -> tuple[Part, ...]:
    """What autograd keeps of one micro-batch of `tokens` tokens, with activations of `num_bytes` each."""
    depth, moe = model.num_nextn_predict_layers, len(model.moe_layers)
    attention = model.num_layers * tokens * _attention_bytes(model, num_bytes)
    if masked_documents:
        attention += (1 + num_bytes) * tokens * seq_len
    norms = 2 * model.num_layers + 1 + 3 * depth
    joined = depth * tokens * 2 * num_bytes * model.hidden_size
    dense = (model.num_layers - moe) * 4 * num_bytes * model.intermediate_size
    shared = moe * 4 * num_bytes * model.n_shared_experts * model.moe_intermediate_size
    parts = (
        Part("norms", tokens * norms * _norm_bytes(model.hidden_size, num_bytes) + joined, "inputs in fp32, outputs"),
        Part("attention", attention, "latents, queries, keys, values"),
        Part("routing", moe * tokens * _routing_bytes(model, num_bytes), "affinities, choices, permutations"),
        Part("routed experts", moe * tokens * _expert_bytes(model, num_bytes), "rows there and back, SwiGLU"),
        Part("other MLPs", tokens * (dense + shared), "of dense layers, shared experts"),
        Part("loss", _loss_bytes(model, tokens), f"log-probabilities of {min(tokens, LOSS_CHUNK)} tokens"),
    )
    return tuple(part for part in parts if part.bytes)


def _norm_bytes(size: int, num_bytes: int) -> int:
    """A norm keeps its input in fp32, the normalised values, the root mean square and its output."""
    return size * (_FP32 + 2 * num_bytes) + _FP32


def _attention_bytes(model: ModelConfig, num_bytes: int) -> int:
    """Per token of a layer, without the norm before it."""
    heads = model.num_attention_heads
    queries_and_keys = 2 * heads * model.qk_head_dim
    decompressed = heads * (model.qk_nope_head_dim + model.v_head_dim)
    latents = [model.kv_lora_rank] + ([model.q_lora_rank] if model.q_lora_rank else [])
    kept = num_bytes * (queries_and_keys + decompressed + heads * model.v_head_dim) + _FP32 * heads
    return kept + sum(_norm_bytes(size, num_bytes) for size in latents)


def _routing_bytes(model: ModelConfig, num_bytes: int) -> int:
    """Per token of a layer: affinities and their order over all experts; weights and permutations of the chosen."""
    input_in_fp32 = _FP32 * model.hidden_size if num_bytes < _FP32 else 0
    per_choice = 2 * _FP32 + 2 * _INT64
    return input_in_fp32 + (_FP32 + _INT64) * model.n_routed_experts + per_choice * model.num_experts_per_tok


def _expert_bytes(model: ModelConfig, num_bytes: int) -> int:
    """Per token of a layer: rows in, gate and up, silu, product, and rows out in fp32 to be weighted."""
    row = num_bytes * (model.hidden_size + 4 * model.moe_intermediate_size) + _FP32 * model.hidden_size
    return model.num_experts_per_tok * row


def _loss_bytes(model: ModelConfig, tokens: int) -> int:
    """Log-probabilities of every prediction depth; of longer batches, those of the piece that is computed again."""
    kept = 1 + model.num_nextn_predict_layers if tokens <= LOSS_CHUNK else 1
    return kept * _logit_bytes(model, tokens)


def _logit_bytes(model: ModelConfig, tokens: int) -> int:
    return _FP32 * min(tokens, LOSS_CHUNK) * model.vocab_size


def _padded(numel: int, data_ranks: int) -> int:
    """ZeRO's flat groups are a multiple of this."""
    multiple = _ALIGNMENT * data_ranks
    return -(-numel // multiple) * multiple
