"""The tokenizer of an exported folder."""

import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def write_tokenizer(source: Path, folder: Path, *, eos_token_id: int | None, max_length: int) -> tuple[str, ...]:
    """Copies the tokenizer."""
    shutil.copyfile(source, folder / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))
    return ()
