"""The forward pass of some layers over one micro-batch, in segments on a tape.

It computes what `Transformer.forward` does, from the same parts of the model, but experts may live elsewhere and the
layers before and after on other ranks.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from model.attention import AttentionContext, SequenceParts
from model.block import Block
from model.config import ModelConfig
from model.experts import RoutedRows
from model.transformer import Transformer
from parallel.dispatch import Dispatcher
from parallel.tape import TURNS_A_LAYER, Steps, Tape, TurnCounts


@dataclass(frozen=True)
class MicroBatch:
    """Tokens [B, S + 1 + depth] and, where attention stays inside documents, their ids of the same shape; of whole
    sequences, whether or not their positions are divided."""

    tokens: Tensor
    documents: Tensor | None = None

    def num_positions(self, config: ModelConfig) -> int:
        """S, the positions of a sequence that predict."""
        return self.tokens.shape[1] - 1 - config.num_nextn_predict_layers


@dataclass(frozen=True)
class LossWeights:
    """What a micro-batch's losses count for in the gradient: lm_loss, mtp_loss and balance_loss."""

    lm: float
    mtp: float
    balance: float


@dataclass
class Outcome:
    """What the forward passes of a step leave behind on this rank: summed losses [3] (lm, mtp, balance) in fp64, the
    tokens of each expert by layer, [E] int64, the rows that arrived at the experts here, and the most rounds it took
    for those of a micro-batch in a layer."""

    losses: Tensor
    load: dict[int, Tensor] = field(default_factory=dict)
    rows: int = 0
    rounds: int = 1

    def add_load(self, layer: int, load: Tensor) -> None:
        """Counts a micro-batch."""
        self.load[layer] = self.load[layer] + load if layer in self.load else load

    def add_rows(self, rows: int, rounds: int) -> None:
        """Counts what arrived for a micro-batch in a layer."""
        self.rows += rows
        self.rounds = max(self.rounds, rounds)


