"""The whole network: losses, multi-token prediction, gradients, phases, and what recomputation may not change."""

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import transformer
from model.block import Block
from model.init import initialize
from model.transformer import Losses, MultiTokenBlock, Transformer

torch.set_num_threads(1)

POSITIONS = 12


def make_model(**changes: object) -> Transformer:
    config = small_model(**({"initializer_range": 0.2} | changes))
    model = Transformer(config)
    initialize(model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    for bias in model.expert_biases().values():
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
    return model


def random_tokens(model: Transformer, batch_size: int = 3) -> Tensor:
    length = POSITIONS + 1 + model.config.num_nextn_predict_layers
    return torch.randint(96, (batch_size, length), generator=torch.Generator().manual_seed(0))


def gradients(model: Transformer, losses: Losses) -> dict[str, Tensor]:
    model.zero_grad()
    (losses.lm_loss + 0.3 * losses.mtp_loss + 0.01 * losses.balance_loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_main_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model = make_model()
    tokens = random_tokens(model)
    logits = model.logits(tokens[:, :POSITIONS])
    labels = tokens[:, 1 : POSITIONS + 1]
    torch.testing.assert_close(model(tokens).lm_loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def mtp_losses_by_hand(model: Transformer, sequence: Tensor) -> list[Tensor]:
    """Section 2.2 of the report for one sequence: at depth k, position t joins the state of depth k − 1 at t with the
    embedding of token t + k, and predicts token t + k + 1."""
    context = model._context(POSITIONS)
    state, _ = model._run_main_layers(model.embed_tokens(sequence[:POSITIONS])[None], context)
    state = model.norm(state)
    losses = []
    for depth in range(1, model.config.num_nextn_predict_layers + 1):
        block = model.layers[str(model.config.num_hidden_layers + depth - 1)]
        joined = []
        for t in range(POSITIONS):
            embedding = block.enorm(model.embed_tokens.weight[sequence[t + depth]])
            joined.append(block.eh_proj(torch.cat([embedding, block.hnorm(state[0, t])])))
        state = block.shared_head.norm(Block.forward(block, torch.stack(joined)[None], context)[0])
        log_probabilities = model.lm_head(state[0]).log_softmax(-1)
        losses.append(-sum(log_probabilities[t, sequence[t + depth + 1]] for t in range(POSITIONS)) / POSITIONS)
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_multi_token_losses_by_hand(depth: int) -> None:
    model = make_model(num_nextn_predict_layers=depth)
    tokens = random_tokens(model)
    by_hand = torch.stack([torch.stack(mtp_losses_by_hand(model, sequence)) for sequence in tokens])
    assert by_hand.shape == (3, depth)
    torch.testing.assert_close(model(tokens).mtp_loss, by_hand.mean(), atol=1e-5, rtol=1e-5)


def test_multi_token_prediction_leaves_the_main_loss_alone() -> None:
    with_mtp, without = make_model(), make_model(num_nextn_predict_layers=0)
    without.load_state_dict({name: with_mtp.state_dict()[name] for name in without.state_dict()})
    tokens = random_tokens(with_mtp)
    torch.testing.assert_close(with_mtp(tokens).lm_loss, without(tokens[:, :-1]).lm_loss)
    assert without(tokens[:, :-1]).mtp_loss == 0


@pytest.mark.parametrize("changes", [{}, {"num_nextn_predict_layers": 2, "q_lora_rank": None, "n_shared_experts": 0}])
def test_every_parameter_has_a_gradient(changes: dict[str, object]) -> None:
    model = make_model(**changes)
    losses = model(random_tokens(model, batch_size=16))
    assert (losses.load > 0).all()
    for name, gradient in gradients(model, losses).items():
        assert gradient.isfinite().all(), name
        assert (gradient.flatten(1) != 0).any(-1).all() if gradient.dim() == 3 else gradient.any(), name


def test_only_dense_layers_have_neither_balance_loss_nor_load() -> None:
    model = make_model(first_k_dense_replace=3, num_nextn_predict_layers=0)
    losses = model(random_tokens(model))
    assert losses.balance_loss == 0
    assert losses.load.shape == (0, 8)
    assert model.expert_biases() == {}


def test_load_counts_every_choice_once() -> None:
    model = make_model(num_nextn_predict_layers=2)
    losses = model(random_tokens(model))
    assert losses.load.shape == (4, 8)
    assert losses.load.sum(-1).tolist() == [3 * POSITIONS * 2] * 4
    assert len(model.expert_biases()) == 4


def test_loss_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    tokens = random_tokens(model)
    whole = model(tokens)
    whole_gradients = gradients(model, whole)
    monkeypatch.setattr(transformer, "LOSS_CHUNK", 5)
    pieces = model(tokens)
    torch.testing.assert_close(pieces.lm_loss, whole.lm_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(pieces.mtp_loss, whole.mtp_loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients(model, pieces).items():
        torch.testing.assert_close(gradient, whole_gradients[name], atol=1e-6, rtol=1e-4)


def test_a_block_with_experts_by_hand() -> None:
    model = make_model(n_shared_experts=2)
    block = model.layers["1"]
    x = torch.randn(1, POSITIONS, 32, generator=torch.Generator().manual_seed(0))
    context = model._context(POSITIONS)
    residual = x + block.self_attn(block.input_layernorm(x), context)
    normed = block.post_attention_layernorm(residual)[0]
    route = block.mlp.gate(normed[None])

    def swiglu(gate_up: Tensor, down: Tensor, token: Tensor) -> Tensor:
        gate, up = (gate_up @ token).chunk(2)
        return down @ (F.silu(gate) * up)

    shared, experts = block.mlp.shared_experts, block.mlp.experts
    rows = []
    for t in range(POSITIONS):
        out = residual[0, t] + swiglu(shared.gate_up_proj.weight, shared.down_proj.weight, normed[t])
        for expert, weight in zip(route.experts[t], route.weights[t], strict=True):
            out = out + weight * swiglu(experts.gate_up_proj[expert], experts.down_proj[expert], normed[t])
        rows.append(out)
    torch.testing.assert_close(block(x, context)[0][0], torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_recomputing_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    tokens = random_tokens(model)
    plain = model(tokens)
    plain_gradients = gradients(model, plain)
    plain_forward, calls = Block.forward, 0

    def counted(block: Block, *arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return plain_forward(block, *arguments, **options)

    def recomputed(block: Block, *arguments: object, **options: object) -> object:
        return checkpoint(counted, block, *arguments, use_reentrant=False, **options)

    monkeypatch.setattr(Block, "forward", recomputed)
    again = model(tokens)
    again_gradients = gradients(model, again)
    assert calls == 2 * model.config.num_layers
    assert torch.equal(again.load, plain.load)
    assert torch.equal(again.balance_loss, plain.balance_loss)
    for name, gradient in again_gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name


def test_a_part_has_the_names_of_the_whole() -> None:
    names = {name.split(".")[1] for name in make_model().state_dict() if name.startswith("layers.")}
    assert names == {"0", "1", "2", "3"}
    assert isinstance(make_model().layers["3"], MultiTokenBlock)
    assert "frequencies" not in make_model().state_dict()
