"""The tokenizer of a Hugging Face folder: the file itself, and the little that transformers must know beside it.

transformers 5 reads a SentencePiece model as well as a tokenizer.json, so neither is converted.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pretrain.hf.config import HFError

SENTENCEPIECE = "tokenizer.model"
TOKENIZERS = "tokenizer.json"
TOKENIZER_FILES = (SENTENCEPIECE, TOKENIZERS)


def write_tokenizer(source: Path, folder: Path, *, eos_token_id: int | None, max_length: int) -> None:
    """Copies a SentencePiece model or a tokenizer.json and writes tokenizer_config.json for it.

    Raises HFError if the file cannot be read or has no token `eos_token_id`.
    """
    is_json = source.suffix == ".json"
    read = _tokens_of_json if is_json else _tokens_of_sentencepiece
    try:
        tokens = read(source, eos_token_id)
    except Exception as error:  # both libraries raise bare exceptions of their own
        raise HFError(
            f"tokenizer {source} cannot be read ({error}); name the file the tokens were made with"
        ) from error
    if eos_token_id is not None and tokens["eos_token"] is None:
        raise HFError(f"tokenizer {source} has no token {eos_token_id}, the end of document; it is another tokenizer")
    shutil.copyfile(source, folder / (TOKENIZERS if is_json else SENTENCEPIECE))
    content = tokens | {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _tokens_of_json(source: Path, eos_token_id: int | None) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source))
    eos = None if eos_token_id is None else tokenizer.id_to_token(eos_token_id)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}


def _tokens_of_sentencepiece(source: Path, eos_token_id: int | None) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(source))
    eos = None
    if eos_token_id is not None and eos_token_id < tokenizer.get_piece_size():
        eos = tokenizer.id_to_piece(eos_token_id)
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": False,
        "eos_token": eos,
        "unk_token": tokenizer.id_to_piece(tokenizer.unk_id()),
    }
