"""transformers loads the tokenizers of exported folders as they are."""

import json
from pathlib import Path

import pytest
import torch
from hf_support import (
    export,
    random_config,
    random_model,
)

from pretrain.hf.folder import HFError, import_folder

torch.set_num_threads(1)

TEXTS = ["def f(x):\n    return x  # twice\n\n\n\tq", "  leading", "naïve 🙂 世界\r\n", "1234567", "<unk>", ""]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(json.__file__).read_text().splitlines(keepends=False)),
        model_prefix=str(prefix), vocab_size=500, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, eos_piece="<|eos|>", num_threads=1,
        control_symbols=["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"],
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_transformers_loads_the_sentencepiece_model(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    folder = export(random_model(random_config(0)), tmp_path / "out", tokenizer_file=sentencepiece_file, eos_token_id=1)
    theirs = AutoTokenizer.from_pretrained(folder)
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    for text in TEXTS[:4]:
        assert theirs.encode(text) == original.encode(text)
        assert theirs.decode(original.encode(text)) == text
    assert (theirs.eos_token_id, theirs.eos_token, len(theirs)) == (1, "<|eos|>", 500)
    imported = import_folder(folder)
    assert imported.tokenizer_file.read_bytes() == sentencepiece_file.read_bytes()


def test_transformers_loads_a_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer

    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|eos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    original.train_from_iterator([Path(json.__file__).read_text()], trainer)
    original.save(str(tmp_path / "any.json"))
    folder = export(
        random_model(random_config(0)), tmp_path / "out", tokenizer_file=tmp_path / "any.json", eos_token_id=0
    )
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs.encode(text) == original.encode(text).ids
        assert theirs.decode(original.encode(text).ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|eos|>", 0)
    assert import_folder(folder).tokenizer_file == folder / "tokenizer.json"


def test_export_refuses_a_wrong_tokenizer(sentencepiece_file: Path, tmp_path: Path) -> None:
    model = random_model(random_config(0))
    with pytest.raises(HFError, match=r"has no token 500, the end of document"):
        export(model, tmp_path / "out", tokenizer_file=sentencepiece_file, eos_token_id=500)
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(HFError, match=rf"tokenizer .*{name} cannot be read"):
            export(model, tmp_path / "out", tokenizer_file=tmp_path / name, eos_token_id=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "broken.model"]
