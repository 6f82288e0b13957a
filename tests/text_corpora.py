"""Small corpora and tokenizers for tests of the writing side of `data`."""

import random
from pathlib import Path

import numpy as np

from data.prepare import Prepared, PrepareOptions, prepare
from data.shards import open_shard, read_index
from data.tokenizer import Tokenizer, tokenizer_from_dataset, train_sentencepiece

WORDS = ("def", "return", "self", "import", "class", "value", "index", "token", "for", "while", "None", "lambda")
SPECIALS = ("<|eos|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>")


def code_like(seed: int, num_lines: int) -> str:
    """Text with indentation, tabs, digits and some characters outside ASCII."""
    draw = random.Random(seed)
    lines = []
    for number in range(num_lines):
        words = " ".join(draw.choices(WORDS, k=draw.randint(1, 8)))
        lines.append(f"{draw.choice(['', '    ', '        ', chr(9)])}{words} = {draw.randint(0, 9999)}  # {number} é")
    return "\n".join(lines) + "\n"


def make_tokenizer(path: Path, vocab_size: int = 400) -> Tokenizer:
    """A SentencePiece tokenizer trained on `code_like` text."""
    return train_sentencepiece([code_like(seed, 200) for seed in range(3)], path, vocab_size)


def make_hugging_face(path: Path, *, marked_special: bool = True, names: tuple[str, ...] = SPECIALS) -> Path:
    """A byte-level BPE `tokenizer.json` with the given special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([code_like(seed, 200) for seed in range(3)], trainer)
    tokenizer.add_tokens([AddedToken(name, special=marked_special, normalized=False) for name in names])
    tokenizer.save(str(path))
    return path


def make_files(folder: Path, count: int, num_lines: int = 30) -> Path:
    """A folder of `count` source files, some of them in folders of their own."""
    for number in range(count):
        path = folder / (f"part{number % 3}" if number % 2 else "") / f"file{number:03d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code_like(number, 1 + number % num_lines))
    return folder


def prepare_simply(source: str | Path, out: Path, tokenizer: Path, processes: int = 1) -> Prepared:
    """`prepare` with default options and a given tokenizer."""
    options = PrepareOptions(sources=(str(source),), out=out, tokenizer=tokenizer, processes=processes)
    return prepare(options)


def texts_of(folder: Path, split: str = "train") -> list[str]:
    """The decoded documents of a split, in order."""
    index = read_index(folder)
    tokenizer = tokenizer_from_dataset(folder)
    texts = []
    for entry in index.splits[split]:
        shard = open_shard(folder, entry, index.dtype)
        for document in np.split(shard.tokens, shard.ends[:-1].astype(np.int64)):
            assert document[-1] == tokenizer.eos
            texts.append(tokenizer.decode(document[:-1]))
    return texts


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
