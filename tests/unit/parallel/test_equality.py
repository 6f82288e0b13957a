"""Hashes that tell copies apart, down to a single bit anywhere."""

import random

import pytest
import torch

import parallel.equality
from parallel.equality import fingerprint, parties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("numel", [1, 3, 8, 1001])
def test_equal_bits_have_equal_hashes(dtype: torch.dtype, numel: int) -> None:
    values = torch.arange(numel).to(dtype)
    expected = fingerprint(values)
    assert expected.dtype == torch.int64
    assert fingerprint(values.clone()) == expected
    # The same values at an odd place in memory, and as another shape.
    shifted = torch.cat((values[:1], values))[1:]
    assert fingerprint(shifted) == fingerprint(shifted.view(1, -1)) == expected


@pytest.mark.parametrize("bytes_at_once", [64, 1 << 22])
def test_every_flipped_bit_shows(monkeypatch: pytest.MonkeyPatch, bytes_at_once: int) -> None:
    monkeypatch.setattr(parallel.equality, "BYTES_AT_ONCE", bytes_at_once)
    values = torch.randn(37, generator=torch.Generator().manual_seed(0))
    seen = {int(fingerprint(values))}
    raw = values.view(torch.uint8)
    for place in range(len(raw)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            seen.add(int(fingerprint(values)))
            raw[place] ^= 1 << bit
    assert len(seen) == 37 * 32 + 1


def test_flipped_signs_do_not_cancel() -> None:
    """The planted fault: sums over words alone, in which the highest bits of two of them do."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(2))
    expected = fingerprint(values)
    for one in range(64):
        for other in range(one):
            changed = values.clone()
            changed[[one, other]] *= -1
            assert fingerprint(changed) != expected
    words, factors = values.view(torch.int64), torch.arange(1, 64, 2)
    changed = values.clone()
    changed[[1, 3]] *= -1
    assert (words * factors).sum() == (changed.view(torch.int64) * factors).sum()


def test_other_orders_and_signs_have_other_hashes() -> None:
    chance = random.Random(0)
    values = torch.randn(64, generator=torch.Generator().manual_seed(1))
    seen = {int(fingerprint(values)), int(fingerprint(-values))}
    for _ in range(200):
        places = list(range(64))
        one, other = chance.sample(places, 2)
        places[one], places[other] = other, one
        seen.add(int(fingerprint(values[places])))
    assert len(seen) > 190


def test_nan_is_equal_to_itself() -> None:
    values = torch.tensor([torch.nan, 0.0])
    assert fingerprint(values) == fingerprint(values.clone())
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))


def test_parties_are_in_order_of_size() -> None:
    assert parties([4, 5, 6, 7], [1, 2, 2, 2]) == ((5, 6, 7), (4,))
    assert parties([0, 1], ["a", "b"]) == ((0,), (1,))
