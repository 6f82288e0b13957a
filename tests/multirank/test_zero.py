"""The end of a step on all layouts and ZeRO stages against plain torch: norm, masters and weights after clipped AdamW
steps, skipped steps, and who owns which part of the state.

The reference is one process that trains a whole small model. The gradients of its micro-batches are given to ranks that
hold only their part of that model, as its layout would have them: a rank's own micro-batches for what is replicated,
those of all its expert group for experts, and parts of the embedding's gradient on both ends of a pipeline.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_ranks, small_model
from torch import Tensor, nn

import parallel.zero
from model.init import initialize
from model.linear import add_gradient
from model.transformer import ModelPart, Transformer
from parallel.build import build_executor
from parallel.chunk import LossWeights, MicroBatch
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, MeshShape, make_mesh
from parallel.optimizer import is_expert
from parallel.zero import Optimizer, OptimizerConfig, ZeroConfig, load_deepspeed, make_optimizer

STEPS, MICRO_BATCHES = 3, 4
LEARNING_RATE = 1e-2
CONFIG = small_model()
FP32, BF16 = torch.float32, torch.bfloat16
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Case:
    world_size: int
    pp: int = 1
    ep: int = 1
    bidirectional: bool = False
    stage: int = 1
    dtype: torch.dtype = FP32
    moments: str = "fp32"
    offload: str = "none"
    eps: float = 1e-8

    @property
    def shape(self) -> MeshShape:
        return MeshShape(world_size=self.world_size, pp=self.pp, ep=self.ep, bidirectional=self.bidirectional)


@dataclass(frozen=True)
class Reference:
    """Of each step the gradient of each micro-batch and the norm; the parameters after the last one."""

    gradients: list[list[dict[str, Tensor]]]
    norms: list[float]
    parameters: dict[str, Tensor]


def whole_model(dtype: torch.dtype) -> Transformer:
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@cache
def train_plainly(dtype: torch.dtype, moments: str) -> Reference:
    """fp32 AdamW with torch's own clipping; bf16 weights are rounded from fp32 ones, and bf16 moments after use."""
    model = whole_model(dtype)
    names = [name for name, _ in model.named_parameters()]
    masters = {name: nn.Parameter(parameter.detach().float()) for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in masters.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in masters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    generator = torch.Generator().manual_seed(1)
    gradients, norms = [], []
    for _ in range(STEPS):
        gradients.append([])
        for _ in range(MICRO_BATCHES):
            losses = model(torch.randint(0, 96, (1, 18), generator=generator))
            loss = losses.lm_loss + 0.3 * losses.mtp_loss + 1e-2 * losses.balance_loss
            found = torch.autograd.grad(loss, list(model.parameters()))
            gradients[-1].append({name: gradient.float() for name, gradient in zip(names, found, strict=True)})
        for name, master in masters.items():
            master.grad = torch.stack([part[name] for part in gradients[-1]]).mean(0)
        norms.append(float(nn.utils.clip_grad_norm_(masters.values(), 1.0)))
        optimizer.step()
        for state in optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq") if moments == "bf16" else ():
                state[key] = state[key].bfloat16().float()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name].data)
    assert min(norms) > 1, "clipping must matter"
    return Reference(gradients, norms, {name: master.detach() for name, master in masters.items()})


def part_here(mesh: Mesh) -> ModelPart:
    """The dense layer on one stage, the others on the next; both of them in a bidirectional pipeline."""
    shape = mesh.shape
    both = shape.pp == 1 or shape.bidirectional
    is_last = both or shape.pp_rank(mesh.rank) == shape.pp - 1
    num_local_experts = CONFIG.n_routed_experts // shape.ep
    return ModelPart(
        layers=(0, 1, 2, 3) if both else (1, 2, 3) if is_last else (0,),
        embedding=True,
        head=is_last,
        first_expert=shape.ep_rank(mesh.rank) * num_local_experts,
        num_local_experts=num_local_experts,
    )


