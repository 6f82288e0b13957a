"""Tokenizers: text to token ids and back, one interface over SentencePiece models and Hugging Face `tokenizer.json`.

Two promises matter for pretraining on code. A tokenizer trained here gives every text back exactly: tabs, runs of
spaces, any Unicode. And text can never produce a special token, so a file that spells `<|eos|>` does not end its
document; a tokenizer that cannot promise this is refused.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.shards import TokenizerEntry, file_sha256, read_index, write_atomically

EOS = "<|eos|>"
FIM = ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")
_USUAL_EOS = (EOS, "<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>")
# In the order prefix, suffix, middle: begin stands before the prefix, hole before the suffix, end before the middle.
_USUAL_FIM = (
    FIM,
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
)
TokenIds = npt.NDArray[np.int32]
_PIECE_CHARACTERS = 1 << 14
# SentencePiece writes a space as this character, so a real one has to go through its bytes.
_SPACE_SIGN = "\u2581"


@dataclass(frozen=True)
class SpecialNames:
    """How a tokenizer spells its special tokens; an empty name means: try the usual ones."""

    eos: str = ""
    fim_begin: str = ""
    fim_hole: str = ""
    fim_end: str = ""


class Backend(Protocol):
    """What a tokenizer library has to offer."""

    vocab_size: int

    def special_id(self, name: str) -> int | None:
        """The id of a token that is kept apart from text, or None when there is none of that name."""

    def spelling(self, token: int) -> str:
        """The name of a token."""

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of every text, no special tokens added."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and its special tokens. The `fim_*` ids are -1 when it has none. Made by `load_tokenizer`."""

    path: Path
    sha256: str
    backend: Backend
    vocab_size: int
    eos: int
    fim_begin: int = -1
    fim_hole: int = -1
    fim_end: int = -1

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids [T] of every text, no special tokens added."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.backend.decode([int(token) for token in ids])

    def entry(self, file: str) -> TokenizerEntry:
        """How the index of a dataset describes this tokenizer, kept there under the name `file`."""
        ids = (self.eos, self.fim_begin, self.fim_hole, self.fim_end)
        return TokenizerEntry(file, self.sha256, self.vocab_size, *ids)


def load_tokenizer(path: Path, names: SpecialNames = SpecialNames()) -> Tokenizer:
    """Loads a SentencePiece model or a `tokenizer.json`, told apart by content.

    Raises DataError when the file is missing or damaged, has no end-of-document token, lacks a token that `names` asks
    for, or when text could produce one of the special tokens.
    """
    fim_names = (names.fim_begin, names.fim_hole, names.fim_end)
    backend, sha256 = _open_backend(path, {names.eos, *fim_names, *_USUAL_EOS, *chain.from_iterable(_USUAL_FIM)})
    eos = _find_eos(path, backend, names.eos)
    fim = _find_fim(path, backend, fim_names)
    _check_apart_from_text(path, backend, [eos, *(token for token in fim if token >= 0)])
    return Tokenizer(path, sha256, backend, backend.vocab_size, eos, *fim)


def tokenizer_from_dataset(folder: Path) -> Tokenizer:
    """The tokenizer that made a dataset, from its folder. Raises DataError when it is missing or another one."""
    return tokenizer_from_entry(folder, read_index(folder).tokenizer)


def tokenizer_from_entry(folder: Path, entry: TokenizerEntry) -> Tokenizer:
    """As `tokenizer_from_dataset`, when the index is already at hand."""
    path = folder / entry.file
    if not path.is_file():
        raise DataError(f"tokenizer {path} is missing; copy it again, or prepare the dataset again")
    sha256 = file_sha256(path)
    if sha256 != entry.sha256:
        raise DataError(
            f"{path} is not the tokenizer that made this dataset: its sha256 is {sha256[:16]}…, the index says "
            f"{entry.sha256[:16]}…; copy the right file there, or prepare the dataset again"
        )
    ids = (entry.eos, entry.fim_begin, entry.fim_hole, entry.fim_end)
    backend, _ = _open_backend(path, set(ids))
    if backend.vocab_size != entry.vocab_size:
        raise DataError(f"{path} has {backend.vocab_size} tokens, the index says {entry.vocab_size}; prepare again")
    return Tokenizer(path, sha256, backend, entry.vocab_size, *ids)


