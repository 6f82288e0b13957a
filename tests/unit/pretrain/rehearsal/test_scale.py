"""A rehearsal is another configuration with the same layers, stages and values; every step of it stands for one of the
run's timeline."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from support import PROJECT

from pretrain.config import Config, check_layout, dump_config, load_config, parse_config
from pretrain.errors import UserError
from pretrain.rehearsal.scale import Rehearsal, describe, make_rehearsal, values_of_run

CONFIGS = sorted((PROJECT / "configs").glob("*.toml"))
KEPT = (
    "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "n_group", "topk_group", "routed_scaling_factor", "num_nextn_predict_layers", "initializer_range", "aux_loss_alpha",
)  # fmt: skip


def load(name: str, *overrides: str) -> Config:
    return load_config(PROJECT / "configs" / f"{name}.toml", overrides)


def rehearsal_of(config: Config, processes: int = 16, steps: int = 2) -> Rehearsal:
    return make_rehearsal(config, vocab_size=2048, processes=processes, steps=steps)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_shipped_configuration(path: Path) -> None:
    config = load_config(path)
    plan = rehearsal_of(config, processes=64 if config.parallel.cp > 1 else 16)
    small = plan.config
    check_layout(small, plan.world_size)
    assert parse_config(tomllib.loads(dump_config(small))) == small
    assert min(plan.steps_of_stretches()) >= 2
    assert all(getattr(small.model, name) == getattr(config.model, name) for name in KEPT)
    assert (small.parallel.pp, small.parallel.schedule) == (config.parallel.pp, config.parallel.schedule)
    assert small.data == config.data
    original = config.full_timeline
    for tokens in plan.starts():
        ours, there = small.full_timeline.at(tokens), int(plan.axis.to_original(tokens))
        assert ours.learning_rate == pytest.approx(original.at(there).learning_rate, rel=1e-6, abs=1e-12)
        assert ours.mtp_weight == original.at(there).mtp_weight
        assert ours.bias_update_speed == original.at(there).bias_update_speed
        assert ours.seq_len * plan.length == original.at(there).seq_len
        rounding = (plan.multiple * plan.batch + original.config.batch_size_multiple) / 2
        assert abs(ours.batch_size * plan.batch - original.at(there).batch_size) <= rounding


def test_the_report() -> None:
    plan = rehearsal_of(load("dsv3_671b"))
    assert plan.world_size == 16
    assert (plan.batch, plan.length) == (768, 128)
    sizes = [plan.config.full_timeline.at(tokens).batch_size for tokens in plan.starts()]
    assert sizes == [4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10, 12, 14, 14, 16, 18, *[20] * 9]
    assert plan.steps_of_stretches() == [3, 14, 2, 2, 2, 2]
    values = values_of_run(plan, 7379)
    assert plan.axis.to_original(7379) == 14.3e12
    assert values == {"lr": 2.2e-5, "bias_update_speed": 0.0, "mtp_weight": 0.1, "batch_size": 20, "seq_len": 32}
    scaled, missing = describe(plan)
    assert "hidden_size 7168 → 32" in scaled
    assert "ep = 64: all in one process" in missing


def test_data_ranks_take_the_processes_that_stages_leave() -> None:
    config = load("dsv3_671b", "parallel.pp=4", "parallel.cp=2")
    plan = rehearsal_of(config)
    assert (plan.world_size, plan.config.parallel.ep, plan.config.parallel.cp) == (16, 4, 2)
    assert plan.config.parallel.max_expert_rows == round(8192 / 128 * 4 / 64) + 1
    plan = rehearsal_of(config, processes=4)
    assert (plan.world_size, plan.config.parallel.ep, plan.config.parallel.max_expert_rows) == (4, 1, 0)
    assert rehearsal_of(load("tiny")).world_size == 2


def test_more_steps_between_boundaries() -> None:
    assert min(rehearsal_of(load("dsv3_671b"), steps=5).steps_of_stretches()) >= 5


def test_fp8_is_said_to_be_left_out() -> None:
    config = load("dsv3_671b", "precision.fp8=block", "parallel.fp8_dispatch=true")
    plan = rehearsal_of(config)
    assert plan.config.precision.fp8 == "off"
    assert any("fp8" in text for text in describe(plan)[1])


def test_lengths_that_change() -> None:
    pieces = "[{ value = 256, until = 500_000 }, { value = 1024 }]"
    plan = rehearsal_of(load("tiny", f"timeline.seq_len={pieces}"))
    lengths = [plan.config.full_timeline.at(tokens).seq_len for tokens in plan.starts()]
    assert sorted(set(lengths)) == [32, 128]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("dsv3_671b", ["parallel.pp=32"], "parallel.pp = 32 needs as many processes to rehearse all stages"),
        (
            "tiny",
            ["timeline.seq_len=[{ value = 256, until = 5e5 }, { value = 65536 }]"],
            "timeline.seq_len has the values 256 and 65,?536; a rehearsal",
        ),
        (
            "dsv3_2b",
            ["timeline.mtp_weight=[{ value = 0.3, until = 37_200_000_001 }, { value = 0.1 }]"],
            "has boundaries so close together within a ramp or decay",
        ),
    ],
)
def test_what_cannot_be_rehearsed(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rehearsal_of(load(name, *overrides))


def test_batches_without_a_common_divisor() -> None:
    config = load("dsv3_671b")
    pieces = config.timeline.batch_size
    assert isinstance(pieces, tuple)
    ragged = (replace(pieces[0], start=3071.0), *pieces[1:])
    config = replace(config, timeline=replace(config.timeline, batch_size=ragged))
    with pytest.raises(UserError, match="the largest 15360 times what divides them all"):
        rehearsal_of(config)
