"""The stream of samples: packing, mixtures, changing sequence lengths, and the held-out split."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_datasets import EOS, VOCAB_SIZE, documents_of, make_dataset, write_dataset

from data.config import DataConfig, DatasetConfig
from data.dataset import TokenDataset, open_dataset
from data.errors import DataError
from data.mixture import Mixture
from data.order import DocumentStream, Shuffle
from data.randomness import permutation
from data.stream import DataPosition, SampleStream, ValidationSamples, open_stream

SMALL = Shuffle(group_shards=2, window_tokens=20, sample_tokens=40)
WEIGHTS = (0.6, 0.3, 0.1)
LAYOUTS = ([[3, 1, 7], [20, 2]], [[1, 1, 1, 4]], [[60]])
EPOCHS = (33, 7, 60)


def make_datasets(folder: Path) -> list[TokenDataset]:
    """Three datasets, of one-token documents and long ones."""
    return [make_dataset(folder / str(number), documents_of(lengths)) for number, lengths in enumerate(LAYOUTS)]


def make_config(datasets: list[TokenDataset], **values: object) -> DataConfig:
    entries = (
        DatasetConfig(path=str(item.folder), weight=weight) for item, weight in zip(datasets, WEIGHTS, strict=False)
    )
    return DataConfig(datasets=tuple(entries), **values)  # type: ignore[arg-type]


def make_stream(datasets: list[TokenDataset], *, extra: int = 1, **values: object) -> SampleStream:
    return SampleStream(datasets, make_config(datasets, **values), seed=5, extra=extra, shuffle=SMALL)


def window_size(number: int, seq_len: int) -> int:
    """Samples in a window of about 40 tokens, or an epoch."""
    return max(1, min(40, EPOCHS[number]) // seq_len)


def shuffled(number: int, taken: int, seq_len: int) -> int:
    """Which piece of a dataset comes after `taken` others: each window is in random order."""
    size = window_size(number, seq_len)
    window = taken // size
    return window * size + permutation(size, "samples", 5, number, seq_len, window).tolist()[taken % size]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    return make_datasets(tmp_path_factory.mktemp("datasets"))


@settings(max_examples=40, deadline=None)
@given(
    # 300 tokens are several epochs of every dataset.
    seq_len=st.sampled_from([1, 2, 5, 16, 300]),
    extra=st.integers(1, 3),
    rate=st.sampled_from([0.0, 0.5]),
    sample=st.integers(0, 9000),
    start=st.integers(0, 50),
    count=st.integers(1, 40),
)
def test_samples_are_shuffled_pieces_of_each_dataset(
    datasets: list[TokenDataset], seq_len: int, extra: int, rate: float, sample: int, start: int, count: int
) -> None:
    stream = make_stream(datasets, extra=extra, fim_rate=rate, cross_document_attention=False)
    position = stream.start(seq_len).advanced(sample)
    samples = stream.read(position, start, count)
    mixture = Mixture({str(number): weight for number, weight in enumerate(WEIGHTS)}, seed=5)
    sources = [
        DocumentStream(dataset, seed=5, number=number, fim_rate=rate, shuffle=SMALL)
        for number, dataset in enumerate(datasets)
    ]
    first = sample + start
    used = mixture.before(first).tolist()
    assert samples.tokens.shape == (count, seq_len + extra)
    assert samples.documents is not None
    for row, number in enumerate(mixture.datasets(first, count).tolist()):
        piece = shuffled(number, used[number], seq_len)
        pieces = sources[number].cut(np.array([0]), np.array([piece * seq_len]), seq_len + extra)
        used[number] += 1
        assert samples.tokens[row].tolist() == pieces.read().tolist()
        assert samples.documents[row].tolist() == pieces.number_documents().tolist()


def test_documents_begin_after_each_end(datasets: list[TokenDataset]) -> None:
    stream = make_stream(datasets, cross_document_attention=False)
    samples = stream.read(stream.start(30), 0, 50)
    assert samples.documents is not None
    assert np.all(samples.documents[:, 0] == 0)
    assert np.array_equal(np.diff(samples.documents, axis=1), samples.tokens[:, :-1] == EOS)
    assert make_stream(datasets).read(stream.start(30), 0, 1).documents is None


@settings(max_examples=30, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 4, 9, 33])), min_size=1, max_size=4),
    rate=st.sampled_from([0.0, 0.5]),
)
def test_a_changed_length_goes_on_after_the_windows_begun(
    datasets: list[TokenDataset], changes: list[tuple[int, int]], rate: float
) -> None:
    stream = make_stream(datasets, fim_rate=rate)
    mixture = Mixture({str(number): weight for number, weight in enumerate(WEIGHTS)}, seed=5)
    sources = [
        DocumentStream(dataset, seed=5, number=number, fim_rate=rate, shuffle=SMALL)
        for number, dataset in enumerate(datasets)
    ]
    position, begins = stream.start(7), [0, 0, 0]
    for count, seq_len in [*changes, (1, 1)]:
        taken = [0, 0, 0]
        rows = stream.read(position, 0, count).tokens.tolist() if count else []
        chosen = mixture.datasets(position.sample, count).tolist() if count else []
        for number, row in zip(chosen, rows, strict=True):
            piece = shuffled(number, taken[number], position.seq_len)
            expected = sources[number].read(begins[number] + piece * position.seq_len, position.seq_len + 1)
            assert row == expected.tolist()
            taken[number] += 1
        for number, used in enumerate(taken):
            size = window_size(number, position.seq_len)
            begins[number] += -(-used // size) * size * position.seq_len
        position = stream.resized(position.advanced(count), seq_len)
        assert list(position.origin) == begins


def test_a_small_dataset_is_read_whole_before_any_of_it_comes_again(tmp_path: Path) -> None:
    shards = documents_of([[5, 3, 8], [16]])
    dataset = make_dataset(tmp_path, shards)
    stream = SampleStream([dataset], DataConfig(datasets=(DatasetConfig(path=str(tmp_path)),)), seed=0, extra=1)
    tokens = sorted(itertools.chain(*itertools.chain(*shards)))
    for epoch in range(3):
        seen = stream.read(stream.start(4), 8 * epoch, 8).tokens[:, :4]
        assert sorted(seen.ravel().tolist()) == tokens


def test_neighbours_in_a_batch_are_not_neighbours_in_a_document(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, documents_of([[4000] * 10]))
    config = DataConfig(datasets=(DatasetConfig(path=str(tmp_path)),), cross_document_attention=False)
    stream = SampleStream([dataset], config, seed=0, extra=1, shuffle=Shuffle(sample_tokens=40_000))
    source = DocumentStream(dataset, seed=0)
    documents = {tuple(source.read(100 * piece, 101).tolist()): piece // 40 for piece in range(400)}
    batch = stream.read(stream.start(100), 0, 8).tokens.tolist()
    assert len({documents[tuple(row)] for row in batch}) > 3


def test_positions_survive_json(datasets: list[TokenDataset]) -> None:
    stream = make_stream(datasets)
    position = stream.resized(stream.start(7).advanced(1000), 32)
    assert position.sample == 1000
    assert DataPosition.from_json(json.loads(json.dumps(position.to_json()))) == position


def test_a_position_of_another_mixture(datasets: list[TokenDataset]) -> None:
    with pytest.raises(
        DataError, match=r"position is one of 2 datasets, data\.datasets lists 3; resume with the datasets"
    ):
        make_stream(datasets).read(DataPosition(0, 8, (0, 0)), 0, 1)


def test_the_fingerprint_covers_what_fixes_the_order(datasets: list[TokenDataset]) -> None:
    config = make_config(datasets)
    same = [SampleStream(datasets, config, seed=5, extra=extra).fingerprint for extra in (1, 2)]
    others = [
        SampleStream(datasets, config, seed=6, extra=1).fingerprint,
        SampleStream(datasets, make_config(datasets, fim_rate=0.1), seed=5, extra=1).fingerprint,
        SampleStream(datasets[:2], make_config(datasets[:2]), seed=5, extra=1).fingerprint,
        SampleStream(datasets[::-1], make_config(datasets[::-1]), seed=5, extra=1).fingerprint,
        SampleStream(datasets, config, seed=5, extra=1, shuffle=SMALL).fingerprint,
    ]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 6


def test_open_stream_reads_the_training_splits(tmp_path: Path) -> None:
    write_dataset(tmp_path, documents_of([[9]]), documents_of([[20]]))
    config = DataConfig(datasets=(DatasetConfig(path=str(tmp_path)),))
    stream = open_stream(config, seed=0, extra=1, vocab_size=VOCAB_SIZE)
    assert [dataset.num_tokens for dataset in stream.datasets] == [9]
    stream.verify()
    shard = tmp_path / "train-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    with pytest.raises(DataError, match="train-00000"):
        stream.verify()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=10), min_size=1, max_size=3),
    st.sampled_from([1, 4, 10]),
    st.integers(1, 2),
)
def test_held_out_samples_hold_each_token_once(lengths: list[list[int]], seq_len: int, extra: int) -> None:
    shards = documents_of(lengths)
    tokens = sorted(itertools.chain(*itertools.chain(*shards)))
    whole = (len(tokens) - extra) // seq_len
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), documents_of([[3]]), shards)
        dataset = open_dataset(Path(folder), "validation", vocab_size=VOCAB_SIZE)
        if whole < 1:
            with pytest.raises(DataError, match=r"split 'validation' .* one sample needs train\.seq_len"):
                ValidationSamples(dataset, seq_len=seq_len, extra=extra)
            return
        samples = ValidationSamples(dataset, seq_len=seq_len, extra=extra)
        rows = [samples.read(start, 1).tokens[0] for start in range(len(samples))]
        text = samples.next_tokens()
        some = ValidationSamples(dataset, seq_len=seq_len, extra=extra, limit=2, cross_document_attention=False)
        few = some.read(0, len(some))
    assert len(samples) == whole
    seen = [*np.concatenate([row[:seq_len] for row in rows]), *rows[-1][seq_len:]]
    assert len(seen) == whole * seq_len + extra
    assert not set(np.unique(seen, return_counts=True)[0]) - set(tokens)
    assert max(np.unique([token for token in seen if token != EOS], return_counts=True)[1], default=1) == 1
    assert text.tolist() == seen[: whole * seq_len + 1]
    assert len(some) == min(2, whole)
    assert few.tokens.tolist() == [row.tolist() for row in rows[:2]]
    assert few.documents is not None
