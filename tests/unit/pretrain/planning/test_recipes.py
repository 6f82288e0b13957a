"""The recipe of dsv3_671b.toml, step by step, is the report's (arXiv 2412.19437, sections 4.2 and 4.3)."""

import io
import math
from bisect import bisect

import pytest
from rich.console import Console
from support import PROJECT

from model.rope import yarn_mscale
from pretrain.config import Config, load_config
from pretrain.planning.plan import Plan, plan
from pretrain.planning.steps import Stretch, stretches
from pretrain.planning.tables import render
from pretrain.timeline import TimelineValues

T, B = 10**12, 10**9
RANKS = 2048


def shipped(name: str, *overrides: str) -> Config:
    return load_config(PROJECT / "configs" / f"{name}.toml", overrides)


@pytest.fixture(scope="module")
def config() -> Config:
    return shipped("dsv3_671b")


@pytest.fixture(scope="module")
def planned(config: Config) -> Plan:
    return plan(config, RANKS)


@pytest.fixture(scope="module")
def steps(config: Config) -> list[Stretch]:
    return list(stretches(config.full_timeline, config.train))


def values_at(config: Config, tokens: int) -> TimelineValues:
    """What holds for a step that begins after so many tokens."""
    return config.full_timeline.at(tokens)


def tokens_before(steps: list[Stretch], step: int) -> int:
    stretch = steps[bisect([stretch.step for stretch in steps], step) - 1]
    return stretch.tokens + (step - stretch.step) * stretch.tokens_per_step


def test_architecture(config: Config) -> None:
    model = config.model
    assert (model.num_hidden_layers, model.hidden_size, model.vocab_size) == (61, 7168, 129_280)
    assert (model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank) == (128, 1536, 512)
    assert (model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim) == (128, 64, 128)
    assert (model.first_k_dense_replace, model.intermediate_size, model.moe_intermediate_size) == (3, 18_432, 2048)
    assert (model.n_routed_experts, model.n_shared_experts, model.num_experts_per_tok) == (256, 1, 8)
    assert (model.n_group, model.topk_group, model.routed_scaling_factor, model.scoring_func) == (8, 4, 2.5, "sigmoid")
    assert (model.num_nextn_predict_layers, model.aux_loss_alpha, model.initializer_range) == (1, 1e-4, 0.006)
    assert (model.rms_norm_eps, model.rope_theta, model.rope_scaling) == (1e-6, 10_000, None)


def test_the_other_constants(config: Config) -> None:
    optimizer, parallel = config.optimizer, config.parallel
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip) == (0.9, 0.95, 0.1, 1.0)
    assert optimizer.moments == "bf16"
    assert (config.train.seq_len, config.train.tokens) == (4096, 14.8 * T)
    assert (config.data.fim_rate, config.data.cross_document_attention) == (0.1, True)
    assert (parallel.pp, parallel.ep, parallel.zero_stage, parallel.schedule) == (16, 64, 1, "dualpipe")
    assert {"norms", "mla_up"} <= set(parallel.recompute)
    assert config.checkpoint.ema > 0


def test_parameters_are_the_report_s(planned: Plan) -> None:
    assert planned.counts.total == pytest.approx(671e9, rel=0.005)
    # 36.6B by the README of the published weights, as corrected there; the report says 37B.
    assert planned.counts.active == pytest.approx(36.6e9, rel=0.005)
    assert round(planned.counts.active / 1e9) == 37


def test_steps_to_the_end(config: Config, planned: Plan, steps: list[Stretch]) -> None:
    assert planned.num_steps == 242_789
    # The last step begins before 14.8T tokens, and ends after.
    assert 14.8 * T <= planned.num_tokens < 14.8 * T + steps[-1].tokens_per_step
    assert steps[-1].tokens_per_step == 15_360 * 4096
    # About half of the ramp's batches are smaller than their mean.
    ramp = next(stretch.step for stretch in steps if stretch.tokens >= 469 * B)
    assert ramp == pytest.approx(469 * B / 4096 / (15_360 - 3072) * math.log(15_360 / 3072), rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (10 * T - 1, 2.2e-4),
        (12 * T, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * 2.0 / 4.3)) / 2),
        (14_300 * B, 2.2e-5),
        (14_632 * B, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_700 * B, 7.3e-6),
        (14_800 * B, 7.3e-6),
    ],
)
def test_the_learning_rate(config: Config, tokens: int, rate: float) -> None:
    assert values_at(config, tokens).learning_rate == pytest.approx(rate, rel=1e-12)


def test_the_learning_rate_rises_for_2000_steps(config: Config, steps: list[Stretch]) -> None:
    rates = [values_at(config, tokens_before(steps, step)).learning_rate for step in (0, 1, 1000, 1999, 2000, 2001)]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[3] < 2.2e-4 == rates[4] == rates[5]
    # Linear in tokens, which is linear in steps as far as the batch does not grow.
    assert rates[2] == pytest.approx(1.1e-4, rel=0.07)


