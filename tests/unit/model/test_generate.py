"""Generation: greedy is the argmax of the full forward; sampling stays inside top_p and follows its generator."""

import pytest
import torch
from support import small_model

from model.generate import choose_token, generate
from model.init import initialize
from model.transformer import Transformer

torch.set_num_threads(1)


def make_model() -> Transformer:
    config = small_model(initializer_range=0.3)
    model = Transformer(config)
    initialize(model, config, seed=0)
    return model


@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_greedy_takes_the_best_token_of_the_full_forward(absorbed: bool) -> None:
    model = make_model()
    tokens = torch.tensor([[3, 14, 15], [9, 26, 5]])
    generated = list(generate(model, tokens, max_new_tokens=10, absorbed=absorbed))
    assert len(generated) == 10
    for token in generated:
        assert torch.equal(token, model.logits(tokens)[:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], dim=1)


def draw(logits: torch.Tensor, *, temperature: float, top_p: float, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return choose_token(logits.expand(count, -1), temperature=temperature, top_p=top_p, generator=generator)


def test_sampling_follows_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    share = draw(probabilities.log(), temperature=1.0, top_p=1.0).bincount(minlength=4) / 4000
    torch.testing.assert_close(share, probabilities, atol=0.03, rtol=0)
    sharper = draw(probabilities.log(), temperature=0.5, top_p=1.0).bincount(minlength=4) / 4000
    torch.testing.assert_close(sharper, probabilities**2 / (probabilities**2).sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.5, {1}), (0.6, {1}), (0.7, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.125, 0.625, 0.0625, 0.1875]).log()
    assert set(draw(logits, temperature=1.0, top_p=top_p).tolist()) == kept


def test_top_p_that_is_held_exactly_needs_no_further_token() -> None:
    assert set(draw(torch.zeros(4), temperature=1.0, top_p=0.5).tolist()) == {0, 1}


def test_same_generator_same_text() -> None:
    model, prompt = make_model(), torch.tensor([[3, 14, 15]])

    def text(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [
            int(token) for token in generate(model, prompt, max_new_tokens=12, temperature=1.0, generator=generator)
        ]

    assert text(0) == text(0)
    assert text(0) != text(1)
