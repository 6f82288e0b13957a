"""Mixtures: exact proportions in every group, and samples counted right at any point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.mixture import GROUP, Mixture, quantise

weight_lists = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def mixture(weights: list[float], seed: int = 0) -> Mixture:
    return Mixture({str(number): weight for number, weight in enumerate(weights)}, seed=seed)


@given(weight_lists)
def test_counts_are_whole_and_within_one_of_their_share(weights: list[float]) -> None:
    counts = quantise({str(number): weight for number, weight in enumerate(weights)})
    assert counts.sum() == GROUP
    assert np.all(np.abs(counts - GROUP * np.array(weights) / sum(weights)) < 1)


@settings(max_examples=20)
@given(weight_lists, st.integers(0, 2**63))
def test_every_group_holds_the_exact_counts(weights: list[float], seed: int) -> None:
    mixed = mixture(weights, seed)
    for group in (0, 1, 10**6):
        chosen = mixed.datasets(group * GROUP, GROUP)
        assert np.array_equal(np.bincount(chosen, minlength=len(weights)), mixed.counts)


@settings(max_examples=30)
@given(weight_lists, st.integers(0, 3 * GROUP), st.integers(1, 2 * GROUP))
def test_counting_agrees_with_the_order(weights: list[float], start: int, count: int) -> None:
    mixed = mixture(weights)
    whole = mixed.datasets(0, start + count)
    assert np.array_equal(mixed.datasets(start, count), whole[start:])
    assert np.array_equal(mixed.before(start), np.bincount(whole[:start], minlength=len(weights)))


def test_groups_and_seeds_have_orders_of_their_own() -> None:
    mixed = mixture([1, 1])
    first, second = mixed.datasets(0, GROUP), mixed.datasets(GROUP, GROUP)
    other = mixture([1, 1], seed=1).datasets(0, GROUP)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(np.sort(first), first)


def test_a_weight_too_small_to_count() -> None:
    with pytest.raises(
        DataError, match=r"data\.datasets\.weight = 0\.0001 of rare comes to 0\.\d+ samples in 4096, .* raise"
    ):
        Mixture({"common": 1.0, "rare": 0.0001}, seed=0)
