"""A run goes on with another layout, and with the first again: what one wrote the other reads, and the steps that
follow are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Numbers, put_together, reference, relative_errors, train_rank, write_config
from layouts import Layout
from support import run_ranks, write_dataset

from parallel.zero import load_deepspeed


def layout(**changes: Any) -> Layout:
    plain: dict[str, Any] = {
        "pp": 1, "schedule": "1f1b", "ep": 1, "cp": 1, "extra_dp": 1, "zero_stage": 1, "recompute": (), "depth": 1,
        "layers": 7, "skew": "none", "rounds": 0, "node_size": 0, "dtype": "fp32",
    }  # fmt: skip
    return Layout(**(plain | changes))


LAYOUTS = {
    "one rank": layout(),
    "dp2": layout(extra_dp=2),
    "dp2 zero0": layout(extra_dp=2, zero_stage=0),
    "dp2 zero2": layout(extra_dp=2, zero_stage=2),
    "dp2 zero3": layout(extra_dp=2, zero_stage=3),
    "ep4": layout(ep=4),
    "pp2 1f1b": layout(pp=2),
    "pp2 ep2 dualpipev": layout(pp=2, ep=2, schedule="dualpipev"),
    "pp4 dualpipe": layout(pp=4, schedule="dualpipe"),
    "pp2 cp2 zbv": layout(pp=2, cp=2, schedule="zbv"),
}
PAIRS = [
    ("one rank", "pp2 ep2 dualpipev"),
    ("one rank", "dp2"),
    ("one rank", "dp2 zero3"),
    ("dp2", "dp2 zero2"),
    ("dp2 zero0", "dp2"),
    ("dp2 zero0", "pp2 1f1b"),
    ("dp2 zero2", "ep4"),
    ("dp2 zero3", "pp2 cp2 zbv"),
    ("ep4", "pp2 1f1b"),
    ("pp4 dualpipe", "ep4"),
    ("pp4 dualpipe", "dp2 zero0"),
    ("pp2 cp2 zbv", "dp2 zero2"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_there_and_back_as_if_nothing_had_changed(tmp_path: Path, first: str, second: str) -> None:
    load_deepspeed()
    write_dataset(tmp_path / "data")
    path, runs = write_config(tmp_path, LAYOUTS[first]), []
    for step, name in enumerate((first, second, first)):
        chosen, meeting = LAYOUTS[name], tmp_path / f"meeting{step}"
        meeting.mkdir()
        runs.append(run_ranks(chosen.world_size, train_rank, path, chosen, step, step + 1, folder=meeting))
    after = put_together(runs[-1])
    steps = [step for ranks in runs for step in ranks[0]["steps"]]
    ours = Numbers(steps, after.parameters, after.biases)
    expected = reference(path, "none", torch.float32)
    assert max(relative_errors(ours, expected).values()) < 1e-5
    for name, bias in expected.biases.items():
        assert torch.equal(ours.biases[name], bias), name
