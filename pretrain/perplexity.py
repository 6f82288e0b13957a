"""`pretrain eval`: the loss of a checkpoint on held-out documents, beside what counting words would reach."""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data.dataset import open_dataset
from data.ngram import ngram_entropies
from parallel.launch import Place
from pretrain.evaluate import HeldOut, open_samples
from pretrain.weights import open_weights


def print_perplexity(
    checkpoint: Path,
    place: Place,
    *,
    folders: list[Path],
    baselines: bool,
    limit: int | None,
    micro_batch_size: int,
) -> None:
    """Scores the held-out split of each dataset and prints a table; `baselines` adds n-gram models of its training
    tokens, scored on the same held-out tokens."""
    weights = open_weights(checkpoint)
    model = weights.build(place.device, torch.bfloat16 if place.device.type == "cuda" else torch.float32)
    for folder in folders:
        samples = open_samples(
            folder, weights.config, seq_len=weights.context_length, limit=limit, cross_document_attention=True
        )
        loss = HeldOut((samples,)).loss(model, place, micro_batch_size)
        rows = [(f"{weights.reader.folder.name}", loss)]
        if baselines:
            train = open_dataset(folder, "train", vocab_size=weights.config.vocab_size)
            entropies = ngram_entropies(train, samples)
            rows += [("interpolated bigram", entropies.bigram), ("unigram", entropies.unigram)]
        _print_table(folder, len(samples) * weights.context_length, rows)
        if baselines:
            print(_verdict(loss, best_count=min(entropies.bigram, entropies.unigram)))


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
