"""`pretrain eval`: the loss of a checkpoint on held-out documents, beside what counting words would reach."""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data.dataset import open_dataset
from data.ngram import ngram_entropies
from model.config import ModelConfig
from parallel.build import build_executor
from parallel.config import ParallelConfig
from parallel.launch import Place
from parallel.mesh import MeshShape, make_mesh
from pretrain.errors import UserError
from pretrain.evaluate import HeldOut, open_samples
from pretrain.weights import open_weights


def print_perplexity(
    checkpoint: Path,
    place: Place,
    *,
    folders: list[Path],
    baselines: bool,
    limit: int | None,
    seq_len: int | None,
    micro_batch_size: int,
) -> None:
    """Scores the held-out split of each dataset, in sequences of the checkpoint's context length or of `seq_len`, and
    prints a table; `baselines` adds n-gram models of its training tokens, scored on the same held-out tokens."""
    weights = open_weights(checkpoint)
    seq_len = weights.context_length if seq_len is None else seq_len
    model = weights.build(place.device, torch.bfloat16 if place.device.type == "cuda" else torch.float32)
    mesh = make_mesh(MeshShape(world_size=place.world_size))
    executor = build_executor(model, ParallelConfig(), mesh, defers=False)
    for folder in folders:
        _check_length(folder, weights.config, seq_len)
        samples = open_samples(
            folder,
            weights.config,
            seq_len=seq_len,
            limit=limit,
            cross_document_attention=weights.cross_document_attention,
        )
        loss = HeldOut((samples,)).loss(executor, place, micro_batch_size)
        rows = [(f"{weights.reader.folder.name}", loss)]
        if baselines:
            train = open_dataset(folder, "train", vocab_size=weights.config.vocab_size)
            entropies = ngram_entropies(train, samples)
            rows += [("interpolated bigram", entropies.bigram), ("unigram", entropies.unigram)]
        _print_table(folder, len(samples) * seq_len, rows)
        if baselines:
            print(_verdict(loss, best_count=min(entropies.bigram, entropies.unigram)))


def _check_length(folder: Path, model: ModelConfig, seq_len: int) -> None:
    """Raises UserError where no sequence of that length can be scored."""
    depth = model.num_nextn_predict_layers
    longest = open_dataset(folder, "validation", vocab_size=model.vocab_size).num_tokens - 1 - depth
    if not depth < seq_len <= longest:
        raise UserError(
            f"sequences of {seq_len} tokens cannot be scored on {folder}: its held-out documents and the model allow "
            f"{depth + 1} to {longest}; choose with --seq-len, or prepare the dataset with a larger split"
        )


def _verdict(loss: float, *, best_count: float) -> str:
    if loss < best_count:
        return f"The model is {best_count - loss:.2f} nats a token better than counting."
    return f"The model is {loss - best_count:.2f} nats a token worse than counting: it learned nothing from context."


def _print_table(folder: Path, num_tokens: int, rows: list[tuple[str, float]]) -> None:
    table = Table(title=f"{num_tokens:,} held-out tokens of {folder}", title_justify="left")
    for heading in ("model", "nats per token", "perplexity"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, loss in rows:
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):,.1f}")
    Console().print(table)
