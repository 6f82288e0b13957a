"""The turns of an overlapped pair: as many as the plan of memory counts on, the same on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, small_model

import parallel.executor
from model.linear import WeightGradients, Work
from parallel.build import build_executor, build_model, placement
from parallel.chunk import LossWeights, MicroBatch
from parallel.config import ParallelConfig
from parallel.mesh import make_mesh
from parallel.schedule import Overlapped, make_schedule
from parallel.stages import split_layers
from parallel.tape import Steps, run_in_turns
from pretrain.planning.activations import Activations
from pretrain.planning.pairs import side_by_side, turns

MICRO_BATCHES, SEQ_LEN = 4, 12
MODEL = small_model(num_hidden_layers=5, n_group=1, topk_group=1)


def parallel_config(ep: int, recompute: tuple[Any, ...]) -> ParallelConfig:
    return ParallelConfig(ep=ep, schedule="dualpipev", recompute=recompute)


def take_turns(rank: int, ep: int, recompute: tuple[Any, ...], is_skewed: bool) -> dict[str, Any]:
    """How many turns the passes of each pair took, and how many weight gradients of experts came after the others.
    Nodes have two ranks."""
    config = parallel_config(ep, recompute)
    mesh = make_mesh(config.mesh_shape(ep, node_size=2))
    model = build_model(MODEL, config, mesh, seed=0, device=torch.device("cpu"))
    if is_skewed:
        for bias in model.expert_biases().values():
            bias[len(bias) // 2 :] = -100.0
    executor = build_executor(model, config, mesh, defers=True)
    taken: list[list[int]] = []
    late: list[int] = []
    take = WeightGradients.take

    def taking(self: WeightGradients) -> list[Work]:
        late.append(len(work := take(self)))
        return work

    def counted(steps: Steps[Any], counts: list[int], place: int) -> Steps[Any]:
        while True:
            counts[place] += 1
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            yield

    def counting(one: Steps[Any], other: Steps[Any]) -> Any:
        taken.append(counts := [0, 0])
        WeightGradients.take = taking
        try:
            return run_in_turns(counted(one, counts, 0), counted(other, counts, 1))
        finally:
            WeightGradients.take = take

    parallel.executor.run_in_turns = counting
    generator = torch.Generator().manual_seed(rank)
    size = 2, SEQ_LEN + 1 + MODEL.num_nextn_predict_layers
    batches = [MicroBatch(torch.randint(0, 96, size, generator=generator)) for _ in range(MICRO_BATCHES)]
    outcome = executor.train(batches, LossWeights(1.0, 0.3, 1e-4))
    return {"taken": taken, "late": late, "rows": outcome.rows}


@pytest.mark.parametrize("is_skewed", [False, True])
@pytest.mark.parametrize("recompute", [(), ("block",)])
@pytest.mark.parametrize("hops", [1, 2])
def test_turns_of_pairs(tmp_path: Path, hops: int, recompute: tuple[Any, ...], is_skewed: bool) -> None:
    ranks = run_ranks(2 * hops, take_turns, 2 * hops, recompute, is_skewed, folder=tmp_path)
    config = parallel_config(2 * hops, recompute)
    sizes = Activations(model=MODEL, parallel=config, num_bytes=4, micro_batch_size=2, seq_len=SEQ_LEN)
    layers = split_layers(MODEL, placement(config).num_stages)
    stages = [turns(sizes, layers[stage], is_last=stage == len(layers) - 1) for stage in range(len(layers))]
    (steps,) = make_schedule("dualpipev", num_ranks=1, num_micro_batches=MICRO_BATCHES).steps
    pairs = [step for step in steps if isinstance(step, Overlapped)]
    assert len(pairs) > 2
    expected = []
    for pair in pairs:
        forward, backward = side_by_side(stages[pair.forward.stage], stages[pair.backward.stage])
        # Each hop has the turns that are planned; what comes after the last is one more.
        expected.append([1 + hops * (len(turns_of) - 1) for turns_of in (backward, forward)])
    for numbers in ranks:
        assert numbers["taken"] == expected
    assert (ranks[-1]["rows"] == 0) == is_skewed
    # In the hop that ends at experts.
    assert min(ranks[0]["late"][hops - 1 :: hops]) > 0, "both matrices of the experts of every layer"
    assert len(ranks[0]["late"]) == len(ranks[-1]["late"])
