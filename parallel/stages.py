"""Which layers make up which stage of a pipeline."""

from functools import cache
from itertools import pairwise

from model.config import ModelConfig
from model.transformer import ModelPart
from parallel.mesh import MeshShape
from parallel.schedule import Schedule


def layer_costs(config: ModelConfig) -> list[float]:
    """Multiplications a token costs in each main layer, attention over the whole context left out."""
    attention = config.hidden_size * (config.kv_lora_rank + config.qk_rope_head_dim)
    heads = config.num_attention_heads
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * config.hidden_size
    if config.q_lora_rank is None:
        attention += config.hidden_size * heads * config.qk_head_dim
    else:
        attention += config.q_lora_rank * (config.hidden_size + heads * config.qk_head_dim)
    experts = (config.num_experts_per_tok + config.n_shared_experts) * config.moe_intermediate_size
    dense, sparse = (attention + 3 * config.hidden_size * inner for inner in (config.intermediate_size, experts))
    return [
        float(dense if index < config.first_k_dense_replace else sparse) for index in range(config.num_hidden_layers)
    ]


def tail_cost(config: ModelConfig) -> float:
    """The same for what follows the main layers: the head, and every depth of multi-token prediction with the head
    again."""
    head = float(config.hidden_size * config.vocab_size)
    block = layer_costs(config)[-1] + 2.0 * config.hidden_size**2
    return head + config.num_nextn_predict_layers * (head + block)


def split_layers(config: ModelConfig, num_stages: int) -> list[tuple[int, ...]]:
    """The main layers of each stage: consecutive, so that the costliest stage costs least, and the rest are as equal as
    that allows. Every stage but the last, which has head and multi-token prediction, gets at least one. Raises
    ValueError where there are too few layers."""
    return list(_split_layers(config, num_stages))


@cache
def _split_layers(config: ModelConfig, num_stages: int) -> tuple[tuple[int, ...], ...]:
    costs, tail = layer_costs(config), tail_cost(config)
    num_layers = len(costs)
    if num_layers < num_stages - 1:
        raise ValueError(
            f"model.num_hidden_layers = {num_layers} are too few for {num_stages} pipeline stages, which need "
            f"{num_stages - 1}; lower parallel.pp, or take a parallel.schedule with one stage a rank"
        )
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    @cache
    def best(stage: int, first: int) -> tuple[float, float, tuple[int, ...]]:
        """Greatest cost, sum of squares and ends of the stages from `stage` on, which begins with layer `first`."""
        if stage == num_stages - 1:
            cost = before[num_layers] - before[first] + tail
            return cost, cost**2, (num_layers,)
        options = []
        for end in range(first + 1, num_layers - (num_stages - 2 - stage) + 1):
            greatest, squares, ends = best(stage + 1, end)
            cost = before[end] - before[first]
            options.append((max(cost, greatest), squares + cost**2, (end, *ends)))
        return min(options)

    return tuple(tuple(range(*edges)) for edges in pairwise((0, *best(0, 0)[2])))


def part_of_rank(config: ModelConfig, shape: MeshShape, schedule: Schedule, rank: int) -> ModelPart:
    """What one rank of the mesh holds."""
    layers = split_layers(config, schedule.num_stages)
    stages = schedule.stages_of(shape.pp_rank(rank))
    held = [layer for stage in stages for layer in layers[stage]]
    has_head = schedule.num_stages - 1 in stages
    if has_head:
        held += range(config.num_hidden_layers, config.num_layers)
    num_local_experts = config.n_routed_experts // shape.ep
    return ModelPart(
        layers=tuple(held),
        embedding=0 in stages or (has_head and config.num_nextn_predict_layers > 0),
        head=has_head,
        first_expert=shape.ep_rank(rank) * num_local_experts,
        num_local_experts=num_local_experts,
    )