def shared_here(mesh: Mesh) -> dict[str, bool]:
    if mesh.shape.pp == 1 or mesh.shape.bidirectional:
        return {}
    return {EMBEDDING: is_first_end(mesh)}


def is_first_end(mesh: Mesh) -> bool:
    return mesh.shape.pp_rank(mesh.rank) == 0


def experts_here(name: str, whole: Tensor, mesh: Mesh) -> Tensor:
    return whole.chunk(mesh.shape.ep)[mesh.shape.ep_rank(mesh.rank)] if is_expert(name) else whole


def gradients_here(name: str, mesh: Mesh, parts: list[dict[str, Tensor]]) -> list[Tensor]:
    """What the layout would make of the micro-batches of a step: their sum over replicas is R times the mean."""
    (replicas,) = [ranks for ranks in mesh.shape.replicas() if mesh.rank in ranks]
    (group,) = [ranks for ranks in mesh.shape.experts() if mesh.rank in ranks]
    each = len(parts) // len(replicas)
    gradients = []
    for rank in group:
        first = replicas.index(rank) * each
        for part in parts[first : first + each]:
            gradient = experts_here(name, part[name], mesh) / each
            counts = is_expert(name) or rank == mesh.rank
            gradients.append(gradient if counts else torch.zeros_like(gradient))
    if name in shared_here(mesh):
        # The ends of a pipeline get different gradients, which bf16 holds exactly.
        gradients = [gradient * (-1 if mesh.shape.pp_rank(mesh.rank) else 2) for gradient in gradients]
    return gradients


def add_gradients(model: nn.Module, mesh: Mesh, parts: list[dict[str, Tensor]], optimizer: Optimizer) -> None:
    """Through autograd and, where it is allowed, past it."""
    gradients = {name: gradients_here(name, mesh, parts) for name, _ in model.named_parameters()}
    with optimizer.accumulating():
        for turn in range(len(gradients[EMBEDDING])):
            for place, (name, parameter) in enumerate(model.named_parameters()):
                gradient = gradients[name][turn].to(parameter.dtype)
                if (place + turn) % 2 and optimizer.defers_weight_gradients:
                    add_gradient(parameter, gradient)
                else:
                    parameter.backward(gradient)


def build(case: Case) -> tuple[Transformer, Mesh, Optimizer]:
    mesh = make_mesh(case.shape)
    model = Transformer(CONFIG, part_here(mesh))
    initialize(model, CONFIG, seed=0, first_expert=model.part.first_expert)
    optimizer = make_optimizer(
        model,
        mesh=mesh,
        config=OptimizerConfig(moments=case.moments, eps=case.eps),
        zero=ZeroConfig(stage=case.stage, offload=case.offload),
        dtype=case.dtype,
        micro_batch_size=1,
        shared=shared_here(mesh),
    )
    return model, mesh, optimizer


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.flatten() - other.flatten()).norm() / other.norm().clamp(min=1e-12))


