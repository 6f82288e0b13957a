"""Loss on held-out documents: each token once, the same number on any count of processes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import open_dataset
from data.stream import ValidationSamples
from model.config import ModelConfig
from parallel.chunk import MicroBatch
from parallel.executor import Executor
from parallel.launch import Place, sum_over_processes
from pretrain.config import Config


@dataclass(frozen=True)
class HeldOut:
    """The held-out samples of every dataset; they count alike, whatever the weights of the mixture."""

    parts: tuple[ValidationSamples, ...]

    @property
    def num_samples(self) -> int:
        """Samples of all datasets together."""
        return sum(len(part) for part in self.parts)

    def loss(self, executor: Executor, place: Place, micro_batch_size: int) -> float:
        """Mean of −log p in nats a token, each data rank scoring its share. All processes must call it."""
        shape = executor.mesh.shape
        counts_here = shape.pp_rank(place.rank) == 0
        sums = torch.zeros(2, dtype=torch.float64, device=place.device)
        for part in self.parts:
            for first in range(0, len(part), shape.dp * micro_batch_size):
                start = first + shape.dp_rank(place.rank) * micro_batch_size
                count = max(0, min(micro_batch_size, len(part) - start))
                # Ranks for which nothing is left keep the others company, whose experts they hold.
                samples = part.read(start, count) if count else part.read(0, 1)
                tokens = torch.from_numpy(samples.tokens).to(place.device).long()
                documents = None if samples.documents is None else torch.from_numpy(samples.documents).to(place.device)
                loss = executor.evaluate([MicroBatch(tokens, documents)]).losses[0]
                sums += torch.stack((loss * count, loss.new_tensor(counts_here * count)))
        total, count = sum_over_processes(sums).tolist()
        return total / count


def open_held_out(config: Config) -> HeldOut:
    """The held-out samples that a run scores while it trains: at most train.validation_samples of each dataset."""
    return HeldOut(
        tuple(
            open_samples(
                Path(entry.path),
                config.model,
                seq_len=config.train.seq_len,
                limit=config.train.validation_samples,
                cross_document_attention=config.data.cross_document_attention,
            )
            for entry in config.data.datasets
        )
    )


def open_samples(
    folder: Path, model: ModelConfig, *, seq_len: int, limit: int | None, cross_document_attention: bool
) -> ValidationSamples:
    """The held-out split of one dataset, cut for `model`."""
    return ValidationSamples(
        open_dataset(folder, "validation", vocab_size=model.vocab_size),
        seq_len=seq_len,
        extra=1 + model.num_nextn_predict_layers,
        limit=limit,
        cross_document_attention=cross_document_attention,
    )
