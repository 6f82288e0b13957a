"""A rank's part of the network and the pipeline that runs it: all of the parallel wrapping, in order."""

import torch

from model.config import ModelConfig
from model.fp8 import Fp8Config
from model.init import initialize
from model.transformer import Transformer
from parallel.chunk import Chunk
from parallel.clock import Clock
from parallel.config import ParallelConfig
from parallel.context import ContextRanks
from parallel.dispatch import make_dispatcher
from parallel.executor import Executor
from parallel.mesh import Mesh
from parallel.schedule import Schedule, make_schedule
from parallel.stages import part_of_rank, split_layers


def check_model(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raises ValueError, naming the keys, where a model cannot be divided so."""
    if model.n_routed_experts % parallel.ep:
        raise ValueError(
            f"parallel.ep = {parallel.ep} must divide model.n_routed_experts = {model.n_routed_experts}; lower it"
        )
    if model.num_attention_heads % parallel.cp:
        raise ValueError(
            f"parallel.cp = {parallel.cp} must divide model.num_attention_heads = {model.num_attention_heads}; lower it"
        )
    split_layers(model, placement(parallel).num_stages)


def placement(parallel: ParallelConfig) -> Schedule:
    """A schedule of the smallest number of micro-batches: it tells which stages lie where."""
    return make_schedule(parallel.schedule, num_ranks=parallel.pp, num_micro_batches=4 * parallel.pp)


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    *,
    seed: int,
    device: torch.device,
    fp8: Fp8Config | None = None,
) -> Transformer:
    """This rank's part with its initial weights, which are those of the whole model, in fp32."""
    part = part_of_rank(config, mesh.shape, placement(parallel), mesh.rank)
    recompute = frozenset(parallel.recompute) - {"block"}
    model = Transformer(config, part, recompute=recompute, packs_swiglu=parallel.fp8_swiglu, fp8=fp8)
    initialize(model, config, seed=seed, first_expert=part.first_expert)
    return model.to(device)


def build_executor(model: Transformer, parallel: ParallelConfig, mesh: Mesh, *, defers: bool) -> Executor:
    """The pipeline over this rank's chunks."""
    schedule, device = placement(parallel), next(model.parameters()).device
    clock = Clock(device)
    layers = split_layers(model.config, schedule.num_stages)
    dispatcher = make_dispatcher(parallel, mesh, model.config.n_routed_experts, device=device, clock=clock)
    chunks = {
        stage: Chunk(
            model,
            layers[stage],
            is_first=stage == 0,
            is_last=stage == schedule.num_stages - 1,
            dispatcher=dispatcher,
            parts=ContextRanks(mesh.context) if mesh.shape.cp > 1 else None,
            recompute_blocks="block" in parallel.recompute,
        )
        for stage in schedule.stages_of(mesh.shape.pp_rank(mesh.rank))
    }
    return Executor(chunks, mesh=mesh, schedule=parallel.schedule, defers=defers, clock=clock)


def shared_parameters(model: Transformer, mesh: Mesh) -> dict[str, bool]:
    """Parameters that first and last pipeline rank both hold, and whether this is the rank that owns them. The
    embedding is one where multi-token prediction uses it on another rank than the first layers do."""
    part, shape = model.part, mesh.shape
    if shape.pp == 1 or not model.config.num_nextn_predict_layers or not (part.embedding or part.head):
        return {}
    is_on_both_ends = part.embedding and not (part.head and 0 in part.layers)
    return {"embed_tokens.weight": shape.pp_rank(mesh.rank) == 0} if is_on_both_ends else {}
