"""A dataset that cannot be read is refused when it is opened or verified, with the file, the rule and the remedy."""

from pathlib import Path

import pytest
from token_datasets import VOCAB_SIZE, documents_of, make_dataset, tokenizer_entry, write_dataset

from data.dataset import check_alike, open_dataset
from data.errors import DataError


def flip_byte(path: Path, offset: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[offset] ^= 1
    path.write_bytes(payload)


def test_open_counts_what_the_shards_hold(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, documents_of([[3, 1], [], [5]]))
    assert (dataset.num_tokens, dataset.num_documents) == (9, 3)
    assert [entry.file for entry in dataset.shards] == ["train-00000.safetensors", "train-00002.safetensors"]
    assert dataset.open_shard(1).num_documents == 1


def test_a_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset at .*nowhere.*python -m data prepare"):
        open_dataset(tmp_path / "nowhere", vocab_size=VOCAB_SIZE)


def test_a_missing_shard(tmp_path: Path) -> None:
    make_dataset(tmp_path, documents_of([[3], [4]]))
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"train-00001\.safetensors is missing; copy it again"):
        open_dataset(tmp_path, vocab_size=VOCAB_SIZE)


def test_a_shard_cut_off(tmp_path: Path) -> None:
    make_dataset(tmp_path, documents_of([[300]]))
    path = tmp_path / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        DataError, match=r"train-00000\.safetensors has 500 bytes.* need 608; it is cut off, copy it again"
    ):
        open_dataset(tmp_path, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("shards", [[], [[]]])
def test_an_empty_split(tmp_path: Path, shards: list[list[int]]) -> None:
    write_dataset(tmp_path, documents_of(shards), documents_of([[5]]))
    with pytest.raises(
        DataError, match=r"dataset .* has no documents in split 'train'; prepare it from a larger source"
    ):
        open_dataset(tmp_path, vocab_size=VOCAB_SIZE)
    assert open_dataset(tmp_path, "validation", vocab_size=VOCAB_SIZE).num_tokens == 5


def test_a_vocabulary_larger_than_the_models(tmp_path: Path) -> None:
    write_dataset(tmp_path, documents_of([[5]]))
    with pytest.raises(
        DataError, match=rf"has {VOCAB_SIZE} token ids, but model\.vocab_size = 49999; set it to at least"
    ):
        open_dataset(tmp_path, vocab_size=VOCAB_SIZE - 1)


def test_a_mixture_of_tokenizers(tmp_path: Path) -> None:
    for name, digest in (("a", "1" * 64), ("b", "1" * 64), ("c", "2" * 64)):
        write_dataset(tmp_path / name, documents_of([[5]]), tokenizer=tokenizer_entry(digest))
    a, b, c = (open_dataset(tmp_path / name, vocab_size=VOCAB_SIZE) for name in "abc")
    check_alike([a, b])
    with pytest.raises(DataError, match=r"a and .*c were made with different tokenizers \(1111.*2222.*prepare both"):
        check_alike([a, b, c])


def test_a_mixture_of_token_types(tmp_path: Path) -> None:
    narrow, wide = (make_dataset(tmp_path / name, documents_of([[5]]), dtype=name) for name in ("uint16", "uint32"))
    with pytest.raises(DataError, match=r"hold tokens of different types \(uint16 and uint32\); prepare both"):
        check_alike([narrow, wide])


def test_a_flipped_byte_is_found_by_the_rank_that_checks_the_shard(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, documents_of([[30], [30], [30]]))
    flip_byte(tmp_path / "train-00002.safetensors", -20)
    seen: list[tuple[int, int]] = []
    dataset.verify(1, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    with pytest.raises(DataError, match=r"train-00002\.safetensors is damaged: its sha256 is .* copy it again"):
        dataset.verify(0, 2)
    with pytest.raises(DataError, match=r"train-00002"):
        dataset.verify()
