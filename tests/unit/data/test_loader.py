"""Batches: the same samples for any number of ranks, any batch sizes and any resume; errors and threads."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_datasets import documents_of, make_dataset

from data.config import DataConfig, DatasetConfig
from data.dataset import TokenDataset
from data.errors import DataError
from data.loader import BatchLoader, BatchSpec, stream_hash
from data.order import Shuffle
from data.stream import DataPosition, Samples, SampleStream

SEQ_LEN = 16


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("datasets")
    return make_datasets(folder)


def make_datasets(folder: Path, dtype: str = "uint16") -> list[TokenDataset]:
    layouts = [[[30, 1, 5] * 20, [9] * 30], [[4] * 25]]
    return [
        make_dataset(folder / str(number), documents_of(lengths), dtype=dtype) for number, lengths in enumerate(layouts)
    ]


def make_stream(datasets: list[TokenDataset], seed: int = 5) -> SampleStream:
    entries = tuple(
        DatasetConfig(path=str(dataset.folder), weight=weight) for dataset, weight in zip(datasets, (3, 1), strict=True)
    )
    config = DataConfig(datasets=entries, fim_rate=0.3, cross_document_attention=False)
    return SampleStream(datasets, config, seed=seed, extra=2, shuffle=Shuffle(group_shards=2, window_tokens=200))


def make_specs(sizes: list[int], sample: int = 0) -> list[BatchSpec]:
    position = DataPosition(sample, SEQ_LEN, (0, 0))
    specs = []
    for size in sizes:
        specs.append(BatchSpec(position, size))
        position = position.advanced(size)
    return specs


def hash_of(datasets: list[TokenDataset], sizes: list[int], dp_size: int = 1, sample: int = 0) -> str:
    return stream_hash(lambda: make_stream(datasets), make_specs(sizes, sample), dp_size)


@pytest.fixture(scope="module")
def expected(datasets: list[TokenDataset]) -> str:
    return hash_of(datasets, [48])


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[8] * 6, [4, 4, 8, 8, 12, 12], [16, 32]])
def test_samples_do_not_depend_on_ranks_or_batch_sizes(
    datasets: list[TokenDataset], expected: str, dp_size: int, sizes: list[int]
) -> None:
    assert hash_of(datasets, sizes, dp_size) == expected


def test_the_hash_sees_every_sample_and_their_order(datasets: list[TokenDataset], expected: str) -> None:
    assert hash_of(datasets, [44, 2]) != expected
    assert hash_of(datasets, [48], sample=1) != expected
    assert stream_hash(lambda: make_stream(datasets, seed=6), make_specs([48])) != expected


def test_the_hash_catches_an_order_that_depends_on_ranks(datasets: list[TokenDataset], expected: str) -> None:
    """Planted: every rank shuffles for itself, as loaders do that seed their workers."""
    fresh = iter(range(100))
    assert stream_hash(lambda: make_stream(datasets, seed=5 + next(fresh)), make_specs([48]), 2) != expected


def test_the_hash_catches_interleaved_ranks(datasets: list[TokenDataset], expected: str) -> None:
    """Planted: ranks get every dp_size-th sample, so that the global batch depends on their number."""

    class Interleaved(SampleStream):
        def read(self, position: DataPosition, start: int, count: int) -> Samples:
            rows = [super(Interleaved, self).read(position, start // count + 2 * row, 1) for row in range(count)]
            return Samples(
                np.concatenate([row.tokens for row in rows]), np.concatenate([row.documents for row in rows])
            )

    def make_interleaved() -> SampleStream:
        stream = make_stream(datasets)
        stream.__class__ = Interleaved
        return stream

    plain = stream_hash(lambda: make_stream(datasets), make_specs([48]), 2)
    assert plain == expected
    assert stream_hash(make_interleaved, make_specs([48]), 2) != plain


@settings(max_examples=25, deadline=None)
@given(
    stop=st.integers(1, 39),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    prefetch=st.sampled_from([0, 1, 4]),
)
def test_a_resume_at_any_sample_goes_on(
    datasets: list[TokenDataset], stop: int, sizes: list[int], prefetch: int
) -> None:
    straight = make_stream(datasets).read(DataPosition(0, SEQ_LEN, (0, 0)), 0, stop + sum(sizes))
    position = DataPosition.from_json(DataPosition(0, SEQ_LEN, (0, 0)).advanced(stop).to_json())
    specs = [replace(spec, position=position.advanced(spec.position.sample)) for spec in make_specs(sizes)]
    with BatchLoader(make_stream(datasets), specs, prefetch=prefetch) as loader:
        resumed = torch.cat([batch.tokens for batch in loader])
    assert torch.equal(resumed, torch.from_numpy(straight.tokens[stop:]))


def test_batches_are_ready_tensors(datasets: list[TokenDataset]) -> None:
    with BatchLoader(make_stream(datasets), make_specs([8, 4]), dp_rank=1, dp_size=2, pin_memory=True) as loader:
        first, second = loader
    assert (first.tokens.dtype, first.tokens.shape) == (torch.uint16, (4, SEQ_LEN + 2))
    assert first.documents is not None
    assert (first.documents.dtype, first.documents.shape) == (torch.int32, (4, SEQ_LEN + 2))
    assert (second.spec.position.sample, second.tokens.shape[0]) == (8, 2)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_keep_the_type_they_are_stored_in(tmp_path: Path, expected: str, dtype: str) -> None:
    """The largest ids of either type included; the samples have the same digest in both."""
    largest = {"uint16": (1 << 16) - 1, "uint32": (1 << 32) - 1}[dtype]
    dataset = make_dataset(tmp_path / "large", [[[largest, 0]] * 9], dtype=dtype)
    config = DataConfig(datasets=(DatasetConfig(path=str(dataset.folder)),))
    stream = SampleStream([dataset], config, seed=0, extra=1)
    with BatchLoader(stream, [BatchSpec(stream.start(4), 2)]) as loader:
        tokens = next(loader).tokens
    assert tokens.dtype == getattr(torch, dtype)
    assert set(tokens.long().flatten().tolist()) == {largest, 0}
    assert hash_of(make_datasets(tmp_path, dtype), [48]) == expected


def test_only_so_many_batches_are_read_ahead(datasets: list[TokenDataset]) -> None:
    asked = []

    def specs() -> Iterator[BatchSpec]:
        for spec in make_specs([4] * 20):
            asked.append(spec)
            yield spec

    with BatchLoader(make_stream(datasets), specs(), prefetch=3) as loader:
        assert asked == []
        next(loader)
        assert len(asked) == 4
        next(loader)
        assert len(asked) == 5


class SlowStream(SampleStream):
    """Fails or takes its time, as told by the sample."""

    def read(self, position: DataPosition, start: int, count: int) -> Samples:
        time.sleep(0.05)
        if position.sample == 8:
            raise DataError("shard train-00007 is damaged")
        return super().read(position, start, count)


@pytest.fixture
def slow_stream(datasets: list[TokenDataset]) -> SampleStream:
    stream = make_stream(datasets)
    stream.__class__ = SlowStream
    return stream


def test_an_error_is_raised_with_the_batch_it_spoils(slow_stream: SampleStream) -> None:
    with BatchLoader(slow_stream, make_specs([4] * 5)) as loader:
        assert [next(loader).spec.position.sample for _ in range(2)] == [0, 4]
        with pytest.raises(DataError, match="shard train-00007 is damaged"):
            next(loader)


def test_closing_ends_the_thread_without_reading_on(slow_stream: SampleStream) -> None:
    loader = BatchLoader(slow_stream, make_specs([4] * 50), prefetch=50)
    next(loader)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


@pytest.mark.parametrize("size", [6, 2])
def test_a_batch_that_ranks_cannot_share(datasets: list[TokenDataset], size: int) -> None:
    with (
        BatchLoader(make_stream(datasets), make_specs([size]), dp_size=4) as loader,
        pytest.raises(
            DataError, match=rf"a batch of {size} samples cannot be shared by 4 data-parallel ranks; make train"
        ),
    ):
        next(loader)


def test_a_shard_found_damaged_while_reading(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, documents_of([[5, 5]]))
    stream = SampleStream([dataset], DataConfig(datasets=(DatasetConfig(path=str(tmp_path)),)), seed=0, extra=1)
    (tmp_path / "train-00000.safetensors").unlink()
    specs = [BatchSpec(stream.start(4), 2)]
    with BatchLoader(stream, specs) as loader, pytest.raises(DataError, match=r"train-00000\.safetensors is missing"):
        next(loader)
