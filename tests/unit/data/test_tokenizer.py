"""Tokenizers give every text back, keep special tokens apart from text, and refuse what cannot do so."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_corpora import SPECIALS, code_like, make_hugging_face, make_tokenizer

from data.errors import DataError
from data.shards import DatasetIndex, write_index
from data.tokenizer import (
    SpecialNames,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_dataset,
    tokenizer_from_entry,
    train_sentencepiece,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_hugging_face(tmp_path_factory.mktemp("hf") / "tokenizer.json"))


@pytest.fixture(params=["trained", "hugging_face"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    loaded: Tokenizer = request.getfixturevalue(request.param)
    return loaded


def back_and_forth(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode_batch([text])[0])


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \t\n\r▁a1é<|>▁x0E", max_size=60))
@example("▁")
@example("a▁▁ b")
@example("\x00\ufeff\u2028\U0010ffff")
@example("<0x41><unk></s>")
def test_trained_tokenizer_gives_every_text_back(trained: Tokenizer, text: str) -> None:
    assert back_and_forth(trained, text) == text


def test_long_texts_are_cut_and_joined_without_loss(trained: Tokenizer) -> None:
    for text in (code_like(0, 3000), "x" * 50_000, " " * 50_000, "▁ é" * 20_000):
        assert back_and_forth(trained, text) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["", "a▁b", code_like(1, 2000), "\n", " x"]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode_batch([text])[0].tolist() for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


@given(st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "a", " ", "\n"]), max_size=8))
@settings(max_examples=100, deadline=None)
def test_text_never_produces_a_special_token(trained: Tokenizer, hugging_face: Tokenizer, pieces: list[str]) -> None:
    for tokenizer in (trained, hugging_face):
        ids = tokenizer.encode_batch(["".join(pieces)])[0].tolist()
        special = {tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end}
        assert len(special) == 4
        assert not special & set(ids)
        assert tokenizer.decode(ids) == "".join(pieces)


def test_special_tokens_decode_to_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eos, *tokenizer.encode_batch(["ab"])[0], tokenizer.fim_hole]
    assert tokenizer.decode(ids) == "ab"


def test_training_depends_on_the_texts_alone(tmp_path: Path) -> None:
    texts = [code_like(seed, 100) for seed in range(4)]
    first = train_sentencepiece(texts, tmp_path / "first.model", 380)
    second = train_sentencepiece(reversed(texts), tmp_path / "second.model", 380)
    other = train_sentencepiece(texts[1:], tmp_path / "other.model", 380)
    assert first.sha256 == second.sha256 != other.sha256
    assert first.vocab_size == 380


@pytest.mark.parametrize("vocab_size", [-1, 20, 1_000_000])
def test_impossible_vocabulary_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=rf"tokenizer of {vocab_size} tokens .*--train-tokenizer"):
        train_sentencepiece([code_like(0, 50)], tmp_path / "tokenizer.model", vocab_size)
    assert not (tmp_path / "tokenizer.model").exists()


def test_added_tokens_not_marked_special_are_kept_apart_too(tmp_path: Path) -> None:
    path = make_hugging_face(tmp_path / "tokenizer.json", marked_special=False)
    tokenizer = load_tokenizer(path)
    again = tokenizer_from_entry(tmp_path, tokenizer.entry("tokenizer.json"))
    for loaded in (tokenizer, again):
        assert tokenizer.eos not in loaded.encode_batch(["a<|eos|>b"])[0]


def test_named_special_tokens(tmp_path: Path) -> None:
    path = make_hugging_face(tmp_path / "tokenizer.json", names=("[END]", "[PRE]", "[SUF]", "[MID]"))
    with pytest.raises(DataError, match=r"no special token any of .*name its end-of-document token with --eos"):
        load_tokenizer(path)
    assert load_tokenizer(path, SpecialNames(eos="[END]")).fim_begin == -1
    tokenizer = load_tokenizer(path, SpecialNames("[END]", "[PRE]", "[SUF]", "[MID]"))
    names = json.loads(path.read_text())["added_tokens"]
    ids = {name["content"]: name["id"] for name in names}
    assert (tokenizer.eos, tokenizer.fim_begin) == (ids["[END]"], ids["[PRE]"])
    assert (tokenizer.fim_hole, tokenizer.fim_end) == (ids["[SUF]"], ids["[MID]"])
    with pytest.raises(DataError, match=r"'\[GAP\]'; give all of --fim-begin"):
        load_tokenizer(path, SpecialNames("[END]", "[PRE]", "[GAP]", "[MID]"))


def test_model_that_spells_its_special_tokens_in_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({"<|eos|>": 0, "a": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<|eos|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"turns the text '<\|eos\|>' into the special token 0"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"hello", b'{"added_tokens": [3]}', b"\x0a\xff\xff\xff"])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thing.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"thing\.model is neither a SentencePiece model nor a tokenizer\.json"):
        load_tokenizer(path)


def test_truncated_model(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "short.model"
    path.write_bytes(trained.path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"short\.model"):
        load_tokenizer(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*absent\.model"):
        load_tokenizer(tmp_path / "absent.model")


def test_dataset_knows_its_tokenizer(trained: Tokenizer, hugging_face: Tokenizer, tmp_path: Path) -> None:
    for source in (trained, hugging_face):
        folder = tmp_path / source.sha256
        folder.mkdir()
        entry = source.entry("own")
        write_index(folder, DatasetIndex(entry, "uint16", {"train": ()}))
        with pytest.raises(DataError, match=r"own is missing"):
            tokenizer_from_dataset(folder)
        (folder / "own").write_bytes(source.path.read_bytes())
        loaded = tokenizer_from_dataset(folder)
        assert loaded.entry("own") == entry
        assert loaded.encode_batch(["for x"])[0].tolist() == source.encode_batch(["for x"])[0].tolist()
        (folder / "own").write_bytes(source.path.read_bytes() + b" ")
        with pytest.raises(DataError, match=r"own is not the tokenizer that made this dataset"):
            tokenizer_from_dataset(folder)
