"""Where a process finds out its place."""

import pytest
import torch

from parallel.launch import LaunchError, find_place


def test_alone_without_a_launcher() -> None:
    place = find_place({})
    assert (place.rank, place.world_size, place.is_first) == (0, 1, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the places have no GPUs here")
def test_torchrun_and_srun() -> None:
    place = find_place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (place.rank, place.world_size, place.local_rank, place.is_first) == (3, 4, 1, False)
    assert find_place({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}).rank == 1


def test_impossible_places() -> None:
    with pytest.raises(LaunchError, match="RANK = 2 must lie below WORLD_SIZE = 2; start with torchrun or srun"):
        find_place({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(LaunchError, match="WORLD_SIZE = 'many' must be a whole number"):
        find_place({"RANK": "0", "WORLD_SIZE": "many"})
