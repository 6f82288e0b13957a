"""The n-gram baselines: proper distributions, near the true entropy, equal to a slow reference."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from token_datasets import EOS, VOCAB_SIZE, write_dataset

from data.dataset import open_dataset
from data.ngram import _Counts, _fit_weights, ngram_entropies, score_ngrams
from data.stream import ValidationSamples


def markov_chain(size: int, length: int, seed: int) -> tuple[np.ndarray, float]:
    """A chain that follows each token by one of four with probabilities 0.7, 0.1, 0.1, 0.1; its entropy rate."""
    generator = np.random.default_rng(seed)
    table = np.random.default_rng(0).permuted(np.tile(np.arange(size), (size, 1)), axis=1)[:, :4]
    steps = generator.choice(4, length, p=[0.7, 0.1, 0.1, 0.1])
    tokens = np.zeros(length, np.int64)
    for place in range(1, length):
        tokens[place] = table[tokens[place - 1], steps[place]]
    return tokens, -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))


def test_independent_tokens_have_the_entropy_of_their_distribution() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 60_000)
    scores = score_ngrams(tokens[:50_000], tokens[50_000:], 50)
    assert scores.unigram == pytest.approx(math.log(50), abs=0.01)
    assert scores.bigram == pytest.approx(math.log(50), abs=0.02)


def test_the_bigram_finds_the_entropy_of_a_chain() -> None:
    train, entropy = markov_chain(50, 100_000, seed=1)
    held_out, _ = markov_chain(50, 20_000, seed=2)
    scores = score_ngrams(train, held_out, 50)
    assert scores.bigram == pytest.approx(entropy, abs=0.02)
    assert scores.unigram > 3


def test_both_models_are_distributions() -> None:
    """Summed over the vocabulary, probabilities are 1 after every context, seen or not."""
    size = 20
    train = np.random.default_rng(0).integers(0, size - 1, 300) ** 2 // size
    counts = _Counts(train, size)
    weights = _fit_weights(counts, train)
    for context in range(size):
        text = np.array([[context, target] for target in range(size)]).ravel()
        unigram, bigram, bucket = (values[::2] for values in counts.score(text))
        assert unigram.sum() == pytest.approx(1)
        assert (weights[bucket] * bigram + (1 - weights[bucket]) * unigram).sum() == pytest.approx(1)


def test_scores_equal_a_slow_reference() -> None:
    size = 30
    train = np.random.default_rng(1).integers(0, 25, 500) ** 2 // 25
    held_out = np.random.default_rng(2).integers(0, 30, 100)
    split = 450
    weights = _fit_weights(_Counts(train[:split], size), train[split - 1 :])
    singles, contexts = Counter(train.tolist()), Counter(train[:-1].tolist())
    pairs = Counter(zip(train.tolist(), train.tolist()[1:], strict=False))
    unigram_loss, bigram_loss = [], []
    for context, target in zip(held_out.tolist(), held_out.tolist()[1:], strict=False):
        unigram = (singles[target] + 1) / (len(train) + size)
        weight = weights[math.ceil(2 * math.log2(contexts[context] + 1))]
        bigram = pairs[context, target] / contexts[context] if contexts[context] else 0
        unigram_loss.append(-math.log(unigram))
        bigram_loss.append(-math.log(weight * bigram + (1 - weight) * unigram))
    scores = score_ngrams(train, held_out, size)
    assert scores.unigram == pytest.approx(np.mean(unigram_loss))
    assert scores.bigram == pytest.approx(np.mean(bigram_loss))


def test_the_weights_maximise_the_likelihood_of_what_was_held_back() -> None:
    train, _ = markov_chain(300, 6_000, seed=3)
    counts, kept = _Counts(train[:5_000], 300), train[4_999:]
    unigram, bigram, bucket = counts.score(kept)

    def likelihood(weights: np.ndarray) -> float:
        return float(np.log(weights[bucket] * bigram + (1 - weights[bucket]) * unigram).mean())

    fitted = likelihood(_fit_weights(counts, kept))
    assert all(fitted > likelihood(np.full(128, weight)) for weight in (0.2, 0.5, 0.7, 0.8))


def test_a_dataset_is_scored_on_the_targets_of_its_held_out_samples(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)

    def shard(documents: int) -> list[list[int]]:
        return [[*generator.integers(4, 40, 50).tolist(), EOS] for _ in range(documents)]

    write_dataset(tmp_path, [shard(40), shard(40)], [shard(10)])
    train, validation = (open_dataset(tmp_path, split, vocab_size=VOCAB_SIZE) for split in ("train", "validation"))
    samples = ValidationSamples(validation, seq_len=16, extra=2)
    scores = ngram_entropies(train, samples)
    targets = np.concatenate([samples.read(row, 1).tokens[0, 1:17] for row in range(len(samples))])
    tokens = np.concatenate([train.open_shard(number).tokens for number in range(2)])
    unigram = (np.bincount(tokens, minlength=VOCAB_SIZE) + 1) / (len(tokens) + VOCAB_SIZE)
    assert scores.unigram == pytest.approx(-np.log(unigram[targets]).mean())
    assert scores.bigram < scores.unigram
    assert ngram_entropies(train, samples, limit=500).unigram > scores.unigram
