"""The order of documents against a slow reference of plain lists, and against what it promises."""

import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_datasets import EOS, FIM_BEGIN, FIM_END, FIM_HOLE, FIRST_TOKEN, documents_of, make_dataset

from data.fim import fim_steps
from data.order import DocumentStream, Shuffle
from data.randomness import permutation, random_bits

lengths_of_shards = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=12), min_size=1, max_size=5)
shuffles = st.builds(
    Shuffle,
    group_shards=st.integers(1, 4),
    window_tokens=st.sampled_from([1, 7, 30, 1000]),
    window_documents=st.sampled_from([2, 1000]),
)
rates = st.sampled_from([0.0, 0.1, 0.5, 1.0])

Document = list[int]
OPEN_FILES = Path("/proc/self/fd")


def reference_epoch(
    shards: Sequence[Sequence[Document]], epoch: int, rate: float, shuffle: Shuffle, key: tuple[int, int]
) -> Iterator[Document]:
    """The documents of an epoch in order, read as data/order.py describes them."""
    number = epoch * sum(len(shard) for shard in shards)
    shard_order = permutation(len(shards), "shards", *key, epoch).tolist()
    for group, first in enumerate(range(0, len(shards), shuffle.group_shards)):
        chosen = shard_order[first : first + shuffle.group_shards]
        documents = [document for shard in chosen for document in shards[shard]]
        num_windows = max(
            math.ceil(sum(map(len, documents)) / shuffle.window_tokens),
            math.ceil(len(documents) / shuffle.window_documents),
        )
        for window in range(num_windows):
            inside: list[Document] = []
            for shard in chosen:
                size = len(shards[shard])
                slice_number = int(permutation(num_windows, "slices", *key, epoch, shard)[window])
                inside += shards[shard][size * slice_number // num_windows : size * (slice_number + 1) // num_windows]
            draws = iter(random_bits(2 * len(inside), "cuts", *key, epoch, group, window).tolist())
            for place in permutation(len(inside), "documents", *key, epoch, group, window):
                document = inside[place]
                if (number + 1) * fim_steps(rate) >> 20 > number * fim_steps(rate) >> 20:
                    document = reference_fim(document, next(draws), next(draws))
                yield document
                number += 1


def reference_fim(document: Document, one: int, other: int) -> Document:
    first, second = sorted((one % len(document), other % len(document)))
    prefix, middle, suffix = document[:first], document[first:second], document[second:-1]
    return [FIM_BEGIN, *prefix, FIM_HOLE, *suffix, FIM_END, *middle, EOS]


def undo_fim(document: Document) -> Document:
    if document[0] != FIM_BEGIN:
        return document
    hole, end = document.index(FIM_HOLE), document.index(FIM_END)
    return document[1:hole] + document[end + 1 : -1] + document[hole + 1 : end] + [EOS]


def split_documents(tokens: Sequence[int]) -> list[Document]:
    """The inverse of joining documents; the last token must be an EOS."""
    ends = [place + 1 for place, token in enumerate(tokens) if token == EOS]
    assert ends[-1] == len(tokens)
    return [list(tokens[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]


@settings(max_examples=60, deadline=None)
@given(lengths_of_shards, shuffles, rates, st.integers(0, 2**40), st.sampled_from(["uint16", "uint32"]), st.data())
def test_any_run_is_that_of_the_reference(
    lengths: list[list[int]], shuffle: Shuffle, rate: float, seed: int, dtype: str, data: st.DataObject
) -> None:
    shards = documents_of(lengths)
    epochs = [list(reference_epoch(shards, epoch, rate, shuffle, (seed, 3))) for epoch in range(3)]
    documents = list(itertools.chain(*epochs))
    expected = list(itertools.chain(*documents))
    numbers = [number for number, document in enumerate(documents) for _ in document]
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder), shards, dtype=dtype)
        stream = DocumentStream(dataset, seed=seed, number=3, fim_rate=rate, shuffle=shuffle)
        starts = [stream.epoch_start(epoch) for epoch in range(4)]
        for _ in range(4):
            start = data.draw(st.integers(0, len(expected) - 1))
            count = data.draw(st.integers(1, len(expected) - start))
            tokens = stream.read(start, count)
            assert tokens.dtype == dtype
            assert tokens.tolist() == expected[start : start + count]
            documents = stream.cut(np.array([0]), np.array([start]), count).number_documents()
            assert documents.tolist() == [number - numbers[start] for number in numbers[start : start + count]]
    assert starts == [0, *np.cumsum([sum(map(len, epoch)) for epoch in epochs])]


@settings(max_examples=40, deadline=None)
@given(lengths_of_shards, shuffles, rates, st.integers(0, 1000))
def test_every_epoch_holds_every_document_once(
    lengths: list[list[int]], shuffle: Shuffle, rate: float, epoch: int
) -> None:
    shards = documents_of(lengths)
    with tempfile.TemporaryDirectory() as folder:
        stream = DocumentStream(make_dataset(Path(folder), shards), seed=1, fim_rate=rate, shuffle=shuffle)
        start, end = stream.epoch_start(epoch), stream.epoch_start(epoch + 1)
        found = split_documents(stream.read(start, end - start).tolist())
    rewritten = sum(document[0] == FIM_BEGIN for document in found)
    assert abs(rewritten - rate * len(found)) < 1.01
    assert Counter(map(tuple, map(undo_fim, found))) == Counter(
        tuple(document) for shard in shards for document in shard
    )


def test_a_small_dataset_is_shuffled_fully(tmp_path: Path) -> None:
    shards = documents_of([[2] * 500, [2] * 500])
    stream = DocumentStream(make_dataset(tmp_path, shards), seed=1)
    places = (stream.read(0, 2000)[::2] - FIRST_TOKEN).astype(int)
    assert sorted(places) == list(range(1000))
    # The rank correlation of a random order of 1000 has standard deviation 0.03.
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.15
    next_epoch = (stream.read(2000, 2000)[::2] - FIRST_TOKEN).astype(int)
    assert abs(np.corrcoef(places, next_epoch)[0, 1]) < 0.15


def test_a_window_reads_few_long_slices_from_all_over_its_group(tmp_path: Path) -> None:
    shards = documents_of([[2] * 500] * 8)
    shuffle = Shuffle(group_shards=4, window_tokens=400)
    stream = DocumentStream(make_dataset(tmp_path, shards), seed=1, shuffle=shuffle)
    window = np.sort(stream.read(0, 400)[::2] - FIRST_TOKEN).astype(int)
    assert len(set(window // 500)) == 4
    slices = np.split(window, np.flatnonzero(np.diff(window) != 1) + 1)
    assert len(slices) <= 4
    assert len(set((window % 500) // 50)) > 1


def test_each_seed_and_dataset_has_an_order_of_its_own(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, documents_of([[2] * 200]))
    orders = {
        tuple(DocumentStream(dataset, seed=seed, number=number).read(0, 400).tolist())
        for seed, number in ((0, 0), (1, 0), (0, 1), (1, 1))
    }
    assert len(orders) == 4


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="counts open files in /proc")
def test_one_shard_group_is_held_open_at_a_time(tmp_path: Path) -> None:
    """Thousands of shards must not exhaust file descriptors."""
    dataset = make_dataset(tmp_path, documents_of([[3]] * 40))
    stream = DocumentStream(dataset, seed=0, shuffle=Shuffle(group_shards=2))
    before = len(list(OPEN_FILES.iterdir()))
    most = 0
    for start in range(0, 120, 6):
        stream.read(start, 6)
        most = max(most, len(list(OPEN_FILES.iterdir())) - before)
    assert most <= 3 * 2 * 2


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_permutations(count: int) -> None:
    assert sorted(permutation(count, "test").tolist()) == list(range(count))


def test_permutations_are_uniform() -> None:
    counts = Counter(tuple(permutation(3, "test", seed).tolist()) for seed in range(6000))
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())


def test_random_numbers_never_change() -> None:
    """A run resumed with another version of numpy goes on with the same samples."""
    assert random_bits(2, "test", 1).tolist() == [11594547833536390291, 16830936383875542212]
    assert permutation(8, "test", 1).tolist() == [0, 5, 2, 6, 1, 7, 4, 3]
