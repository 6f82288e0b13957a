"""What a micro-batch leaves on a rank between its forward and its backward pass, stage by stage.

Counted are the tensors that autograd and the tape keep, read off the code of `model` and `parallel`, with the fused
attention and norms of a GPU. `recompute` leaves out what is computed again. Experts get the mean load: a token chooses
its K experts evenly among those of its groups, so on its way it is copied to as many nodes and ranks as that comes to,
and R = T · copies rows arrive. Skewed routing takes more, up to `max_expert_rows` at once.

T = tokens of a micro-batch on this rank, D = hidden size, I = inner size, K = experts of a token.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from model.config import ModelConfig
from model.packing import packed_width
from model.transformer import LOSS_CHUNK
from parallel.config import ParallelConfig
from parallel.peer_copies import HEADROOM, NUM_PARTS
from parallel.schedule import Kind, Overlapped, Step, actions_of

Sizes = Counter[str]
"""Bytes by part."""

NODE_SIZE = 8
_INT64, _FP32 = 8, 4


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Sizes of one micro-batch of `micro_batch_size` sequences, with activations of `num_bytes` each; nodes have
    `node_size` ranks. With `fused_experts`, as on a GPU in bf16, routed experts keep their gates and ups alone."""

    model: ModelConfig
    parallel: ParallelConfig
    num_bytes: int
    micro_batch_size: int
    seq_len: int
    masked_documents: bool = False
    node_size: int = NODE_SIZE
    fused_experts: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch_size * self.seq_len // self.parallel.cp

    def stage(self, layers: Sequence[int], *, is_last: bool) -> Sizes:
        """What a stage of some main layers keeps; the last has the head and multi-token prediction too."""
        blocks = self.blocks_of(layers, is_last=is_last)
        sizes: Sizes = Counter()
        for is_moe, count in Counter(index in self.model.moe_layers for index in blocks).items():
            block = self._block_input() if self._has("block") else self._blocks[is_moe]
            sizes.update({name: count * size for name, size in block.items()})
        for end in self.ends(is_last=is_last):
            sizes.update(end)
        sizes.update(self.masks())
        return sizes

    def ends(self, *, is_last: bool) -> list[Sizes]:
        """What comes of no layer: the states that the next stage gets, or that the norm before the head takes, with the
        loss; in the last stage also what each depth of multi-token prediction has beside its layer."""
        row = self.num_bytes * self.model.hidden_size
        states: Sizes = Counter({"states": self.tokens * row})
        if not is_last:
            return [states]
        depth = self.model.num_nextn_predict_layers
        states["loss"] = self.loss() // (1 + depth)
        norm = self.tokens * (row + _FP32)
        # The joined halves are the results of two norms, of which one keeps the embedding.
        joined = Counter({"norms": 3 * norm + self.tokens * row})
        return [states + Counter({"norms": norm}), *(states + joined for _ in range(depth))]

    def masks(self) -> Sizes:
        """Those that keep attention inside documents, which all layers share."""
        size = (1 + self.num_bytes) * self.micro_batch_size * self.seq_len**2 if self.masked_documents else 0
        return Counter({"attention": size})

    def kept(self, index: int) -> Sizes:
        """What a layer of a stage keeps."""
        return self._block_input() if self._has("block") else self.block(index)

    def blocks_of(self, layers: Sequence[int], *, is_last: bool) -> list[int]:
        """The layers of a stage, the last with those of multi-token prediction."""
        main, depth = self.model.num_hidden_layers, self.model.num_nextn_predict_layers
        return [*layers, *(range(main, main + depth) if is_last else ())]

    def deferred(self, layers: Sequence[int], *, is_last: bool) -> Sizes:
        """What a stage keeps between its input gradients and its weight gradients: inputs of its products, and the
        gradients of their results."""
        model, depth = self.model, self.model.num_nextn_predict_layers if is_last else 0
        hidden, heads = model.hidden_size, model.num_attention_heads
        latents = model.kv_lora_rank + (model.q_lora_rank or 0)
        attention = 2 * hidden + 2 * latents + model.qk_rope_head_dim
        attention += heads * (model.qk_head_dim + model.qk_nope_head_dim + 2 * model.v_head_dim)
        values = 0
        for index in self.blocks_of(layers, is_last=is_last):
            if index in model.moe_layers:
                inner = model.n_shared_experts * model.moe_intermediate_size
                values += attention + (2 * hidden + 3 * inner if inner else 0)
                if self.num_rounds == 1:
                    rows = self._tokens_here if self.fused_experts else model.num_experts_per_tok
                    values += round(2 * hidden * rows) + 3 * model.num_experts_per_tok * model.moe_intermediate_size
            else:
                values += attention + 2 * hidden + 3 * model.intermediate_size
        return Counter({"deferred": self.tokens * self.num_bytes * (values + depth * 3 * hidden)})

    def working(self, layers: Sequence[int], gradient: int) -> int:
        """Bytes of what a backward pass has for a while of the largest of some layers: what it computes again, and the
        largest `gradient` of a weight or, where these are added to sums at once, those of experts' rows."""
        again = max((self.block(index).total() for index in layers), default=0) if self._has("block") else 0
        if not any(index in self.model.moe_layers for index in layers):
            return again + gradient
        if self.num_rounds > 1:
            return again + self._round() + gradient
        if not self.fused_experts:
            return again + gradient
        inner = (5 if self.parallel.fp8_swiglu else 3) * self.model.moe_intermediate_size
        rows = self.tokens * self.model.num_experts_per_tok * self.num_bytes * (self.model.hidden_size + inner)
        # ZeRO 2 and 3 have no sums that products are added to.
        return again + (rows + gradient if self.parallel.zero_stage > 1 else max(gradient, rows))

    def logits(self, device: str = "cuda") -> int:
        """Bytes that last while a loss is made: the logits of a batch or of the largest piece of it and, where pieces
        are several, the sum of their gradients of the head's weight. On a CPU, their logarithms too, and logits that
        are not in fp32 once more."""
        on_cpu = _FP32 * (1 if self.num_bytes == _FP32 else 2) if device == "cpu" else 0
        pieces = (self.num_bytes + on_cpu) * min(self.tokens, LOSS_CHUNK) * self.model.vocab_size
        return pieces + (_FP32 * self.model.vocab_size * self.model.hidden_size if self.tokens > LOSS_CHUNK else 0)

    def loss(self) -> int:
        """Bytes that losses keep: of every prediction depth the gradients of its states and of the head's weight."""
        heads = 1 + self.model.num_nextn_predict_layers
        return heads * self.num_bytes * (self.tokens + self.model.vocab_size) * self.model.hidden_size

    def _has(self, part: str) -> bool:
        return part in self.parallel.recompute

    def _block_input(self) -> Sizes:
        return Counter({"states": self.tokens * self.num_bytes * self.model.hidden_size})

    def block(self, index: int) -> Sizes:
        """What a layer keeps that is not run again as a whole."""
        return self._blocks[index in self.model.moe_layers]

    @cached_property
    def _blocks(self) -> dict[bool, Sizes]:
        return {is_moe: self._block(is_moe=is_moe) for is_moe in (False, True)}

    def _block(self, *, is_moe: bool) -> Sizes:
        model, width = self.model, self.num_bytes
        inner = model.n_shared_experts * model.moe_intermediate_size if is_moe else model.intermediate_size
        sizes: dict[str, float] = {
            # The layer's input, and the residual after attention.
            "states": 2 * width * model.hidden_size,
            "norms": self._norms(),
            "attention": self._attention(),
            "other MLPs": self._swiglu(inner),
        }
        if is_moe:
            sizes |= {"routing": self._routing(), "routed experts": self._experts()}
        return Counter({name: round(self.tokens * size) for name, size in sizes.items()})

    def _norms(self) -> int:
        """What the two of a layer give, and the scales of their rows. The second gives the input of the MLPs, whose
        products keep it in any case."""
        is_input_of_queries = self._has("mla_up") and self.model.q_lora_rank is None
        outputs = 1 if self._has("norms") and not is_input_of_queries else 2
        return outputs * self.num_bytes * self.model.hidden_size + 2 * _FP32

    def _latent_norm(self, size: int, extra: int = 0) -> int:
        """Of a norm inside attention, whose input is no state: `extra` values lie in the same memory."""
        outputs = 1 if self._has("mla_up") or not self._has("norms") else 0
        return self.num_bytes * (size + extra + outputs * size) + _FP32

    def _attention(self) -> int:
        model, heads = self.model, self.model.num_attention_heads
        queries, decompressed = heads * model.qk_head_dim, heads * (model.qk_nope_head_dim + model.v_head_dim)
        out = heads * model.v_head_dim
        is_divided = self.parallel.cp > 1
        values = out * (2 if is_divided else 1)
        if not self._has("mla_up"):
            values += 2 * queries + decompressed
        elif is_divided:
            values += queries
        if is_divided:
            values += self.parallel.cp * (model.kv_lora_rank + model.qk_rope_head_dim)
        latents = self._latent_norm(model.kv_lora_rank, model.qk_rope_head_dim)
        latents += self._latent_norm(model.q_lora_rank) if model.q_lora_rank else 0
        return self.num_bytes * values + _FP32 * heads + latents

    def _swiglu(self, inner: int) -> int:
        """Gate and up, and their product."""
        return self._gate_up(inner) + (0 if self._has("swiglu") else self.num_bytes * inner)

    def _gate_up(self, inner: int) -> int:
        if not self.parallel.fp8_swiglu:
            return 2 * self.num_bytes * inner
        return packed_width(2 * inner)

    def _routing(self) -> int:
        """Logits or affinities of all experts; weights and permutations of the chosen."""
        per_choice = 2 * _FP32 + 2 * _INT64
        return _FP32 * self.model.n_routed_experts + per_choice * self.model.num_experts_per_tok

    @cached_property
    def copies(self) -> tuple[float, ...]:
        """To how many nodes and to how many ranks a token goes, on the mean; nothing where all experts are here."""
        ep, size = self.parallel.ep, self.node_size
        spans_nodes = size > 0 and ep % size == 0 and ep > size
        places = [place for place in ([ep // size] if spans_nodes else []) + [ep] if place > 1]
        return tuple(self._expected_copies(place) for place in places)

    def _expected_copies(self, places: int) -> float:
        """Of K choices among the experts of some groups, how many of the places that hold them are hit."""
        model = self.model
        share = model.topk_group / model.n_group if places % model.n_group == 0 else 1.0
        experts, reachable = round(share * model.n_routed_experts), share * places
        missed = math.comb(experts - model.n_routed_experts // places, model.num_experts_per_tok)
        return reachable * (1 - missed / math.comb(experts, model.num_experts_per_tok))

    @cached_property
    def num_rounds(self) -> int:
        """In how many rounds the mean load comes."""
        bound = self.parallel.max_expert_rows
        if not bound or not self.copies:
            return 1
        members = min(self.parallel.ep, self.node_size) if len(self.copies) > 1 else self.parallel.ep
        return max(-(-round(self.tokens * self.copies[-1]) // max(bound - members, 1)), 1)

    def _experts(self) -> float:
        """Rows on the way there and back, and what experts make of them."""
        *before, last = self.copies or (0.0,)
        if self.num_rounds > 1:
            return sum(map(self._way, before)) + last * 2 * self.num_bytes * self.model.hidden_size
        return sum(map(self._way, self.copies)) + self._expert_rows()

    @property
    def _tokens_here(self) -> float:
        """For each token of this rank, of how many tokens there are rows at the experts here."""
        return self.copies[-1] if self.copies else 1.0

    def _expert_rows(self) -> float:
        model = self.model
        if self.fused_experts:
            row = self._gate_up(model.moe_intermediate_size)
        else:
            copy = 0 if self._has("expert_rows") else self.num_bytes * model.hidden_size
            row = copy + self._swiglu(model.moe_intermediate_size)
        weight_and_token = _FP32 + _INT64
        return model.num_experts_per_tok * (row + weight_and_token)

    def _way(self, copies: float) -> float:
        """A row leaves and arrives, its result leaves and arrives; with weights, choices and places."""
        choice = 2 * _FP32 + 2 * _INT64 + 1
        row = 4 * self.num_bytes * self.model.hidden_size + _INT64
        return copies * (row + choice * self.model.num_experts_per_tok)

    @property
    def outboxes(self) -> int:
        """Bytes from which the copy engines of other GPUs take rows."""
        if not self.parallel.copy_engines or not self.copies:
            return 0
        members = min(self.parallel.ep, self.node_size or self.parallel.ep)
        rows = self.tokens * self.copies[-1] * (1 - 1 / members) / self.num_rounds
        row = self.num_bytes * self.model.hidden_size + (_FP32 + _INT64) * self.model.num_experts_per_tok
        return round(NUM_PARTS * HEADROOM * rows * row)

    def _round(self) -> int:
        """Bytes of one round of dispatch with all that comes of it."""
        return round(self.tokens * (self._way(self.copies[-1]) + self._expert_rows()) / self.num_rounds)


Stages = tuple[int, ...]
"""One stage, or those of the forward and of the backward pass of a pair."""
Live = frozenset[tuple[tuple[str, Stages], int]]
"""How many micro-batches are alive at a moment, by ("kept" or "deferred", stage), and ("pair", stages)."""
Parts = Mapping[str, Mapping[Stages, Sizes]]
"""Of each stage what a micro-batch has "kept" from F to B or I, and "deferred" from I to W; of each "pair" what its
passes together have more than the backward pass when it began."""


def peak_of_live(steps: Sequence[Step], parts: Parts) -> Sizes:
    """What lies in a rank's activations when they take most."""
    return heaviest(live_moments(steps), parts)


def heaviest(moments: Iterable[Live], parts: Parts) -> Sizes:
    """What lies in activations at the moment at which they take most."""
    costs = {(state, stage): sizes.total() for state, stages in parts.items() for stage, sizes in stages.items()}
    at_peak = max(moments, key=lambda live: sum(count * costs[key] for key, count in live))
    sizes: Sizes = Counter()
    for (state, stage), count in sorted(at_peak):
        sizes.update({name: count * size for name, size in parts[state][stage].items()})
    return sizes


def live_moments(steps: Sequence[Step]) -> tuple[Live, ...]:
    """The moments of a rank's steps at which no other has as much alive of everything."""
    live = Counter[tuple[str, Stages]]()
    moments: dict[Live, None] = {frozenset(): None}
    for step in steps:
        if isinstance(step, Overlapped):
            assert step.backward.kind == Kind.BACKWARD, step
            pair = "pair", (step.forward.stage, step.backward.stage)
            moments[frozenset((+(live + Counter([pair]))).items())] = None
        for action in actions_of(step):
            stage = (action.stage,)
            live["kept", stage] += action.kind == Kind.FORWARD
            live["kept", stage] -= action.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)
            live["deferred", stage] += (action.kind == Kind.INPUT_GRAD) - (action.kind == Kind.WEIGHT_GRAD)
        moments[frozenset((+live).items())] = None
    # The fullest first, so that what another exceeds is soon found to be so.
    kept: list[tuple[Live, dict[tuple[str, Stages], int]]] = []
    for moment in sorted(moments, key=lambda moment: -sum(count for _, count in moment)):
        if not any(all(counts.get(key, 0) >= count for key, count in moment) for _, counts in kept):
            kept.append((moment, dict(moment)))
    return tuple(moment for moment, _ in kept)
