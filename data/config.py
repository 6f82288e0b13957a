"""The `[data]` table of a run's configuration: which datasets are read, in which proportions, how packed."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One entry of `data.datasets`.

    `path` is a folder written by `python -m data prepare`. `weight` is the dataset's share of the samples, relative to
    the weights of the others; small datasets of large weight are simply read for more epochs.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.datasets.path = '' must name a folder written by `python -m data prepare`")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"data.datasets.weight = {self.weight} of {self.path} must be a number above 0; "
                "remove the dataset if it should not be read"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `[data]` table.

    `fim_rate` is the share of documents rewritten for fill-in-the-middle, before packing. With
    `cross_document_attention` false, attention stays within each document of a packed sample. `prefetch` is the number
    of batches that a thread reads ahead of the training step; with 0 the step reads its batch itself. `verify` compares
    every shard with its checksum before the first step, each data-parallel rank reading its share.
    """

    datasets: tuple[DatasetConfig, ...]
    fim_rate: float = 0.0
    cross_document_attention: bool = True
    prefetch: int = 4
    verify: bool = True

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError(
                "data.datasets = [] must name at least one dataset; make one with `python -m data prepare`"
            )
        paths = [dataset.path for dataset in self.datasets]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"data.datasets lists {path} twice; list it once, with the sum of the weights")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"data.fim_rate = {self.fim_rate} must lie between 0 and 1; the report uses 0.1")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch = {self.prefetch} must be a number of batches; 0 reads none ahead")
