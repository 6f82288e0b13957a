"""What counting words would reach: the entropy of held-out tokens under a unigram and an interpolated bigram model.

A trained model that does not beat these has learned nothing from its context. The unigram is smoothed by adding one to
every count of the vocabulary. The bigram is Jelinek-Mercer's,

    p(w | v) = lambda_v c(v w) / c(v) + (1 - lambda_v) p(w)

where lambda_v depends on the magnitude of c(v), as more counts deserve more trust. The lambdas are fitted by
expectation maximisation on a tenth of the training documents with the counts of the rest; then all training tokens are
counted. The held-out tokens are only scored.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.dataset import TokenDataset
from data.order import DocumentStream
from data.stream import ValidationSamples

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_NUM_BUCKETS = 128
_EM_STEPS = 50
_FIT_SHARE = 0.1


@dataclass(frozen=True)
class NgramEntropies:
    """Mean negative log-likelihood of the held-out tokens in nats per token."""

    unigram: float
    bigram: float


def ngram_entropies(train: TokenDataset, samples: ValidationSamples, *, limit: int = 1 << 26) -> NgramEntropies:
    """Scores the next-token targets of held-out samples with counts of a training split, or of so many tokens of it.

    Takes about 100 bytes of memory for each token.
    """
    shuffled = DocumentStream(train, seed=0).read(0, min(train.num_tokens, limit))
    return score_ngrams(shuffled.astype(np.int64), samples.next_tokens(), train.tokenizer.vocab_size)


def score_ngrams(train: Int64s, held_out: Int64s, vocab_size: int) -> NgramEntropies:
    """Scores `held_out` [H], but for its first token, with counts of `train` [T], whose documents come in random order.

    H and T must be at least 2.
    """
    split = max(1, len(train) - max(1, int(len(train) * _FIT_SHARE)))
    weights = _fit_weights(_Counts(train[:split], vocab_size), train[split - 1 :])
    counts = _Counts(train, vocab_size)
    unigram, bigram, bucket = counts.score(held_out)
    mixed = weights[bucket] * bigram + (1 - weights[bucket]) * unigram
    return NgramEntropies(float(-np.log(unigram).mean()), float(-np.log(mixed).mean()))


class _Counts:
    """Counts of tokens and of the pairs that occur."""

    def __init__(self, tokens: Int64s, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._unigram = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
        self._contexts = np.bincount(tokens[:-1], minlength=vocab_size)
        self._pairs, self._pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)

    def score(self, tokens: Int64s) -> tuple[Floats, Floats, Int64s]:
        """Probabilities [N - 1] of all but the first token: of the unigram, of the bigram unsmoothed, and the bucket of
        the context's count."""
        context, target = tokens[:-1], tokens[1:]
        pair = context * self._vocab_size + target
        place = np.minimum(np.searchsorted(self._pairs, pair), len(self._pairs) - 1)
        pair_counts = np.where(self._pairs[place] == pair, self._pair_counts[place], 0)
        counts = self._contexts[context]
        bucket = np.ceil(2 * np.log2(counts + 1)).astype(np.int64)
        return self._unigram[target], pair_counts / np.maximum(counts, 1), bucket


def _fit_weights(counts: _Counts, tokens: Int64s) -> Floats:
    """The weight of the bigram for every bucket of context counts; contexts never seen are bucket 0."""
    unigram, bigram, bucket = counts.score(tokens)
    total = np.bincount(bucket, minlength=_NUM_BUCKETS)
    weights = np.full(_NUM_BUCKETS, 0.5)
    weights[0] = 0.0
    for _ in range(_EM_STEPS):
        from_bigram = weights[bucket] * bigram
        share = from_bigram / (from_bigram + (1 - weights[bucket]) * unigram)
        credit = np.bincount(bucket, share, minlength=_NUM_BUCKETS)
        # One imagined token for either side keeps weights of rare buckets away from 0 and 1.
        weights[1:] = ((credit + 1) / (total + 2))[1:]
    # All training tokens fill buckets that a part of them left empty; these take the weight of the one below.
    last_filled = np.maximum.accumulate(np.where(total > 0, np.arange(_NUM_BUCKETS), 0))
    return weights[last_filled]
