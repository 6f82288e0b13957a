"""Losses, expert loads and gradients of any layout against one process that runs the whole model by plain autograd."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, small_model

from model.config import ModelConfig
from model.init import initialize
from model.transformer import Transformer
from parallel.build import build_executor, build_model
from parallel.chunk import LossWeights, MicroBatch
from parallel.config import ParallelConfig
from parallel.mesh import make_mesh
from parallel.schedule import make_schedule
from parallel.simulate import Costs, simulate

MTP_WEIGHT, ALPHA = 0.3, 1e-2
SEQ_LEN = 16


@dataclass(frozen=True)
class Case:
    """A layout, a model and how many micro-batches each pipeline gets."""

    world_size: int
    parallel: ParallelConfig
    model: ModelConfig
    micro_batches: int
    skew: str = "none"
    node_size: int = 0


def all_batches(case: Case) -> list[MicroBatch]:
    """The micro-batches of all data ranks, one rank after another; documents end anywhere."""
    shape = case.parallel.mesh_shape(case.world_size)
    generator = torch.Generator().manual_seed(1)
    size = 2, SEQ_LEN + 1 + case.model.num_nextn_predict_layers
    return [
        MicroBatch(
            torch.randint(0, 96, size, generator=generator),
            torch.randint(0, 2, size, generator=generator).cumsum(1),
        )
        for _ in range(case.micro_batches * shape.dp)
    ]


def skew_routing(model: Transformer, skew: str) -> None:
    """Makes the router send every token to the first experts, or never to the last."""
    for bias in model.expert_biases().values():
        if skew == "one takes all":
            bias[0] = 100.0
        elif skew == "one rank gets nothing":
            bias[len(bias) // 2 :] = -100.0


def run_plainly(case: Case) -> dict[str, Any]:
    model = Transformer(case.model)
    initialize(model, case.model, seed=0)
    skew_routing(model, case.skew)
    batches = all_batches(case)
    sums, load = torch.zeros(3, dtype=torch.float64), torch.zeros(0)
    for batch in batches:
        losses = model(batch.tokens, batch.documents)
        loss = losses.lm_loss + MTP_WEIGHT * losses.mtp_loss + ALPHA * losses.balance_loss
        (loss / len(batches)).backward()
        sums += torch.stack(losses[:3]).detach() / len(batches)
        load = load + losses.load if len(load) else losses.load
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"losses": sums, "load": load, "gradients": gradients}


def run_rank(rank: int, case: Case) -> dict[str, Any]:
    shape = case.parallel.mesh_shape(case.world_size, node_size=case.node_size)
    mesh = make_mesh(shape)
    model = build_model(case.model, case.parallel, mesh, seed=0, device=torch.device("cpu"))
    skew_routing(model, case.skew)
    executor = build_executor(model, case.parallel, mesh, defers=True)
    first = shape.dp_rank(rank) * case.micro_batches
    batches = all_batches(case)[first : first + case.micro_batches]
    copies = 2 if shape.bidirectional else 1
    each = copies / case.micro_batches
    outcome = executor.train(batches, LossWeights(each, each * MTP_WEIGHT, each * ALPHA))
    executed = [str(done.step) for done in executor.executed]
    return {
        "evaluated": executor.evaluate(batches).losses.numpy() / case.micro_batches,
        "losses": outcome.losses.numpy() / case.micro_batches,
        "load": {layer: load.numpy() for layer, load in outcome.load.items()},
        "gradients": {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None},
        "first_expert": model.part.first_expert,
        "executed": executed,
    }


def put_together(case: Case, ranks: list[dict[str, Any]], plain: dict[str, Any]) -> dict[str, Any]:
    """The global losses, loads and mean gradients from what each rank has."""
    shape = case.parallel.mesh_shape(case.world_size)
    gradients = {name: torch.zeros_like(gradient) for name, gradient in plain["gradients"].items()}
    load = torch.zeros_like(plain["load"])
    for rank in ranks:
        for name, gradient in rank["gradients"].items():
            whole = gradients[name]
            if ".mlp.experts." in name:
                whole = whole[rank["first_expert"] : rank["first_expert"] + len(gradient)]
            whole += torch.from_numpy(gradient) / len(shape.replicas()[0])
        for layer, counts in rank["load"].items():
            load[case.model.moe_layers.index(layer)] += torch.from_numpy(counts)
    losses, evaluated = (
        sum(torch.from_numpy(rank[key]) for rank in ranks) / shape.batch_ranks for key in ("losses", "evaluated")
    )
    return {"losses": losses, "evaluated": evaluated, "load": load, "gradients": gradients}


def layout(
    world_size: int,
    micro_batches: int,
    *,
    model: dict[str, Any] | None = None,
    skew: str = "none",
    node_size: int = 0,
    **parallel: Any,
) -> Case:
    sizes = small_model(**(model or {}))
    return Case(world_size, ParallelConfig(**parallel), sizes, micro_batches, skew, node_size)


DEEP = {"num_hidden_layers": 7}
CASES = {
    "one process": layout(1, 2),
    "one process, recompute": layout(1, 2, recompute=("block",)),
    "one process, dualpipev": layout(1, 3, schedule="dualpipev"),
    "dp2": layout(2, 2),
    "ep2": layout(2, 2, ep=2),
    "ep4": layout(4, 1, ep=4),
    "ep4, one expert takes everything": layout(4, 1, ep=4, skew="one takes all", model={"n_group": 1, "topk_group": 1}),
    "ep2, a rank gets nothing": layout(2, 1, ep=2, skew="one rank gets nothing", model={"n_group": 1, "topk_group": 1}),
    "ep2 dualpipev on one stage pair": layout(2, 4, ep=2, schedule="dualpipev"),
    "ep2 dualpipev, a rank gets nothing": layout(
        2, 4, ep=2, schedule="dualpipev", skew="one rank gets nothing", model={"n_group": 1, "topk_group": 1}
    ),
    "parts computed again": layout(1, 2, recompute=("norms", "mla_up", "swiglu")),
    "pp2 ep2 zbv, all computed again": layout(
        4, 4, pp=2, ep=2, schedule="zbv", model=DEEP, recompute=("norms", "mla_up", "swiglu", "block")
    ),
    "cp2 ep2, parts computed again": layout(2, 1, cp=2, ep=2, recompute=("norms", "mla_up", "swiglu")),
    "ep2 recompute": layout(2, 2, ep=2, recompute=("block",)),
    "pp2 1f1b": layout(2, 3, pp=2),
    "pp2 1f1b without prediction": layout(2, 3, pp=2, model={"num_nextn_predict_layers": 0}),
    "pp4 1f1b": layout(4, 5, pp=4, model=DEEP),
    "pp2 zb1p": layout(2, 4, pp=2, schedule="zb1p"),
    "pp2 zbv": layout(2, 5, pp=2, schedule="zbv", model=DEEP),
    "pp2 dualpipev": layout(2, 5, pp=2, schedule="dualpipev", model=DEEP),
    "pp2 dualpipe": layout(2, 4, pp=2, schedule="dualpipe", model=DEEP),
    "pp4 dualpipe": layout(4, 10, pp=4, schedule="dualpipe", model=DEEP),
    "pp4 dualpipe, few micro-batches": layout(4, 4, pp=4, schedule="dualpipe", model=DEEP),
    "pp2 dualpipe, one each way": layout(2, 2, pp=2, schedule="dualpipe", model=DEEP),
    "pp2 dualpipev, few micro-batches": layout(2, 3, pp=2, schedule="dualpipev", model=DEEP),
    "pp2 ep2 dualpipev, one micro-batch": layout(4, 1, pp=2, ep=2, schedule="dualpipev", model=DEEP),
    "pp2 zbv, few micro-batches": layout(2, 2, pp=2, schedule="zbv", model=DEEP),
    "pp4 zb1p, few micro-batches": layout(4, 2, pp=4, schedule="zb1p", model=DEEP),
    "pp2 ep2 dualpipev": layout(4, 4, pp=2, ep=2, schedule="dualpipev", model=DEEP),
    "pp2 ep2 dualpipe, recompute": layout(4, 4, pp=2, ep=2, schedule="dualpipe", model=DEEP, recompute=("block",)),
    "pp2 ep2 zbv, two depths": layout(4, 4, pp=2, ep=2, schedule="zbv", model={**DEEP, "num_nextn_predict_layers": 2}),
    "cp2": layout(2, 2, cp=2),
    "cp2 ep2, two depths": layout(2, 1, cp=2, ep=2, model={"num_nextn_predict_layers": 2}),
    "cp2 ep4 dp2, recompute": layout(4, 1, cp=2, ep=4, recompute=("block",)),
    "pp2 cp2 dualpipe": layout(4, 4, pp=2, cp=2, schedule="dualpipe", model=DEEP),
    "ep4 in rounds": layout(4, 1, ep=4, max_expert_rows=16),
    "ep2 in rounds, one expert takes everything": layout(
        2, 2, ep=2, max_expert_rows=9, skew="one takes all", model={"n_group": 1, "topk_group": 1}
    ),
    "pp2 ep2 zbv in rounds, recompute": layout(
        4, 4, pp=2, ep=2, schedule="zbv", max_expert_rows=20, recompute=("block",), model=DEEP
    ),
    "two nodes of two": layout(4, 2, ep=4, node_size=2),
    "two nodes of two in rounds": layout(4, 1, ep=4, node_size=2, max_expert_rows=10),
    "four nodes of one": layout(4, 1, ep=4, node_size=1, model={"num_experts_per_tok": 4}),
    "eight ranks, four nodes, recompute": layout(8, 1, ep=8, node_size=2, recompute=("block", "norms")),
    "pp2 ep2 dp2 1f1b": layout(8, 2, pp=2, ep=2),
}


def check_order(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Every rank ran the steps of the schedule, in its order, which is that of the simulated timeline."""
    parallel, shape = case.parallel, case.parallel.mesh_shape(case.world_size)
    schedule = make_schedule(parallel.schedule, num_ranks=parallel.pp, num_micro_batches=case.micro_batches)
    simulated = simulate(schedule, Costs(forward=1, backward=2, weight=1)).spans
    for rank, numbers in enumerate(ranks):
        assert numbers["executed"] == [str(span.step) for span in simulated[shape.pp_rank(rank)]]


@pytest.mark.parametrize("name", CASES)
def test_same_as_one_process(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain = run_plainly(case)
    ranks = run_ranks(case.world_size, run_rank, case, folder=tmp_path)
    ours = put_together(case, ranks, plain)
    check_order(case, ranks)
    for key in ("losses", "evaluated"):
        torch.testing.assert_close(ours[key], plain["losses"], rtol=1e-5, atol=1e-7)
    assert torch.equal(ours["load"], plain["load"])
    for parameter, expected in plain["gradients"].items():
        error = (ours["gradients"][parameter] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 1e-5, (parameter, float(error))
