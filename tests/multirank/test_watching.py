"""What a run shows beside its losses is the same on every layout, and shows a planted fault."""

import itertools
import json
import math
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import skew_routing, write_config
from layouts import Layout
from support import read_events, read_metrics, run_ranks, write_dataset
from torch import nn

import pretrain.loop
from data.loader import BatchLoader
from parallel.launch import Place
from parallel.optimizer import gradient_sum
from parallel.parts import PARTS, part_of
from parallel.zero import load_deepspeed
from pretrain.assemble import Assembly, assemble, open_data
from pretrain.config import load_config
from pretrain.loop import plan_batches
from pretrain.state import first_state
from pretrain.step import train_step
from pretrain.watching import Watches

ALL = Watches(experts=True, ranks=True, parts=True)
STEPS = 2
ALONE = Layout(
    pp=1,
    schedule="1f1b",
    ep=1,
    cp=1,
    extra_dp=1,
    zero_stage=0,
    recompute=(),
    depth=1,
    layers=3,
    skew="none",
    rounds=0,
    node_size=0,
    dtype="fp32",
)
LAYOUTS = [
    replace(ALONE, pp=2, ep=2, schedule="dualpipev", zero_stage=1),
    replace(ALONE, pp=2, schedule="dualpipe", zero_stage=0, ep=2, recompute=("block",)),
    replace(ALONE, ep=2, cp=2, zero_stage=1, node_size=1),
    replace(ALONE, ep=2, zero_stage=0, rounds=24),
    replace(ALONE, ep=2, zero_stage=2),
    replace(ALONE, extra_dp=2, zero_stage=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("watching")
    write_dataset(path / "data")
    load_deepspeed()
    return path


def watch_rank(rank: int, path: Path, layout: Layout, counts_all: bool = False) -> list[dict[str, Any]]:
    """What each step shows on a rank, with its gradient norm; in a world of one what its parts should be, too."""
    config = load_config(path, layout.overrides)
    run = assemble(
        config, Place(rank, layout.world_size, rank, torch.device("cpu"), layout.node_size), open_data(config)
    )
    if counts_all:
        shards = list(run.optimizer.shards())
        run.optimizer.shards = lambda: (replace(shard, owned=True) for shard in shards)  # type: ignore[method-assign]
    skew_routing(list(run.model.expert_biases().values()), layout.skew)
    state, shape, shown = first_state(run), run.mesh.shape, []
    specs = plan_batches(run.timeline, run.stream, state, config.train)
    with BatchLoader(run.stream, specs, dp_rank=shape.dp_rank(rank), dp_size=shape.dp) as batches:
        for batch in itertools.islice(batches, STEPS):
            expected: dict[str, Any] = {}
            if layout.world_size == 1:
                measure_plainly(run, expected)
            run.executor.clock.start()
            result = train_step(run, batch, run.timeline.at(0), stop_requested=False, watches=ALL)
            run.executor.clock.stop()
            shown.append({**result.seen, "grad_norm": result.grad_norm, "load": result.load.tolist(), **expected})
    return shown


def measure_plainly(run: Assembly, expected: dict[str, Any]) -> None:
    """Has the next step of a run in one process, without ZeRO, measure its parts from gradients, and weights before and
    after."""
    step = run.optimizer.step
    parameters = dict(run.model.named_parameters())

    def measured(*arguments: Any) -> Any:
        before = {name: (p.detach().clone(), gradient_sum(p).clone()) for name, p in parameters.items()}
        run.optimizer.step = step
        answer = step(*arguments)
        found: defaultdict[str, Any] = defaultdict(list)
        for name, parameter in parameters.items():
            old, gradient = before[name]
            found[part_of(name, run.config.model)].append((gradient, parameter.detach(), parameter.detach() - old))
        expected["expected"] = {}
        for part, tensors in found.items():
            gradient, weight, update = (
                torch.cat([t.flatten() for t in kind]).double() for kind in zip(*tensors, strict=True)
            )
            expected["expected"][part] = {
                "grad_norm": float(gradient.norm()),
                "weight_norm": float(weight.norm()),
                "update_ratio": float(update.norm() / weight.norm()),
                "grad_amax": float(gradient.abs().max()),
                "weight_amax": float(weight.abs().max()),
            }
        return answer

    run.optimizer.step = measured


@cache
def alone(path: Path) -> list[dict[str, Any]]:
    (path.parent / "alone").mkdir()
    return run_ranks(1, watch_rank, path, ALONE, folder=path.parent / "alone")[0]


def test_parts_are_those_of_plain_arithmetic(folder: Path) -> None:
    for shown in alone(write_config(folder, ALONE)):
        assert set(shown["parts"]) == set(PARTS)
        for part, sizes in shown["expected"].items():
            assert shown["parts"][part] == pytest.approx(sizes, rel=1e-5), part


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_show_the_same(folder: Path, tmp_path: Path, layout: Layout) -> None:
    expected = alone(write_config(folder, layout))
    ranks = run_ranks(layout.world_size, watch_rank, write_config(folder, layout), layout, folder=tmp_path)
    shown = ranks[0]
    for found, other in zip(shown, expected, strict=True):
        for part, sizes in found["parts"].items():
            assert sizes == pytest.approx(other["parts"][part], rel=1e-5), part
        total = math.sqrt(sum(sizes["grad_norm"] ** 2 for sizes in found["parts"].values()))
        assert total == pytest.approx(found["grad_norm"], rel=1e-5)
        assert found["load"] == other["load"]
        for layer, use in found["moe"].items():
            assert use == pytest.approx(other["moe"][layer], rel=1e-6), layer
        rows, tokens = found["received_rows"], other["received_rows"]["max"]
        # A token goes once to each rank that holds any of its experts, at most to all of them.
        assert tokens <= rows["mean"] * layout.world_size <= min(layout.ep, 2) * tokens
        assert rows["max"] >= rows["mean"]
        assert (found["rounds_max"] > 1) == (layout.rounds > 0)
        assert len(found["ranks"]["busy_s"]) == layout.world_size
        assert min(found["ranks"]["busy_s"]) > 0
    assert all(rank[0]["parts"] == shown[0]["parts"] for rank in ranks)


def test_what_is_counted_twice_is_seen(folder: Path, tmp_path: Path) -> None:
    """The embedding lies at both ends of a pipeline."""
    layout = replace(ALONE, pp=2, zero_stage=1)
    found = run_ranks(2, watch_rank, write_config(folder, layout), layout, True, folder=tmp_path)[0][0]
    total = math.sqrt(sum(sizes["grad_norm"] ** 2 for sizes in found["parts"].values()))
    assert total > 1.001 * found["grad_norm"]


def test_a_dead_expert_and_a_full_rank_are_seen(folder: Path, tmp_path: Path) -> None:
    layout = replace(ALONE, ep=2, skew="half get nothing")
    shown = run_ranks(2, watch_rank, write_config(folder, layout), layout, folder=tmp_path)[0]
    for use in shown[0]["moe"].values():
        assert use["dead_experts"] == 4
        assert use["max_violation"] >= 1
        assert use["entropy"] <= math.log(4) / math.log(8)
        assert (use["bias_min"], use["bias_max"]) == (-100.0, 0.0)
    rows = shown[0]["received_rows"]
    assert rows["max"] == 2 * rows["mean"], "all rows go to one rank"


SLEEP_S = 0.05


def train_rank(rank: int, path: Path, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    # The heartbeat needs the store of a real launch.
    pretrain.loop.watch_ranks = lambda *_: nullcontext()
    if rank == 1:
        forward = nn.Module.__call__

        def slow(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            time.sleep(SLEEP_S if type(self).__name__ == "Head" else 0.0)
            return forward(self, *arguments, **named)

        nn.Module.__call__ = slow  # type: ignore[method-assign]
    pretrain.loop.train(config, Place(rank, 2, rank, torch.device("cpu")))


def test_a_run_writes_where_its_time_goes(folder: Path, tmp_path: Path) -> None:
    path = write_config(folder, ALONE)
    often = ["logging.ranks_every=2", "logging.phases_every=2", "logging.timeline_every=3", "logging.parts_every=0"]
    overrides = ["run.name=slow", "parallel.pp=2", "parallel.schedule=zb1p", "train.batch_size=8", *often]
    began = time.time()
    run_ranks(2, train_rank, path, overrides, folder=tmp_path)
    first, second, third = read_metrics(folder / "slow")
    assert began < first["time"] < second["time"] < third["time"] < time.time()
    assert not {"phases", "ranks", "parts"} & (first.keys() | third.keys())
    phases = second["phases"]
    assert sum(phases.values()) - phases["save"] == pytest.approx(second["step_time_s"], rel=1e-6)
    assert min(phases["forward"], phases["backward"], phases["optimizer"]) > 0
    # The last rank sleeps in its head twice a micro-batch; the first can only wait for it.
    one, other = second["ranks"]["busy_s"]
    assert other > one + 8 * SLEEP_S
    assert phases["pipeline"] > 8 * SLEEP_S
    check_pipeline(json.loads((folder / "slow" / "pipeline.json").read_text()))
    assert [(event["step"], event["kind"]) for event in read_events(folder / "slow")] == [
        (0, "start"),
        (3, "save"),
        (3, "finish"),
    ]


def check_pipeline(drawn: dict[str, Any]) -> None:
    assert {key: drawn[key] for key in ("step", "schedule", "num_ranks", "num_micro_batches")} == {
        "step": 3,
        "schedule": "zb1p",
        "num_ranks": 2,
        "num_micro_batches": 8,
    }
    ends = {}
    for rank, spans in enumerate(drawn["spans"]):
        assert sorted(span[:3] for span in spans) == sorted([k, rank, m] for k in "FIW" for m in range(8))
        assert all(one[4] <= other[3] for one, other in itertools.pairwise(spans)), "a rank does one thing at a time"
        ends |= {tuple(span[:3]): span[4] for span in spans}
    assert drawn["spans"][0][0][3] == 0.0
    # Both clocks are one: nothing begins before what it needs has ended.
    assert all(begin >= ends["F", 0, number] for kind, _, number, begin, _ in drawn["spans"][1] if kind == "F")
    assert all(begin >= ends["I", 1, number] for kind, _, number, begin, _ in drawn["spans"][0] if kind == "I")