def train_sentencepiece(texts: Iterable[str], path: Path, vocab_size: int) -> Tokenizer:
    """Trains a BPE with byte fallback and writes it to `path`. The same texts give the same file, in any order.

    Raises DataError when the texts are too few, or `vocab_size` too small, for such a vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    pieces = chain.from_iterable(_cut(text) for text in sorted(texts))
    try:
        sentencepiece.SentencePieceTrainer.train(
            # A real space sign would be counted as a space.
            sentence_iterator=(piece.replace(_SPACE_SIGN, "") for piece in pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _PIECE_CHARACTERS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOS,
            control_symbols=list(FIM),
            num_threads=1,
            minloglevel=4,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(
            f"cannot train a tokenizer of {vocab_size} tokens on this text ({_last_sentence(error)}); "
            "choose another --train-tokenizer size, or give more text"
        ) from error
    write_atomically(path, model.getvalue())
    return load_tokenizer(path)


class _SentencePiece:
    """A SentencePiece model. Long texts are cut at line ends: its time and memory grow faster than the text."""

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()
        space_sign = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SIGN.encode()]
        self._space_sign = np.array(space_sign, np.int32)
        has_bytes = all(self._processor.is_byte(token) for token in space_sign)
        # A model that adds or drops spaces at the ends of a text would do so at the ends of every piece.
        keeps_ends = all("".join(self._processor.encode_as_pieces(text)) == text for text in ("a", f"{_SPACE_SIGN}a"))
        self._can_cut = has_bytes and keeps_ends

    def special_id(self, name: str) -> int | None:
        token = self._processor.piece_to_id(name)
        return token if self._processor.is_control(token) and self.spelling(token) == name else None

    def spelling(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        if not self._can_cut:
            return self._encode(list(texts))
        pieces: list[str] = []
        ends = []
        for text in texts:
            for piece in _cut(text):
                pieces.extend(re.split(f"({_SPACE_SIGN})", piece) if _SPACE_SIGN in piece else (piece,))
            ends.append(len(pieces))
        ids = self._encode(pieces)
        for number, piece in enumerate(pieces):
            if piece == _SPACE_SIGN:
                ids[number] = self._space_sign
        return [np.concatenate(ids[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _encode(self, texts: list[str]) -> list[TokenIds]:
        return self._processor.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class _HuggingFace:
    """A `tokenizer.json`. `reserved` are the names or ids of added tokens that text must not produce."""

    def __init__(self, content: bytes, reserved: Set[str | int]) -> None:
        import tokenizers

        description: dict[str, Any] = json.loads(content)
        self._added: dict[str, int] = {}
        for token in description["added_tokens"]:
            # Added tokens that are not marked special are always looked for in text.
            token["special"] = token["special"] or token["content"] in reserved or token["id"] in reserved
            self._added[str(token["content"])] = int(token["id"])
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def special_id(self, name: str) -> int | None:
        return self._added.get(name)

    def spelling(self, token: int) -> str:
        return str(self._tokenizer.id_to_token(token))

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _open_backend(path: Path, reserved: Set[str | int]) -> tuple[Backend, str]:
    if not path.is_file():
        raise DataError(f"no tokenizer at {path}; give a SentencePiece .model or a Hugging Face tokenizer.json")
    content = path.read_bytes()
    is_json = content.lstrip()[:1] == b"{"
    try:
        backend = _HuggingFace(content, reserved) if is_json else _SentencePiece(content)
        return backend, hashlib.sha256(content).hexdigest()
    # `tokenizers` raises bare Exceptions.
    except Exception as error:
        raise DataError(
            f"{path} is neither a SentencePiece model nor a tokenizer.json, or it is damaged "
            f"({_last_sentence(error)}); copy it again"
        ) from error


def _find_eos(path: Path, backend: Backend, name: str) -> int:
    for candidate in (name,) if name else _USUAL_EOS:
        token = backend.special_id(candidate)
        if token is not None:
            return token
    tried = repr(name) if name else "any of " + ", ".join(_USUAL_EOS)
    raise DataError(f"{path} has no special token {tried}; name its end-of-document token with --eos")


def _find_fim(path: Path, backend: Backend, names: tuple[str, str, str]) -> tuple[int, int, int]:
    for begin, hole, end in (names,) if any(names) else _USUAL_FIM:
        ids = backend.special_id(begin), backend.special_id(hole), backend.special_id(end)
        if ids[0] is not None and ids[1] is not None and ids[2] is not None:
            return ids[0], ids[1], ids[2]
    if any(names):
        missing = ", ".join(repr(name) for name in names if backend.special_id(name) is None)
        raise DataError(
            f"{path} has no special token {missing}; give all of --fim-begin, --fim-hole, --fim-end, or none"
        )
    return -1, -1, -1


def _check_apart_from_text(path: Path, backend: Backend, special: list[int]) -> None:
    for token in special:
        name = backend.spelling(token)
        for ids in backend.encode_batch([name, f"a{name}b", f" {name} "]):
            if token in ids:
                raise DataError(
                    f"{path} turns the text {name!r} into the special token {token}, so a document could end or split "
                    "itself; mark that token special (SentencePiece: a control symbol), or choose another"
                )


def _cut(text: str) -> Iterator[str]:
    """Pieces of at most `_PIECE_CHARACTERS`, cut after a line end where there is one."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or limit
        yield text[start:end]
        start = end
    yield text[start:]


def _last_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # SentencePiece puts "INTERNAL: file(line) [condition]" before the sentence for people.
    return lines[-1].rpartition("] ")[2].strip()
