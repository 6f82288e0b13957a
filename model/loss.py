"""Cross-entropy over a large vocabulary, in pieces, so that the logits of all tokens never exist at once."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int) -> Tensor:
    """Mean of −log softmax(hidden Wᵀ)[label] in nats: hidden [..., D], weight [V, D], labels [...] to a scalar in fp32.

    Takes `chunk_size` tokens at a time. With more than one piece, each is computed again in the backward pass.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    if len(labels) <= chunk_size or not torch.is_grad_enabled():
        sum_of = _summed_cross_entropy
    else:
        sum_of = _checkpointed_cross_entropy
    sums = [
        sum_of(rows, weight, targets)
        for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
    ]
    return torch.stack(sums).sum() / len(labels)


def _summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def _checkpointed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return checkpoint(_summed_cross_entropy, hidden, weight, labels, use_reentrant=False, preserve_rng_state=False)
