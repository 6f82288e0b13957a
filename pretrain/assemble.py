"""Puts a run together: the model under ZeRO, the stream of samples, the timeline."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import DataError
from data.stream import SampleStream, open_stream
from model.transformer import Transformer
from parallel.build import build_executor, build_model, shared_parameters
from parallel.executor import Executor
from parallel.launch import Place, gather_texts
from parallel.mesh import Mesh, make_mesh
from parallel.zero import Optimizer, ZeroConfig, make_optimizer
from pretrain.config import Config
from pretrain.errors import SharedError, UserError
from pretrain.fp8 import check_fp8, fp8_config
from pretrain.timeline import Timeline

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Assembly:
    """The parts of a run on this process; `model` is the part of the network that lives here."""

    config: Config
    place: Place
    mesh: Mesh
    timeline: Timeline
    stream: SampleStream
    model: Transformer
    optimizer: Optimizer
    executor: Executor

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the training tokens."""
        dataset = self.stream.datasets[0]
        return dataset.folder / dataset.tokenizer.file


def open_data(config: Config) -> SampleStream:
    """Opens the training data, sizes checked; `verify_data` compares the checksums."""
    extra = 1 + config.model.num_nextn_predict_layers
    return open_stream(config.data, seed=config.run.seed, extra=extra, vocab_size=config.model.vocab_size)


def verify_data(stream: SampleStream, place: Place) -> None:
    """Compares every shard with its checksum, each process a part of them."""
    with failing_together():
        stream.verify(place.rank, place.world_size)


def assemble(config: Config, place: Place, stream: SampleStream) -> Assembly:
    """Builds model and optimizer. Processes must have been joined. Raises UserError for sizes the device cannot do."""
    _check_sizes(config, place)
    check_fp8(config, place.device)
    if config.run.deterministic:
        # cuBLAS repeats its bits only with a workspace of fixed size.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Would write to all memory that is taken, for programs that read what they have not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(config.run.seed)
    parallel = config.parallel
    mesh = make_mesh(parallel.mesh_shape(place.world_size, node_size=place.node_size))
    model = build_model(
        config.model,
        parallel,
        mesh,
        seed=config.run.weights_seed,
        device=place.device,
        fp8=fp8_config(config, place.device.type),
    )
    optimizer = make_optimizer(
        model,
        mesh=mesh,
        config=config.optimizer,
        zero=ZeroConfig(stage=parallel.zero_stage, offload="cpu" if parallel.optimizer_offload else "none"),
        dtype=DTYPES[config.precision.dtype],
        micro_batch_size=config.train.micro_batch_size,
        shared=shared_parameters(model, mesh),
    )
    executor = build_executor(model, parallel, mesh, defers=optimizer.defers_weight_gradients)
    return Assembly(config, place, mesh, config.full_timeline, stream, model, optimizer, executor)


def _check_sizes(config: Config, place: Place) -> None:
    if place.device.type != "cuda" or config.precision.dtype != "bf16":
        return
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(config.model, name)
        if size % 8:
            raise UserError(
                f"model.{name} = {size} must be a multiple of 8 for bf16 experts on a GPU, which read rows 16 bytes at "
                'a time; change it, or set precision.dtype = "fp32"'
            )


@contextmanager
def failing_together() -> Iterator[None]:
    """What goes wrong for the user on one process goes wrong on all, so that none waits for another in vain."""
    message = ""
    try:
        yield
    except (UserError, DataError, OSError) as error:
        message = str(error) or type(error).__name__
    failures = [said for said in gather_texts(message) if said]
    if failures:
        raise SharedError(failures[0])
