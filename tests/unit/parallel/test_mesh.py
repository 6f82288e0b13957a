"""Who works with whom, as arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.mesh import MeshShape


@st.composite
def shapes(draw: st.DrawFn) -> MeshShape:
    pp, cp, ep = (draw(st.sampled_from((1, 2, 4, 8))) for _ in range(3))
    dp = draw(st.sampled_from((1, 2, 3, 4))) * max(ep // cp, 1)
    return MeshShape(
        world_size=pp * cp * dp,
        pp=pp,
        ep=ep,
        cp=cp,
        bidirectional=pp > 1 and draw(st.booleans()),
        node_size=draw(st.sampled_from((0, 1, 2, 4, 8))),
    )


@given(shapes())
def test_every_partition_has_every_rank_once(shape: MeshShape) -> None:
    for partition in (
        shape.pipelines(),
        shape.contexts(),
        shape.experts(),
        shape.replicas(),
        shape.expert_replicas(),
        shape.models(),
        shape.ends(),
        shape.expert_nodes(),
        shape.expert_node_peers(),
    ):
        assert sorted(rank for ranks in partition for rank in ranks) == list(range(shape.world_size))


@given(shapes())
def test_groups_are_made_of_the_right_ranks(shape: MeshShape) -> None:
    def stages(rank: int) -> frozenset[int]:
        place = shape.pp_rank(rank)
        return frozenset((place, shape.pp - 1 - place) if shape.bidirectional else (place,))

    for ranks in shape.experts():
        assert [shape.ep_rank(rank) for rank in ranks] == list(range(shape.ep))
        assert ranks[-1] - ranks[0] == shape.ep - 1, "neighbours"
        assert len({shape.pp_rank(rank) for rank in ranks}) == 1
    for ranks in shape.replicas():
        assert len({stages(rank) for rank in ranks}) == 1
        assert len(ranks) == shape.batch_ranks * (2 if shape.bidirectional else 1)
    for ranks in shape.expert_replicas():
        assert len({(stages(rank), shape.ep_rank(rank)) for rank in ranks}) == 1
    for ranks in shape.models():
        assert len({stages(rank) for rank in ranks}) == len(ranks)
        assert set().union(*map(stages, ranks)) == set(range(shape.pp))
    for ranks in shape.contexts():
        assert [shape.cp_rank(rank) for rank in ranks] == list(range(shape.cp))
        assert len({(shape.pp_rank(rank), shape.dp_rank(rank)) for rank in ranks}) == 1


def test_two_nodes() -> None:
    shape = MeshShape(world_size=8, ep=8, node_size=4)
    assert shape.expert_nodes() == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert shape.expert_node_peers() == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world_size": 6, "pp": 4}, "6 ranks cannot be divided into parallel.pp × parallel.cp = 4 × 1 = 4"),
        (
            {"world_size": 12, "pp": 2, "ep": 4},
            "parallel.ep = 4 must divide the dp × cp = 6 × 1 = 6 ranks .* use 3 or 6",
        ),
        ({"world_size": 3, "pp": 3, "bidirectional": True}, "parallel.pp = 3 must be even"),
        ({"world_size": 4, "cp": 0}, "parallel.cp = 0 must be at least 1"),
    ],
)
def test_what_does_not_divide_is_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeshShape(**sizes)
