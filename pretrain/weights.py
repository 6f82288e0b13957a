"""Weights outside of training: a checkpoint as one model on one device, and checkpoints made from other weights."""

import dataclasses
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from data.config import DataConfig
from data.shards import TokenizerEntry
from data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_entry
from model.config import ModelConfig
from model.router import BIAS_NAME
from model.transformer import Transformer
from pretrain.checkpoints.checkpoint import CheckpointReader, CheckpointWriter, FileEntry, list_checkpoints
from pretrain.config import dump_toml
from pretrain.errors import UserError
from pretrain.hf.tokenizer import TOKENIZER_FILES

_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Weights:
    """A checkpoint to read weights from. `context_length` is the sequence length it was trained at, and
    `cross_document_attention` whether documents that share a sequence saw each other then. `kind` is "param", or "ema"
    for the averages of the weights."""

    reader: CheckpointReader
    config: ModelConfig
    context_length: int
    cross_document_attention: bool
    kind: str = "param"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter and router bias by name, one at a time, as stored."""
        for name in self.reader.manifest.shapes:
            yield name, self.reader.parameter(name, self.kind)
        for name in self.reader.keys("buffer"):
            bias = self.reader.tensor(f"buffer/{name}")
            assert bias is not None
            yield name, bias

    def build(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        """The model, for inference."""
        model = Transformer(self.config)
        for name, tensor in self.tensors():
            if name.endswith(BIAS_NAME):
                model.get_buffer(name).copy_(tensor)
            else:
                model.get_parameter(name).data = tensor.to(device, dtype)
        return model.to(device).eval()

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that lies in the checkpoint, if any."""
        names = [name for name in self.reader.manifest.files if name in TOKENIZER_FILES]
        return self.reader.folder / names[0] if names else None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training data."""
        entry = self.reader.manifest.state.get("tokenizer")
        if entry is not None:
            return tokenizer_from_entry(self.reader.folder, TypeAdapter(TokenizerEntry).validate_python(entry))
        if self.tokenizer_file is None:
            raise UserError(
                f"checkpoint {self.reader.folder} holds no tokenizer: its weights were imported without one"
            )
        return load_tokenizer(self.tokenizer_file)

    @property
    def eos(self) -> int | None:
        """Id of the end-of-document token, where known."""
        entry = self.reader.manifest.state.get("tokenizer")
        return int(entry["eos"]) if entry else self.reader.manifest.state.get("eos")


def open_weights(checkpoint: Path, *, averaged: bool = False) -> Weights:
    """Opens a checkpoint of any layout, or the newest of a run's folder, checksums verified: its weights, or their
    averages. Raises UserError for a damaged one, or one without averages."""
    of_run = list_checkpoints(checkpoint)
    reader = CheckpointReader(of_run[-1] if of_run else checkpoint)
    reader.verify()
    if averaged and not reader.keys("ema"):
        raise UserError(f"checkpoint {reader.folder} holds no averages of the weights; its run had checkpoint.ema = 0")
    try:
        tables = tomllib.loads(reader.text("config.toml"))
        config = TypeAdapter(ModelConfig).validate_python(tables["model"])
        # Imported weights have no [data]; the published models saw across documents.
        data = TypeAdapter(DataConfig).validate_python(tables["data"]) if "data" in tables else None
    except (tomllib.TOMLDecodeError, KeyError, ValidationError) as error:
        raise UserError(f"checkpoint {checkpoint} is damaged: config.toml: {error}") from None
    return Weights(
        reader,
        config,
        int(reader.manifest.state["context_length"]),
        data.cross_document_attention if data is not None else True,
        "ema" if averaged else "param",
    )


def write_weights(
    out: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    context_length: int,
    eos: int | None,
    tokenizer_file: Path | None,
) -> None:
    """Writes a checkpoint of weights alone, in files of a few gigabytes. Raises UserError if `out` exists or cannot be
    written, and leaves nothing behind then."""
    writer = CheckpointWriter(out, alone=True)
    try:
        if out.exists():
            raise UserError(f"{out} exists; name a new folder")
        writer.begin()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    try:
        files, shapes = _write_tensors(writer, tensors)
        texts = {"config.toml": dump_toml({"model": dataclasses.asdict(config)}).encode()}
        if tokenizer_file is not None:
            texts[tokenizer_file.name] = tokenizer_file.read_bytes()
        state = {"context_length": context_length, "eos": eos}
        writer.commit(files=files, shapes=shapes, state=state, texts=texts)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        writer.discard()


def _write_tensors(
    writer: CheckpointWriter, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, FileEntry], dict[str, tuple[int, ...]]]:
    """Writes all tensors; returns the entries of the files and the shapes of the parameters."""
    files: dict[str, FileEntry] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    pending: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name.endswith(BIAS_NAME):
            pending[f"buffer/{name}@0"] = tensor
        else:
            pending[f"param/{name}@0"] = tensor.flatten()
            shapes[name] = tuple(tensor.shape)
        if sum(waiting.nbytes for waiting in pending.values()) > _FILE_BYTES:
            files |= writer.write_tensors(len(files), pending)
            pending = {}
    return files | writer.write_tensors(len(files), pending), shapes
