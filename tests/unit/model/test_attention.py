"""Latent attention: cached decoding in both ways, causality, documents, and a plain reference for one layer."""

import math
from itertools import pairwise

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.nn import functional as F

from model.attention import AttentionContext, MultiHeadLatentAttention, attention_kernel, causal_mask, document_mask
from model.config import ModelConfig, RopeScaling
from model.init import initialize
from model.recompute import Execution
from model.rope import rotary_frequencies, rotary_table
from model.transformer import Transformer

torch.set_num_threads(1)

LENGTH = 17
YARN = RopeScaling(factor=4, original_max_position_embeddings=8, mscale_all_dim=0.5)
VARIANTS = {
    "q_lora": {},
    "no q_lora": {"q_lora_rank": None},
    "yarn": {"rope_scaling": YARN},
    "odd sizes": {
        "hidden_size": 27, "num_attention_heads": 3, "q_lora_rank": 11, "kv_lora_rank": 13, "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6, "v_head_dim": 5, "rope_scaling": YARN,
    },
}  # fmt: skip


def make_model(**changes: object) -> Transformer:
    config = small_model(**({"initializer_range": 0.3} | changes))
    model = Transformer(config)
    initialize(model, config, seed=0)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 1, 3, 1, 6], [LENGTH], [16, 1]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(variant: str, chunks: list[int]) -> None:
    model, tokens = make_model(**VARIANTS[variant]), random_tokens(2, LENGTH)
    full = model.logits(tokens)
    assert full.std() > 0.5
    for absorbed in (False, True):
        caches = model.make_caches(2, LENGTH)
        steps = [model.logits(part, caches, absorbed=absorbed) for part in tokens.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=0)
        assert all(cache.length == LENGTH for cache in caches)


@torch.no_grad()
def test_the_two_ways_may_alternate() -> None:
    model, tokens = make_model(), random_tokens(1, LENGTH)
    caches = model.make_caches(1, LENGTH)
    steps = [model.logits(tokens[:, i : i + 1], caches, absorbed=i % 2 == 1) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(tokens), atol=1e-4, rtol=0)


def test_cache_keeps_latents_and_one_rotary_key() -> None:
    model = make_model(num_nextn_predict_layers=1)
    caches = model.make_caches(2, 9)
    assert len(caches) == model.config.num_hidden_layers
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert {tuple(cache.entries.shape) for cache in caches} == {(2, 9, width)}


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = make_model(), random_tokens(1, LENGTH)
    before = model.logits(tokens)
    for position in (0, 1, 8, LENGTH - 1):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 96
        after = model.logits(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-5, rtol=0)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-2


def logits_of_documents(model: Transformer, tokens: Tensor, documents: Tensor) -> Tensor:
    context = AttentionContext(model._context(tokens.shape[1]).rotary, document_mask(documents))
    hidden, _ = model._run_main_layers(model.embed_tokens(tokens), context)
    return model.lm_head(model.norm(hidden))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(variant: str) -> None:
    model, tokens = make_model(**VARIANTS[variant]), random_tokens(2, LENGTH)
    starts = [0, 1, 7, 12, LENGTH]
    documents = torch.cat([torch.full((end - start,), 9 - start) for start, end in pairwise(starts)]).expand(2, -1)
    packed = logits_of_documents(model, tokens, documents)
    for start, end in pairwise(starts):
        torch.testing.assert_close(packed[:, start:end], model.logits(tokens[:, start:end]), atol=1e-4, rtol=0)
    assert (packed - model.logits(tokens))[:, 1:].abs().max() > 0.1


@torch.no_grad()
def test_documents_in_the_training_loss() -> None:
    model, tokens = make_model(num_nextn_predict_layers=0), random_tokens(1, LENGTH + 1)
    documents = (torch.arange(LENGTH + 1) >= 6).long()[None]
    losses = model(tokens, documents)
    expected = F.cross_entropy(logits_of_documents(model, tokens[:, :-1], documents[:, :-1])[0], tokens[0, 1:])
    torch.testing.assert_close(losses.lm_loss, expected)
    assert abs(losses.lm_loss - model(tokens).lm_loss) > 1e-3


def test_yarn_sharpens_the_softmax() -> None:
    scale = make_model(rope_scaling=YARN).layers["0"].self_attn.scale
    assert scale == pytest.approx(12**-0.5 * (0.1 * 0.5 * math.log(4) + 1) ** 2)


def test_masks() -> None:
    assert causal_mask(2, 4, device=torch.device("cpu"))[0, 0].tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert document_mask(torch.tensor([[5, 5, 2]]))[0, 0].tolist() == [
        [True, False, False],
        [True, True, False],
        [False, False, True],
    ]


def reference_attention(layer: MultiHeadLatentAttention, config: ModelConfig, x: Tensor) -> Tensor:
    """The report's equations 1 to 11 for one sequence x [S, D], a head and a query at a time."""
    content, position, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    frequencies = [config.rope_theta ** (-2 * i / position) for i in range(position // 2)]

    def rotate(vector: Tensor, at: int) -> Tensor:
        turned = []
        for i, frequency in enumerate(frequencies):
            cos, sin = math.cos(at * frequency), math.sin(at * frequency)
            a, b = vector[2 * i], vector[2 * i + 1]
            turned += [a * cos - b * sin, a * sin + b * cos]
        return torch.stack(turned)

    down = layer.kv_a_proj_with_mqa(x)
    latents = layer.kv_a_layernorm(down[:, : config.kv_lora_rank])
    keys_values = layer.kv_b_proj(latents)
    queries = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x)))
    out = []
    for t in range(len(x)):
        heads = []
        for head in range(config.num_attention_heads):
            q = queries[t].view(config.num_attention_heads, -1)[head]
            q = torch.cat([q[:content], rotate(q[content:], t)])
            scores, values = [], []
            for s in range(t + 1):
                kv = keys_values[s].view(config.num_attention_heads, -1)[head]
                k = torch.cat([kv[:content], rotate(down[s, config.kv_lora_rank :], s)])
                scores.append(q @ k / math.sqrt(content + position))
                values.append(kv[content : content + value])
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        out.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_one_layer_against_the_equations(absorbed: bool) -> None:
    config = small_model(v_head_dim=6, initializer_range=0.4)
    layer = MultiHeadLatentAttention(config, Execution())
    initialize(layer, config, seed=0)
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    frequencies = rotary_frequencies(config.qk_rope_head_dim, theta=config.rope_theta, scaling=None)
    context = AttentionContext(rotary_table(frequencies, torch.arange(9), scaling=None))
    torch.testing.assert_close(
        layer(x[None], context, absorbed=absorbed)[0], reference_attention(layer, config, x), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(("v_head_dim", "kernel"), [(12, "flash"), (16, "math")])
def test_the_kernel_that_attends_is_known(v_head_dim: int, kernel: str) -> None:
    """On a CPU torch has a fused kernel for equal head sizes only."""
    config = small_model(qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=v_head_dim)
    assert attention_kernel(config, LENGTH, device=torch.device("cpu"), dtype=torch.float32) == kernel
