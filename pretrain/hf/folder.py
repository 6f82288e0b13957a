"""Folders in the published DeepSeek-V3 layout, the one that transformers loads: written from our parameters and read
back to them.

Tensors pass through one at a time, so that no more than one shard and one layer of a model is ever in memory. A folder
is written complete or not at all. Only safetensors are read: nothing is unpickled.
"""

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.transformer import Transformer
from pretrain.hf.config import HFError, Precision, fp8_block, hf_config, model_config_from_hf, read_int
from pretrain.hf.layout import BIAS_SUFFIX, SCALE_SUFFIX, dequantize, encode, hf_copies, hf_names, to_hf
from pretrain.hf.tokenizer import TOKENIZER_FILES, write_tokenizer

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

FP8 = "F8_E4M3"

_MAX_JSON_BYTES = 64 << 20
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, FP8: torch.float32}


@dataclass(frozen=True)
class ImportedModel:
    """A folder's content. `tensors` yields our parameters and router biases by name, read as they are asked for: fp32
    and bf16 as stored, FP8 dequantised to fp32. `notes` says what the user should know."""

    config: ModelConfig
    tensors: Iterator[tuple[str, Tensor]]
    max_position_embeddings: int
    eos_token_id: int | None
    tokenizer_file: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """One tensor of a folder: where it lies, and its shape and safetensors dtype."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def export_folder(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    out: Path,
    *,
    dtype: Precision | None,
    max_position_embeddings: int,
    eos_token_id: int | None,
    tokenizer_file: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Writes `out` from our parameters and router biases by name, in any order, and returns notes for the user.

    With dtype None every tensor keeps its own. Raises HFError if `out` holds anything, if a tensor is missing, unknown
    or of the wrong shape, or if the layout cannot express the model.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HFError(f"{out} exists and is not an empty folder; name a new one")
    content = hf_config(
        config, max_position_embeddings=max_position_embeddings, eos_token_id=eos_token_id, dtype=dtype or "fp32"
    )
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        if tokenizer_file is not None:
            write_tokenizer(tokenizer_file, partial, eos_token_id=eos_token_id, max_length=max_position_embeddings)
        content["torch_dtype"] = _write_weights(config, tensors, partial, dtype, shard_bytes)
        _write_json(partial / "config.json", content)
        _write_json(partial / "generation_config.json", {"eos_token_id": eos_token_id})
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        os.rename(partial, out)
        _sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise HFError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _eps_notes(config)


def import_folder(folder: Path) -> ImportedModel:
    """Opens a folder and checks config.json and the name, shape and dtype of every tensor before any is read.

    Raises HFError naming the file and the key or tensor that is wrong.
    """
    content = _read_json(folder / "config.json")
    config = model_config_from_hf(content)
    entries = _find_entries(folder)
    notes = _eps_notes(config)
    mtp = tuple(f"model.layers.{index}." for index in range(config.num_hidden_layers, config.num_layers))
    if mtp and not any(name.startswith(mtp) for name in entries):
        notes += (
            f"config.json announces num_nextn_predict_layers = {config.num_nextn_predict_layers}, but the folder holds "
            "no such layer (transformers does not save them); imported without multi-token prediction",
        )
        config = replace(config, num_nextn_predict_layers=0)
    block = fp8_block(content)
    shapes = _our_shapes(config)
    _check_entries(config, entries, shapes, block)
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return ImportedModel(
        config=config,
        tensors=_read_tensors(config, entries, shapes, block),
        max_position_embeddings=read_int(content, "max_position_embeddings"),
        eos_token_id=None if content.get("eos_token_id") is None else read_int(content, "eos_token_id"),
        tokenizer_file=files[0] if files else None,
        notes=notes,
    )


def _our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and router bias of the model."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Transformer(config).state_dict().items()}


def _eps_notes(config: ModelConfig) -> tuple[str, ...]:
    if config.rms_norm_eps == 1e-6:
        return ()
    return (
        f"rms_norm_eps = {config.rms_norm_eps}: the published code and transformers use 1e-06 in the norms of the "
        "latents whatever this key says, this model uses it everywhere; results differ slightly",
    )


class _ShardWriter:
    """Gathers tensors into files of about `shard_bytes`; how many there are is known only at the end."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.waiting: dict[str, Tensor] = {}
        self.waiting_bytes = 0
        self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor, writing out those before it if it would not fit beside them."""
        if self.waiting and self.waiting_bytes + tensor.nbytes > self.shard_bytes:
            self._write()
        self.waiting[name] = tensor.detach().to("cpu").contiguous()
        self.waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        """Writes the last shard, gives all of them their names and, if there are several, writes the index."""
        self._write()
        count = len(self.shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
        for number, name in enumerate(names):
            os.rename(self._temporary(number), self.folder / name)
        if count > 1:
            places = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(places.items()))}
            _write_json(self.folder / INDEX, index)

    def _write(self) -> None:
        save_file(self.waiting, self._temporary(len(self.shards)), metadata={"format": "pt"})
        self.shards.append(list(self.waiting))
        self.total_bytes += self.waiting_bytes
        self.waiting, self.waiting_bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self.folder / f"shard-{number}"


def _write_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    dtype: Precision | None,
    shard_bytes: int,
) -> str:
    """Writes the safetensors files; returns the dtype of the embedding, which config.json states for the model."""
    shapes = _our_shapes(config)
    writer = _ShardWriter(folder, shard_bytes)
    embedding_dtype = ""
    for name, tensor in tensors:
        if (shape := shapes.pop(name, None)) != tuple(tensor.shape):
            rule = "is unknown or came twice" if shape is None else f"belongs with shape {list(shape)}"
            raise HFError(f"cannot export tensor {name} of shape {list(tensor.shape)}: it {rule}")
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise HFError(f"cannot export tensor {name} of {tensor.dtype}: it must be in float32 or bfloat16")
        for published, part in to_hf(config, name, tensor.detach()):
            for stored_name, stored in encode(published, part, dtype):
                writer.add(stored_name, stored)
                if stored_name == "model.embed_tokens.weight":
                    embedding_dtype = str(stored.dtype).removeprefix("torch.")
    if shapes:
        raise HFError(f"cannot export: tensor {_first_of(shapes)} is missing")
    writer.finish()
    return embedding_dtype


def _find_entries(folder: Path) -> dict[str, _Entry]:
    """All tensors of a folder, from the headers of its files."""
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        has_pickles = folder.is_dir() and any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir())
        remedy = "; pickled weights are never read, convert them to safetensors" if has_pickles else ""
        raise HFError(f"{folder} holds neither {SINGLE} nor {INDEX}{remedy}")
    places = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise HFError(f"{folder / INDEX}: weight_map must map the names of tensors to files; it is damaged")
    entries: dict[str, _Entry] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise HFError(f"{folder / INDEX} names {file!r}, which is not a safetensors file of its own folder")
        if not (folder / file).is_file():
            raise HFError(f"{folder / INDEX} names {file}, which is missing; copy it again")
        entries |= _read_header(folder / file)
    for name in places.keys() | entries.keys():
        claimed, found = places.get(name), entries[name].path.name if name in entries else None
        if claimed != found:
            raise HFError(f"{folder / INDEX} has tensor {name} in {claimed or 'no file'}, it is in {found or 'none'}")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    entries = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                entries[name] = _Entry(path, tuple(view.get_shape()), view.get_dtype())
    except (SafetensorError, OSError) as error:
        raise HFError(f"{path} is damaged ({error}); copy it again") from error
    return entries


def _check_entries(
    config: ModelConfig,
    entries: Mapping[str, _Entry],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, int] | None,
) -> None:
    """Every tensor that the model needs is there in its shape and a dtype that can be read, and no other."""
    expected: set[str] = set()
    for name, shape in shapes.items():
        copies = [copy for copy in hf_copies(config, name) if copy in entries]
        parts = hf_names(config, name)
        rows = shape if len(shape) == 1 else (math.prod(shape[:-1]) // len(parts), shape[-1])
        for part in parts + copies:
            expected.add(part)
            _check_entry(entries, part, rows)
            if entries[part].dtype == FP8:
                expected.add(part + SCALE_SUFFIX)
                _check_scale(entries, part, block)
    if unexpected := entries.keys() - expected:
        raise HFError(f"unexpected tensor {_first_of(unexpected)}: the model of config.json has none of that name")


def _check_entry(entries: Mapping[str, _Entry], name: str, shape: tuple[int, ...]) -> None:
    if name not in entries:
        raise HFError(f"tensor {name} is missing; copy the folder again, or correct the sizes in config.json")
    entry = entries[name]
    if entry.shape != shape:
        raise HFError(
            f"tensor {name} in {entry.path.name} has shape {list(entry.shape)}, config.json asks for {list(shape)}"
        )
    if entry.dtype not in _STORED or (entry.dtype == FP8 and len(shape) != 2):
        raise HFError(
            f"tensor {name} in {entry.path.name} has dtype {entry.dtype}; only {', '.join(_STORED)} can be imported, "
            f"and {FP8} only for matrices"
        )


def _check_scale(entries: Mapping[str, _Entry], name: str, block: tuple[int, int] | None) -> None:
    if block is None:
        raise HFError(f"tensor {name} is in {FP8}, but config.json has no quantization_config to say how to read it")
    rows, columns = entries[name].shape
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scale = entries.get(name + SCALE_SUFFIX)
    if scale is None:
        raise HFError(f"tensor {name + SCALE_SUFFIX} is missing, the scales of an {FP8} tensor; copy the folder again")
    if (scale.shape, scale.dtype) != (shape, "F32"):
        raise HFError(
            f"tensor {name + SCALE_SUFFIX} is {scale.dtype} {list(scale.shape)}; it must be F32 {list(shape)}, one "
            f"for each block of {block[0]} x {block[1]}"
        )


def _read_tensors(
    config: ModelConfig,
    entries: Mapping[str, _Entry],
    shapes: Mapping[str, tuple[int, ...]],
    block: tuple[int, int] | None,
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one after another, put together from entries that were checked."""
    with ExitStack() as stack:
        paths = {entry.path for entry in entries.values()}
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}

        def read(name: str) -> Tensor:
            tensor = files[entries[name].path].get_tensor(name)
            if entries[name].dtype != FP8:
                return tensor
            assert block is not None
            return dequantize(tensor, files[entries[name + SCALE_SUFFIX].path].get_tensor(name + SCALE_SUFFIX), block)

        for name, shape in shapes.items():
            parts = hf_names(config, name)
            dtype = reduce(torch.promote_types, (_STORED[entries[part].dtype] for part in parts))
            tensor = torch.empty(shape, dtype=torch.float32 if name.endswith(BIAS_SUFFIX) else dtype)
            rows = tensor.flatten(0, -2) if len(shape) > 1 else tensor
            for part, into in zip(parts, rows.chunk(len(parts)), strict=True):
                into.copy_(read(part))
            for copy in hf_copies(config, name):
                if copy in entries and not torch.equal(read(copy).to(dtype), tensor):
                    raise HFError(f"tensor {copy} differs from {parts[0]}, but prediction depths share it")
            yield name, tensor


def _first_of(names: Collection[str]) -> str:
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{min(names)}{others}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise HFError(f"{path} is missing; name a folder with config.json and safetensors files")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise HFError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; it is damaged")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HFError(f"{path} is damaged ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise HFError(f"{path} must hold a JSON object; it is damaged")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
