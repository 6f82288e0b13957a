"""Fill-in-the-middle: the parts put back in order give the document, and the share of documents is exact."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.fim import EXTRA_TOKENS, NUM_PIECES, fim_count, fim_mask, fim_pieces, fim_steps
from data.randomness import random_bits

rates = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))


@given(rates, st.integers(0, 2**42), st.integers(0, 500))
def test_mask_and_count_agree(rate: float, first: int, count: int) -> None:
    steps = fim_steps(rate)
    mask = fim_mask(first, count, steps)
    assert len(mask) == count
    assert mask.sum() == fim_count(first + count, steps) - fim_count(first, steps)
    assert abs(fim_count(first + count, steps) - rate * (first + count)) <= 1 + (first + count) / 2**20


@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_parts_in_their_old_order_are_the_document(length: int, one: int, other: int) -> None:
    begins, sizes = fim_pieces(np.array([7]), np.array([length]), np.array([[one, other]], np.uint64))
    assert begins.shape == sizes.shape == (1, NUM_PIECES)
    assert sizes.sum() == length + EXTRA_TOKENS
    assert begins[0, [0, 2, 4]].tolist() == [0, 1, 2]
    assert sizes[0, [0, 2, 4, 6]].tolist() == [1, 1, 1, 1]
    prefix, suffix, middle, eos = ((begins[0, part], begins[0, part] + sizes[0, part]) for part in (1, 3, 5, 6))
    borders = [7, prefix[1], middle[1], suffix[1], 7 + length]
    assert [prefix[0], middle[0], suffix[0], eos[0], eos[1]] == borders
    assert borders == sorted(borders)


def test_cuts_are_uniform() -> None:
    documents, length = 20_000, 11
    draws = random_bits(2 * documents, "test").reshape(-1, 2)
    _, sizes = fim_pieces(np.zeros(documents, np.int64), np.full(documents, length), draws)
    # Of two uniform cuts among 0..10, prefix, middle and suffix have mean 70/22, 80/22 and 70/22.
    assert np.allclose(sizes[:, [1, 5, 3]].mean(axis=0), [70 / 22, 80 / 22, 70 / 22], atol=0.1)
    first = np.bincount(sizes[:, 1], minlength=length) / documents
    expected = (2 * (length - np.arange(length)) - 1) / length**2
    assert np.allclose(first, expected, atol=0.01)