def test_the_batch(config: Config, steps: list[Stretch]) -> None:
    sizes = list(dict.fromkeys(stretch.batch_size for stretch in steps))
    assert sizes == [*range(3072, 15_361, 256)]
    assert values_at(config, 0).batch_size == 3072
    assert values_at(config, 469 * B // 2).batch_size == 9216
    assert values_at(config, 469 * B).batch_size == 15_360 == values_at(config, 14_799 * B).batch_size


@pytest.mark.parametrize(
    ("tokens", "speed", "weight"),
    [(0, 0.001, 0.3), (10 * T - 1, 0.001, 0.3), (10 * T, 0.001, 0.1), (14_300 * B - 1, 0.001, 0.1),
     (14_300 * B, 0.0, 0.1), (14_800 * B, 0.0, 0.1)],
)  # fmt: skip
def test_the_bias_s_speed_and_the_weight_of_prediction(
    config: Config, tokens: int, speed: float, weight: float
) -> None:
    values = values_at(config, tokens)
    assert (values.bias_update_speed, values.mtp_weight) == (speed, weight)


def printed_timeline(planned: Plan) -> list[list[str]]:
    file = io.StringIO()
    render(planned, Console(file=file, width=100))
    lines = file.getvalue().split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("Timeline"))
    rows = [line.split() for line in lines[first + 3 :]]
    return rows[: rows.index([])]


def test_the_plan_prints_it(planned: Plan) -> None:
    assert printed_timeline(planned) == [
        ["0", "0", "0", "3,072", "12,582,912", "0.001", "0.3"],
        ["2,000", "28.0B", "0.00022", "3,840", "15,728,640", "0.001", "0.3"],
        ["15,003", "469B", "0.00022", "15,360", "62,914,560", "0.001", "0.3"],
        ["166,495", "10.0T", "0.00022", "15,360", "62,914,560", "0.001", "0.1"],
        ["234,841", "14.3T", "2.2e-05", "15,360", "62,914,560", "0", "0.1"],
        ["240,134", "14.6T", "7.3e-06", "15,360", "62,914,560", "0", "0.1"],
        ["242,789", "14.8T", "end"],
    ]


@pytest.mark.parametrize(
    "planted",
    [
        "timeline.bias_update_speed=0.001",
        "timeline.mtp_weight=0.3",
        "timeline.batch_size_multiple=512",
        "train.tokens=14e12",
    ],
)
def test_another_timeline_prints_otherwise(planned: Plan, planted: str) -> None:
    assert printed_timeline(plan(shipped("dsv3_671b", planted), RANKS)) != printed_timeline(planned)


@pytest.mark.parametrize(("name", "length", "batch"), [("32k", 32_768, 1920), ("128k", 131_072, 480)])
def test_the_stages_of_extension(config: Config, name: str, length: int, batch: int) -> None:
    stage = shipped(f"dsv3_671b_{name}")
    planned = plan(stage, 2048)
    assert planned.num_steps == 1000
    assert [milestone.values for milestone in planned.milestones] == [TimelineValues(7.3e-6, 0.0, 0.1, batch, length)]
    # As many tokens a step as before.
    assert batch * length == 15_360 * 4096
    scaling = stage.model.rope_scaling
    assert scaling is not None
    assert (scaling.factor, scaling.beta_slow, scaling.beta_fast) == (40, 1, 32)
    assert scaling.original_max_position_embeddings == config.train.seq_len
    assert yarn_mscale(scaling.factor, scaling.mscale_all_dim) == pytest.approx(0.1 * math.log(40) + 1)
    assert max(memory.peak for memory in planned.memories) < 80e9 - (2 << 30)


def test_each_stage_begins_where_the_one_before_ended(config: Config) -> None:
    first, second = shipped("dsv3_671b_32k"), shipped("dsv3_671b_128k")
    assert first.run.init_from == str(config.run.folder)
    assert second.run.init_from == str(first.run.folder)
    assert first.model.rope_scaling == second.model.rope_scaling


@pytest.mark.parametrize("name", ["small", "dsv3_2b", "dsv3_16b"])
def test_smaller_models_follow_the_rules_that_they_state(name: str, config: Config) -> None:
    """Learning rate and batch by the compute C (DeepSeek LLM, arXiv 2401.02954), the timeline by shares of its
    tokens."""
    smaller = shipped(name)
    planned = plan(smaller, 1)
    highest = max(milestone.values.learning_rate for milestone in planned.milestones)
    batch = smaller.full_timeline.at(0).batch_size * smaller.train.seq_len
    assert highest == pytest.approx(0.3118 * planned.flops**-0.1250, rel=0.05)
    assert batch == pytest.approx(0.2920 * planned.flops**0.3271, rel=0.07)
    ends = [
        [piece.until / run.train.tokens for piece in run.timeline.learning_rate if piece.until is not None]
        for run in (smaller, config)
        if isinstance(run.timeline.learning_rate, tuple) and run.train.tokens is not None
    ]
    assert ends[0][1:] == pytest.approx(ends[1][1:], rel=0.002)
    rates = [
        [piece.value / highest for piece in run.timeline.learning_rate]
        for run, highest in ((smaller, highest), (config, 2.2e-4))
        if isinstance(run.timeline.learning_rate, tuple)
    ]
    assert rates[0] == pytest.approx(rates[1], rel=0.04)
    assert planned.milestones[1].step == 2000