@dataclass(frozen=True)
class _Pass:
    """What a forward pass carries through a chunk: `roots` are the losses of layers that wait for the next cut."""

    context: AttentionContext
    weights: LossWeights
    outcome: Outcome
    roots: list[tuple[Tensor, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Consecutive main layers of a model part on this rank; the first chunk begins with the embedding, the last ends
    with head and multi-token prediction."""

    model: Transformer
    layers: tuple[int, ...]
    is_first: bool
    is_last: bool
    dispatcher: Dispatcher
    parts: SequenceParts | None = None
    recompute_blocks: bool = False

    def count_turns(self, *, backward: bool) -> TurnCounts:
        """Of a pass, where rows go in one round."""
        depths = self.model.config.num_nextn_predict_layers if self.is_last else 0
        with_experts = depths + len({*self.layers} & {*self.model.config.moe_layers})
        turns = self._turns_a_layer * (2 if backward and self.recompute_blocks else 1)
        return TurnCounts(turns * with_experts, turns * (len(self.layers) + depths - with_experts))

    @property
    def _turns_a_layer(self) -> int:
        return TURNS_A_LAYER * len(self.dispatcher.hops)

    def forward(
        self, tape: Tape, x: Tensor | None, batch: MicroBatch, weights: LossWeights, outcome: Outcome
    ) -> Steps[Tensor | None]:
        """Takes the states of the chunk before, a leaf [B, S, D] (None in the first); gives states for the next, a
        leaf, or nothing in the last, which leaves the losses in `outcome`."""
        config = self.model.config
        num_positions = batch.num_positions(config)
        context = self.model.training_context(num_positions, batch.documents, self.parts)
        tokens = batch.tokens
        if self.parts is not None:
            num_positions //= self.parts.size
            first = self.parts.place * num_positions
            tokens = tokens[:, first : first + num_positions + 1 + config.num_nextn_predict_layers]
        passing = _Pass(context, weights, outcome)
        if self.is_first:
            x = self.model.embed_tokens(tokens[:, :num_positions])
        assert x is not None
        for index in self.layers:
            x = yield from self._block(index, passing, tape, x)
        if self.is_last:
            yield from self._losses(passing, tape, x, tokens)
            return None
        return _cut(passing, tape, x)

    def _block(self, index: int, passing: _Pass, tape: Tape, x: Tensor) -> Steps[Tensor]:
        block = self.model.block(index)
        if not self.recompute_blocks:
            return (yield from self._run_block(block, passing, tape, x))
        # The second run counts into an outcome that nobody reads.
        outcomes = [passing.outcome]

        def part(tape: Tape, x: Tensor) -> Steps[Tensor]:
            outcome = outcomes.pop() if outcomes else Outcome(torch.zeros_like(passing.outcome.losses))
            inner = replace(passing, outcome=outcome, roots=[])
            out = yield from self._run_block(block, inner, tape, x)
            return _cut(inner, tape, out)

        return (yield from tape.run_twice(part, _cut(passing, tape, x)))

    def _run_block(self, block: Block, passing: _Pass, tape: Tape, x: Tensor) -> Steps[Tensor]:
        attended = block.attend(x, passing.context)
        residual, normed = attended.residual, attended.normed
        if attended.route is None or attended.stats is None:
            return (yield from self._run_dense(block, passing, tape, residual, normed))
        passing.outcome.add_load(block.index, attended.stats.load)
        passing.outcome.losses[2] += attended.stats.balance_loss.detach()
        passing.roots.append((attended.stats.balance_loss, passing.weights.balance))
        choice_weights = attended.route.weights
        if self.dispatcher.travels:
            residual, normed, choice_weights = tape.cut(residual, normed, choice_weights, roots=passing.roots)
            passing.roots.clear()
        choices = RoutedRows(normed.flatten(0, 1), attended.route.experts, choice_weights)
        announced = self.dispatcher.announce(choices.experts)
        # Here, as the host is about to wait for what was announced.
        shared = block.shared(normed)
        at_once, add_rows = partial(block.routed, defers=False), passing.outcome.add_rows
        routed = yield from self.dispatcher.run(tape, choices, announced, block.routed, at_once, add_rows)
        out = residual + routed.view_as(residual)
        return out if shared is None else out + shared

    def _run_dense(self, block: Block, passing: _Pass, tape: Tape, residual: Tensor, normed: Tensor) -> Steps[Tensor]:
        """The MLP of a layer without experts, with as many pauses as a layer with experts has turns."""
        if self.dispatcher.travels:
            residual, normed = tape.cut(residual, normed, roots=passing.roots)
            passing.roots.clear()
            yield from tape.pause()
        shared = block.shared(normed)
        out = residual if shared is None else residual + shared
        if self.dispatcher.travels:
            out = _cut(passing, tape, out)
            for _ in range(self._turns_a_layer - 1):
                yield from tape.pause()
        return out

    def _losses(self, passing: _Pass, tape: Tape, x: Tensor, tokens: Tensor) -> Steps[None]:
        model, weights, outcome = self.model, passing.weights, passing.outcome
        num_positions, depths = x.shape[1], model.config.num_nextn_predict_layers
        hidden = _cut(passing, tape, model.norm(x))
        lm_loss = model.lm_head(hidden, tokens[:, 1 : num_positions + 1])
        outcome.losses[0] += lm_loss.detach()
        tape.cut(roots=[(lm_loss, weights.lm)])
        for depth in range(1, depths + 1):
            block = model.multi_token_block(depth)
            embedded = model.embed_tokens(tokens[:, depth : num_positions + depth])
            x = yield from self._block(block.index, passing, tape, block.join(embedded, hidden))
            hidden = _cut(passing, tape, block.shared_head.norm(x))
            mtp_loss = model.lm_head(hidden, tokens[:, depth + 1 : num_positions + depth + 1])
            outcome.losses[1] += mtp_loss.detach() / depths
            tape.cut(roots=[(mtp_loss, weights.mtp / depths)])


def _cut(passing: _Pass, tape: Tape, x: Tensor) -> Tensor:
    """Ends a segment with one result, and with the roots that wait."""
    (leaf,) = tape.cut(x, roots=passing.roots)
    passing.roots.clear()
    return leaf
