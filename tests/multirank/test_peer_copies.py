"""Rows by copy engines where streams are threads: what arrives is what was sent, whichever stream or rank is late.
tests/gpu/test_peer_copies.py is the same on a GPU."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from copy_engines import use_in_this_process
from peer_copies_ranks import NUM_EXPERTS, bring_rows, travel, travel_over
from support import finish, run_ranks, start_training, write_run
from torch import distributed as dist

from parallel.dispatch import Hop
from parallel.health import _wrong_carriers
from parallel.mesh import MeshShape, make_mesh
from parallel.peer_copies import READY, TAKEN, PeerCopies
from parallel.transfer import Collectives

CPU = torch.device("cpu")
LATE_S = 0.05
FAILED: list[Exception] = []
"""Keeps the tensors of where they were raised, which a stream may still be writing."""


def bring(rank: int, size: int, folder: Path, left_out: int | None) -> list[str]:
    use_in_this_process(folder)
    if left_out is not None:
        leave_out(left_out)
        if rank:
            take_late()
    assert dist.group.WORLD is not None
    try:
        bring_rows(PeerCopies(dist.group.WORLD, CPU), rank, size, CPU)
        travel(dist.group.WORLD, rank, size, CPU)
    except (AssertionError, RuntimeError) as error:
        # Whoever finds wrong rows leaves, and the others cannot meet it any more.
        FAILED.append(error)
        return [str(error)]
    return []


def leave_out(wait_for: int) -> None:
    """One kind of wait."""
    wait = PeerCopies._wait

    def some(self: PeerCopies, what: int, *others: Any) -> None:
        if what != wait_for:
            wait(self, what, *others)

    PeerCopies._wait = some


def take_late() -> None:
    """Later than another rank lays out two transfers, if that does not wait."""
    take = PeerCopies._take

    def late(self: PeerCopies, *others: Any) -> None:
        self._taking.give(partial(time.sleep, LATE_S))
        take(self, *others)

    PeerCopies._take = late


@pytest.mark.parametrize("size", [2, 3])
def test_what_arrives_is_what_was_sent(tmp_path: Path, size: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    assert run_ranks(size, bring, size, shared, None, folder=tmp_path) == [[]] * size


@pytest.mark.parametrize("left_out", [READY, TAKEN])
def test_a_wait_that_is_left_out_is_found_out(tmp_path: Path, left_out: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    found = run_ranks(2, bring, 2, shared, left_out, folder=tmp_path)
    assert any("brought other rows" in said for rank in found for said in rank)


def cross_nodes(rank: int, folder: Path) -> None:
    """Two nodes of two ranks: rows cross by collectives, and go on by copy engines."""
    use_in_this_process(folder)
    mesh = make_mesh(MeshShape(world_size=4, ep=4, node_size=2))
    between = Collectives(mesh.expert_node_peers)
    within = [PeerCopies(mesh.expert_node, CPU) for _ in range(2)]
    hops = [
        Hop(mesh.expert_node_peers, NUM_EXPERTS // 2, between, between),
        Hop(mesh.expert_node, NUM_EXPERTS // 4, within[0], within[1]),
    ]
    for max_rows in (0, 600):
        travel_over(hops, mesh.expert, rank, 4, CPU, max_rows=max_rows)


def test_rows_that_have_crossed_to_a_node(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    run_ranks(4, cross_nodes, shared, folder=tmp_path)


def look(rank: int, folder: Path, fault: bool) -> list[str]:
    """What brings wrong rows to a rank over two hops, when one sends others for counts on the second."""
    use_in_this_process(folder)
    mesh = make_mesh(MeshShape(world_size=4, ep=4, node_size=2))
    between, within = Collectives(mesh.expert_node_peers), [PeerCopies(mesh.expert_node, CPU) for _ in range(2)]
    launch = within[1].launch
    if fault and rank == 3:
        within[1].launch = lambda traffic, tensors: launch(traffic, [tensor + 1 for tensor in tensors])
    hops = [Hop(mesh.expert_node_peers, 2, between, between), Hop(mesh.expert_node, 1, *within)]
    return _wrong_carriers(hops, CPU)


@pytest.mark.parametrize("fault", [False, True])
def test_health_sees_wrong_rows(tmp_path: Path, fault: bool) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    wrong = ["copy engines"] if fault else []
    assert run_ranks(4, look, shared, fault, folder=tmp_path) == [[], [], wrong, wrong]


def test_a_run_without_gpus_says_what_carries_rows(tmp_path: Path) -> None:
    finish(start_training(write_run(tmp_path), "parallel.ep=2", "train.steps=1", processes=2))
    assert (tmp_path / "small" / "log.txt").read_text().count("rows to experts: collectives\n") == 1