def train(case: Case, reference: Reference) -> dict[str, object]:
    """Trains on this rank; returns what it saw."""
    model, mesh, optimizer = build(case)
    norms, refused = [], []
    for parts in reference.gradients:
        add_gradients(model, mesh, parts, optimizer)
        refused_norm, updated = optimizer.step(LEARNING_RATE, lambda norm: False)
        assert not updated
        add_gradients(model, mesh, parts, optimizer)
        norm, updated = optimizer.step(LEARNING_RATE)
        assert updated
        norms.append(norm)
        refused.append(refused_norm)
    expected = {name: experts_here(name, reference.parameters[name], mesh) for name, _ in model.named_parameters()}
    masters, places = {}, []
    for shard in optimizer.shards():
        value = shard.tensors["param"]
        whole = reference.parameters[shard.name]
        assert shard.shape == tuple(whole.shape)
        masters[f"{shard.name}@{shard.start}"] = float(
            (value - whole.flatten()[shard.start : shard.start + len(value)]).norm() / whole.norm()
        )
        assert {tensor.dtype for key, tensor in shard.tensors.items() if key != "param"} == {
            {"fp32": FP32, "bf16": BF16}[case.moments]
        }
        places.append((shard.name, shard.start, len(value), shard.owned))
    weights = {name: distance(p.detach().float(), expected[name]) for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    skipped = skip_a_step(model, mesh, optimizer, reference.gradients[0])
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    for shard in optimizer.shards():
        shard.tensors["param"].copy_(
            2 * reference.parameters[shard.name].flatten()[shard.start :][: len(shard.tensors["param"])]
        )
    optimizer.refresh_weights(0)
    loaded = {name: distance(p.detach().float(), 2 * expected[name]) for name, p in model.named_parameters()}
    return {
        "norms": norms,
        "refused": refused,
        "masters": masters,
        "weights": weights,
        "places": places,
        "skipped": skipped,
        "changed": changed,
        "loaded": loaded,
    }


def skip_a_step(model: nn.Module, mesh: Mesh, optimizer: Optimizer, parts: list[dict[str, Tensor]]) -> bool:
    """Takes a step with a gradient that is infinite on one rank alone."""
    add_gradients(model, mesh, parts, optimizer)
    extra = torch.inf if mesh.rank == mesh.shape.world_size - 1 else 0.0
    with optimizer.accumulating():
        last = list(model.parameters())[-1]
        last.backward(torch.full_like(last, extra))
    return not optimizer.step(LEARNING_RATE)[1]


def train_all(rank: int, cases: list[Case], references: list[Reference]) -> list[dict[str, object]]:
    parallel.zero.BUCKET_ELEMENTS = 200_000
    return [train(case, reference) for case, reference in zip(cases, references, strict=True)]


def check(case: Case, reference: Reference, ranks: list[dict[str, object]]) -> None:
    covered = {name: torch.zeros(value.numel(), dtype=torch.int64) for name, value in reference.parameters.items()}
    for seen in ranks:
        assert seen["norms"] == pytest.approx(reference.norms, rel=1e-5), case
        assert seen["refused"] == pytest.approx(reference.norms, rel=1e-5), case
        for kind, tolerance in (("masters", 1e-5), ("weights", 1e-5 if case.dtype == FP32 else 4e-3)):
            assert max(seen[kind].values()) < tolerance, (case, kind, seen[kind])
        assert seen["skipped"], case
        assert not seen["changed"], case
        assert max(seen["loaded"].values()) < (1e-6 if case.dtype == FP32 else 4e-3), case
        for name, start, numel, owned in seen["places"]:
            covered[name][start : start + numel] += owned
    for name, count in covered.items():
        assert (count == 1).all(), (case, name, "is not owned by exactly one rank")


CASES = [
    Case(1),
    Case(1, dtype=BF16),
    Case(1, stage=0, dtype=BF16, moments="bf16"),
    Case(2),
    Case(2, ep=2, dtype=BF16),
    Case(2, pp=2, bidirectional=True),
    Case(4),
    Case(4, dtype=BF16, moments="bf16"),
    Case(4, ep=2),
    Case(4, ep=2, dtype=BF16),
    Case(4, pp=2),
    Case(4, pp=2, ep=2),
    Case(4, pp=2, ep=2, dtype=BF16),
    Case(4, pp=2, ep=2, bidirectional=True),
    Case(4, pp=2, ep=2, bidirectional=True, dtype=BF16),
    Case(4, ep=2, stage=0),
    Case(4, pp=2, ep=2, stage=0),
    Case(4, pp=2, ep=2, stage=0, dtype=BF16),
    Case(4, pp=2, ep=2, stage=0, bidirectional=True),
    Case(2, stage=2),
    Case(2, stage=2, dtype=BF16),
    Case(2, stage=2, ep=2, dtype=BF16),
    Case(4, stage=2, ep=2),
    Case(4, stage=2, ep=2, dtype=BF16),
    Case(2, offload="cpu"),
    Case(2, offload="cpu", dtype=BF16),
    Case(4, offload="cpu", pp=2, ep=2),
    Case(4, offload="cpu", pp=2, ep=2, dtype=BF16),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_same_as_plain_torch(tmp_path: Path, world_size: int) -> None:
    load_deepspeed()
    cases = [case for case in CASES if case.world_size == world_size]
    references = [train_plainly(case.dtype, case.moments) for case in cases]
    by_rank = run_ranks(world_size, train_all, cases, references, folder=tmp_path)
    for place, (case, reference) in enumerate(zip(cases, references, strict=True)):
        check(case, reference, [seen[place] for seen in by_rank])


def train_really(case: Case) -> dict[str, Any]:
    """The executor runs the model on its own weights; the second step is a failure and the third is not accepted.
    Returns norms, the masters owned here after the first step and at the end, and losses with halved masters."""
    model, mesh, optimizer = build(case)
    layout = ParallelConfig(pp=case.pp, ep=case.ep, zero_stage=case.stage)
    executor = build_executor(model, layout, mesh, defers=optimizer.defers_weight_gradients)
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    norms: list[float] = []
    masters: list[dict[str, list[float]]] = []
    for weight, accepted in ((1.0, True), (torch.inf, True), (1.0, False), (1.0, True)):
        batch = torch.randint(0, 96, (MICRO_BATCHES, 18), generator=generator if accepted else other)
        mine = [MicroBatch(tokens) for tokens in batch.chunk(case.world_size)[mesh.rank].split(1)]
        with optimizer.accumulating():
            executor.train(mine, LossWeights(weight / len(mine), 0.3 / len(mine), 1e-2 / len(mine)))
        norm, updated = optimizer.step(LEARNING_RATE, lambda norm, answer=accepted: answer)
        assert updated == (accepted and weight == 1.0)
        if updated:
            norms.append(norm)
            owned = [shard for shard in optimizer.shards() if shard.owned]
            masters.append({f"{shard.name}@{shard.start}": shard.tensors["param"].tolist() for shard in owned})
    for shard in optimizer.shards():
        shard.tensors["param"].mul_(0.5)
    optimizer.refresh_weights(0)
    return {
        "norms": norms,
        "first": masters[0],
        "masters": masters[-1],
        "losses": executor.evaluate(mine).losses.tolist(),
    }


def train_all_really(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    parallel.zero.BUCKET_ELEMENTS = 10_000
    return [train_really(case) for case in cases]


def masters_of(case: Case, ranks: list[dict[str, list[float]]]) -> dict[str, Tensor]:
    """All parameters, put together from the shards that ranks own."""
    found = {name: torch.full((p.numel(),), torch.nan) for name, p in whole_model(FP32).named_parameters()}
    for shards in ranks:
        for key, values in shards.items():
            name, _, start = key.rpartition("@")
            assert found[name][int(start) :][: len(values)].isnan().all(), (case, key, "has two owners")
            found[name][int(start) :][: len(values)] = torch.tensor(values)
    assert not any(value.isnan().any() for value in found.values()), case
    return found


@pytest.mark.parametrize(
    ("layout", "stages"),
    [
        (Case(2, eps=1e-5), [(1, "none"), (2, "none"), (2, "cpu"), (3, "none")]),
        (
            Case(2, ep=2, dtype=BF16, eps=1e-5),
            [(1, "none"), (1, "cpu"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")],
        ),
        (Case(4, ep=2, eps=1e-5), [(2, "none"), (3, "none")]),
    ],
    ids=["fp32", "bf16 with experts", "fp32 with experts"],
)
def test_stages_agree_when_the_model_runs(tmp_path: Path, layout: Case, stages: list[tuple[int, str]]) -> None:
    """Stage 0 is the reference. A large ε keeps Adam from blowing up the last bits of gradients near zero."""
    load_deepspeed()
    cases = [replace(layout, stage=stage, offload=offload) for stage, offload in [(0, "none"), *stages]]
    by_rank = run_ranks(layout.world_size, train_all_really, cases, folder=tmp_path)
    reference, first_reference = (
        masters_of(cases[0], [seen[0][key] for seen in by_rank]) for key in ("masters", "first")
    )
    # A master that differs in its last bit may round to another bf16 weight, after which nothing is as close.
    tolerance = 1e-5 if layout.dtype == FP32 else 1e-3
    for place, case in enumerate(cases[1:], start=1):
        for seen in by_rank:
            first, *later = seen[place]["norms"]
            assert first == pytest.approx(seen[0]["norms"][0], rel=1e-5), case
            assert later == pytest.approx(seen[0]["norms"][1:], rel=tolerance), case
            assert seen[place]["losses"] == pytest.approx(seen[0]["losses"], rel=tolerance), case
        for name, value in masters_of(case, [seen[place]["masters"] for seen in by_rank]).items():
            assert distance(value, reference[name]) < tolerance, (case, name)
        for name, value in masters_of(case, [seen[place]["first"] for seen in by_rank]).items():
            assert distance(value, first_reference[name]) < 1e-5, (case, name)


def forget(*_: Any) -> None:
    """Does nothing."""


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@pytest.mark.parametrize(
    ("case", "where", "fault"),
    [
        (Case(2, pp=2), "parallel.zero.sum_over_ends", forget),
        (Case(2, pp=2, stage=0), "parallel.replicated.sum_over_ends", forget),
        (Case(2, pp=2), "test_zero.is_first_end", lambda mesh: True),
        (Case(2, pp=2, dtype=BF16), "test_zero.is_first_end", lambda mesh: True),
        (Case(2, pp=2, stage=0), "test_zero.is_first_end", lambda mesh: True),
        (Case(2, ep=2), "parallel.zero.is_expert", lambda name: False),
        (Case(2, ep=2, stage=0), "parallel.replicated.is_expert", lambda name: False),
        (Case(1, dtype=BF16), "parallel.optimizer._move_gradient", drop_gradient),
        (Case(1, dtype=BF16), "parallel.zero.forget_gradient", forget),
        (Case(1, dtype=BF16), "parallel.zero.clipping", lambda norm, clip: 1.0),
        (Case(1, stage=0, dtype=BF16), "parallel.replicated.forget_gradient", forget),
        (Case(1, stage=0, dtype=BF16), "parallel.replicated.clipping", lambda norm, clip: 1.0),
        (Case(1, stage=2, dtype=BF16), "parallel.zero._DividedGradients._before", forget),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_faults_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, where: str, fault: Any
) -> None:
    load_deepspeed()
    reference = train_plainly(case.dtype, case.moments)
    if where == "test_zero.is_first_end":
        monkeypatch.setitem(globals(), "is_first_end", fault)
    else:
        monkeypatch.setattr(where, fault)
    ranks = run_ranks(case.world_size, train_all, [case], [reference], folder=tmp_path)
    with pytest.raises(AssertionError, match="world_size"):
        check(case, reference, [seen[0] for seen in ranks])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_pipeline_divides_no_gradients(stage: int) -> None:
    with pytest.raises(ValueError, match=f"parallel.zero_stage = {stage} needs parallel.pp = 1, not 2"):
        refuse(MeshShape(world_size=2, pp=2), ZeroConfig(stage=stage))


def test_offload_needs_divided_optimizers() -> None:
    with pytest.raises(ValueError, match=r"parallel.optimizer_offload needs parallel.zero_stage = 1 or more, not 0"):
        refuse(MeshShape(world_size=1), ZeroConfig(stage=0, offload="cpu"))


def refuse(shape: MeshShape, zero: ZeroConfig) -> None:
    mesh: Any = SimpleNamespace(shape=shape)
    config = OptimizerConfig()
    make_optimizer(nn.Linear(1, 1), mesh=mesh, config=config, zero=zero, dtype=FP32, micro_batch_size=1, shared={})
