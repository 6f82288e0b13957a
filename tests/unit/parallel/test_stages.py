"""Layers over stages: complete, in order, as equal as can be."""

import itertools

import pytest
from support import PROJECT, small_model

from parallel.build import placement
from parallel.config import ParallelConfig
from parallel.mesh import MeshShape
from parallel.stages import layer_costs, part_of_rank, split_layers, tail_cost
from pretrain.config import load_config


def greatest_cost(config, stages: list[tuple[int, ...]]) -> float:
    costs = layer_costs(config)
    sums = [sum(costs[layer] for layer in stage) for stage in stages]
    sums[-1] += tail_cost(config)
    return max(sums)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(3, 1), (3, 2), (3, 4), (7, 3), (9, 4), (8, 8)])
def test_no_other_division_is_better(num_layers: int, num_stages: int) -> None:
    config = small_model(num_hidden_layers=num_layers)
    stages = split_layers(config, num_stages)
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert all(stages[:-1])
    best = min(
        greatest_cost(config, [tuple(range(*edge)) for edge in itertools.pairwise((0, *cuts, num_layers))])
        for cuts in itertools.combinations_with_replacement(range(num_layers + 1), num_stages - 1)
        if all(a < b for a, b in itertools.pairwise((0, *cuts)))
    )
    assert greatest_cost(config, stages) == best


def test_the_layers_of_the_report_over_32_chunks() -> None:
    config = load_config(PROJECT / "configs" / "dsv3_671b.toml").model
    stages = split_layers(config, 32)
    assert [layer for stage in stages for layer in stage] == list(range(61))
    assert {len(stage) for stage in stages[:-1]} == {1, 2}


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers = 3 are too few for 6 pipeline stages, which need 5"):
        split_layers(small_model(), 6)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe", "dualpipev"])
def test_parts_make_up_the_model(schedule: str) -> None:
    config = small_model(num_hidden_layers=8)
    parallel = ParallelConfig(pp=2, ep=2, schedule=schedule)
    shape: MeshShape = parallel.mesh_shape(8)
    parts = [part_of_rank(config, shape, placement(parallel), rank) for rank in range(8)]
    for ranks in shape.models():
        held = [layer for rank in ranks for layer in parts[rank].layers]
        assert sorted(held) == list(range(config.num_layers)), "each layer once"
        assert sum(parts[rank].head for rank in ranks) == 1
    for ranks in shape.experts():
        assert [parts[rank].first_expert for rank in ranks] == [0, 4]
    for part in parts:
        assert part.embedding or not part.head, "prediction needs the embedding"
