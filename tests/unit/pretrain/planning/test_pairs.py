"""What the passes of an overlapped pair keep, turn by turn."""

from typing import Any

import pytest
from support import small_model

from parallel.config import ParallelConfig
from pretrain.planning.activations import Activations, Sizes
from pretrain.planning.pairs import Turns, most_beside, side_by_side, turns


def activations(**parallel: Any) -> Activations:
    model = small_model(num_hidden_layers=4, first_k_dense_replace=1, num_nextn_predict_layers=2)
    return Activations(
        model=model,
        parallel=ParallelConfig(**parallel),
        num_bytes=2,
        micro_batch_size=2,
        seq_len=64,
        masked_documents=True,
    )


@pytest.mark.parametrize("recompute", [(), ("block",)])
@pytest.mark.parametrize("rounds", [{}, {"max_expert_rows": 40}])
@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("is_last", [True, False])
def test_turns_make_a_stage(is_last: bool, ep: int, rounds: dict[str, int], recompute: tuple[Any, ...]) -> None:
    sizes = activations(ep=ep, recompute=recompute, **(rounds if ep > 1 else {}))
    stage = turns(sizes, range(4), is_last=is_last)
    for part in (stage.forward, stage.backward):
        assert +sum(part, Sizes()) == +sizes.stage(range(4), is_last=is_last)


def test_what_is_left_and_freed_when() -> None:
    """By hand: the order of `Chunk.forward`, and the other way round."""
    sizes = activations(ep=2)
    forward, backward, *_ = turns(sizes, range(4), is_last=True)
    num_dense, num_moe = 1, 3 + 2
    assert len(forward) == len(backward) == 1 + 3 * (num_dense + num_moe)
    experts, mlp = sizes.block(1)["routed experts"], sizes.block(0)["other MLPs"]
    assert [turn["routed experts"] for turn in forward] == [0] * 4 + [0, experts, 0] * num_moe
    assert [turn["routed experts"] for turn in backward] == [0] + [0, experts, 0] * num_moe + [0] * 3
    # The dense MLP has the second turn of its layer in both passes; while rows are under way nothing is left or freed.
    assert forward[1] == backward[-2] == Sizes({"other MLPs": mlp})
    assert [turn.total() for turn in (forward[2], *forward[4::3], *backward[1::3])] == [0] * (2 * num_moe + 2)
    # The main head comes in the turn of the first prediction's attention, each prediction's after its own experts.
    loss = sizes.loss() // 3
    assert [turn["loss"] for turn in forward] == [0] * 12 + [loss, 0, 0, loss, 0, 0, loss]
    assert [turn["loss"] for turn in backward] == [loss, 0, 0, loss, 0, 0, loss] + [0] * 12
    mask = sizes.masks()["attention"]
    assert forward[0]["attention"] == backward[-1]["attention"] == mask + sizes.block(0)["attention"]


def test_pauses_are_taken_where_the_other_pass_has_turns_for_them() -> None:
    sizes = activations(ep=2)
    # One layer without experts and two with them; one and one; three with them.
    first, short, long = (turns(sizes, layers, is_last=False) for layers in ((0, 1, 2), (0, 1), (1, 2, 3)))
    for one, other, expected in ((first, long, 10), (long, first, 10), (first, first, 7), (short, long, 7)):
        forward, backward = side_by_side(one, other)
        counts = (one.forward_counts, other.backward_counts)
        most = max(each.under_way for each in counts)
        for made, whole, each in zip((forward, backward), (one.forward, other.backward), counts, strict=True):
            assert len(made) == 1 + min(most, sum(each))
            assert +sum(made, Sizes()) == +sum(whole, Sizes())
        assert len(forward) == expected
    # Without its pauses the forward pass runs its dense layer in the first turn, the backward pass in the last.
    forward, backward = side_by_side(first, first)
    assert forward[0]["other MLPs"] - forward[3]["other MLPs"] == sizes.block(0)["other MLPs"]
    assert forward[0] == +backward[-1]


def test_the_moment_with_most() -> None:
    forward, backward = ([Sizes(x=size) for size in of] for of in ((4, 0, 3, 2, 0, 3, 1), (1, 0, 0, 6, 0, 2, 2)))
    # More than before by turns: 3, 3, 6, 2, 2, 3, 2.
    assert most_beside(forward, backward)["x"] == 6
    # The other way round, 1 - 4, and no more than before at any time.
    assert most_beside(backward, forward).total() == 0


def test_passes_without_turns_run_one_after_the_other() -> None:
    whole = activations().stage(range(4), is_last=False)
    assert turns(activations(), range(4), is_last=False) == Turns([whole], [whole])
    assert most_beside([whole], [whole]).total() == 0


def test_rows_in_rounds_are_planned_as_if_nothing_were_freed() -> None:
    sizes = activations(ep=2, max_expert_rows=40)
    stage = turns(sizes, range(4), is_last=False)
    assert most_beside(stage.forward, stage.backward) == +sizes.stage(range(4), is_last=False)
