"""Text from the compressed cache, token by token."""

from collections.abc import Iterator

import torch
from torch import Tensor

from model.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    absorbed: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every sequence, [B], `max_new_tokens` times, for prompts [B, S] of equal length.

    Temperature 0 takes the best token. Otherwise it is drawn from the smallest set that holds `top_p` of the
    probability. The prompt is always read with decompressed keys; `absorbed` decides for the tokens after it.
    """
    caches = model.make_caches(prompt.shape[0], prompt.shape[1] + max_new_tokens)
    logits = model.logits(prompt, caches)[:, -1]
    for index in range(max_new_tokens):
        token = choose_token(logits, temperature=temperature, top_p=top_p, generator=generator)
        yield token
        if index + 1 < max_new_tokens:
            logits = model.logits(token.unsqueeze(1), caches, absorbed=absorbed)[:, -1]


def choose_token(logits: Tensor, *, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token a row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, tokens = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass_before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(mass_before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, drawn).squeeze(-1)
