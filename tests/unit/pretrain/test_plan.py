"""A plan counts what a run does: its parameters, its steps one by one, and what a rank really holds in memory."""

import gc
import io
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import PROJECT, run_ranks, small_model
from torch import Tensor

import parallel.zero
from model.init import initialize
from model.transformer import Transformer
from parallel.zero import OptimizerConfig, ZeroOptimizer, load_deepspeed
from pretrain import memory
from pretrain.__main__ import main
from pretrain.config import Config, TrainConfig, load_config
from pretrain.errors import UserError
from pretrain.memory import activation_parts, rank_memory, total
from pretrain.plan import check_memory, plan, stretches
from pretrain.plan_tables import render
from pretrain.timeline import Piece, Timeline, TimelineConfig
from pretrain.units import short

GB = 10**9


def shipped(name: str, *overrides: str) -> Config:
    return load_config(PROJECT / "configs" / f"{name}.toml", overrides)


def printed(name: str, world_size: int = 1, width: int = 80) -> str:
    file = io.StringIO()
    render(plan(shipped(name), world_size), Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "total_count", "active", "mtp"),
    [
        ("dsv3_671b", 671_026_404_352, 36_625_603_584, 11_610_067_968),
        ("dsv3_16b", 15_816_584_704, 2_506_485_248, 593_242_624),
        ("dsv3_2b", 2_773_124_608, 516_589_056, 0),
        ("small", 472_967_168, 142_141_440, 45_323_776),
    ],
)
def test_parameters_of_the_shipped_models(name: str, total_count: int, active: int, mtp: int) -> None:
    counts = plan(shipped(name), 1).counts
    assert (counts.total, counts.active, counts.mtp) == (total_count, active, mtp)


def test_the_report_s_sizes_are_printed() -> None:
    text = printed("dsv3_671b", 128)
    assert "671B, of which a token uses 36.6B" in text
    assert "98.2 % less than the 32,768 of multi-head attention" in text
    assert "24 to 120 on each rank, of 1 sequence" in text


def test_the_report_s_run_in_steps() -> None:
    began = time.process_time()
    planned = plan(shipped("dsv3_671b"), 128)
    assert time.process_time() - began < 2
    assert [(milestone.step, milestone.tokens // GB) for milestone in planned.milestones] == [
        (0, 0),
        (2000, 28),
        (15_003, 469),
        (166_495, 10_000),
        (234_841, 14_300),
        (240_134, 14_633),
    ]
    assert (planned.num_steps, planned.num_tokens // GB) == (242_789, 14_800)
    assert [milestone.values.batch_size for milestone in planned.milestones] == [3072, 3840, *[15_360] * 4]


def count_one_by_one(timeline: Timeline, train: TrainConfig) -> list[tuple[int, int, int]]:
    """Step, tokens before it and its size, for every step."""
    found: list[tuple[int, int, int]] = []
    step, tokens = 0, 0
    while (step < train.steps) if train.steps is not None else (tokens < (train.tokens or 0)):
        values = timeline.at(tokens)
        found.append((step, tokens, values.batch_size * values.seq_len))
        step, tokens = step + 1, tokens + values.batch_size * values.seq_len
    return found


@pytest.mark.parametrize("stop", [{"steps": 500}, {"tokens": 123_456}, {"steps": 1}, {"tokens": 1}])
@pytest.mark.parametrize("multiple", [1, 4, 16])
@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_stretches_are_the_steps_of_the_loop(stop: dict[str, int], multiple: int, shape: str) -> None:
    batch = (
        Piece(value=16.0, until=999.5),
        Piece(shape=shape, value=64.0, until=30_000),  # type: ignore[arg-type]
        Piece(value=32.0, until=60_000),
        Piece(shape="linear", start=64.0, value=16.0, until=90_000),
        Piece(value=48.0),
    )
    lengths = (Piece(value=8, until=50_000), Piece(value=16))
    config = TimelineConfig(learning_rate=1.0, batch_size=batch, batch_size_multiple=multiple, seq_len=lengths)
    timeline = Timeline(config, None, 8)
    train = TrainConfig(seq_len=8, micro_batch_size=1, **stop)
    steps = [
        (stretch.step + index, stretch.tokens + index * stretch.tokens_per_step, stretch.tokens_per_step)
        for stretch in stretches(timeline, train)
        for index in range(stretch.num_steps)
    ]
    assert steps == count_one_by_one(timeline, train)


def test_flops_of_the_run_are_those_of_its_tokens() -> None:
    planned = plan(shipped("dsv3_2b"), 1)
    assert planned.flops == pytest.approx(planned.flops_per_token * planned.num_tokens)
    assert planned.flops_per_token == pytest.approx(6 * 516_589_056, rel=0.2)


def test_memory_follows_zero() -> None:
    model = shipped("dsv3_2b").model
    trained = 2_773_124_608
    for dtype, weights, sums in ((torch.bfloat16, 2, 4), (torch.float32, 4, 0)):
        for ranks in (1, 8):
            held = rank_memory(model, dtype=dtype, data_ranks=ranks, micro_batch_size=1, seq_len=64).held
            parts = {part.name: part.bytes for part in held}
            assert parts["weights"] == pytest.approx(weights * trained, rel=1e-6)
            assert parts["gradients"] == weights * trained
            assert parts.get("gradient sums", 0) == pytest.approx(sums * trained, rel=1e-6)
            assert parts["masters and moments"] == pytest.approx(12 * trained / ranks, rel=1e-6)


def live_bytes() -> int:
    """Bytes of all tensors there are, of gradients too, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not item.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def measure_rank(rank: int, dtype: torch.dtype) -> int:
    """What weights and optimizer take, with the gradients of a micro-batch."""
    parallel.zero.BUCKET_ELEMENTS = 1000
    before = live_bytes()
    model = Transformer(small_model())
    initialize(model, small_model(), seed=0)
    optimizer = ZeroOptimizer(model, config=OptimizerConfig(), dtype=dtype, micro_batch_size=1)
    losses = model(torch.randint(0, 96, (1, 18)))
    (losses.lm_loss + losses.mtp_loss).backward()
    optimizer.end_micro_batch()
    del losses
    return live_bytes() - before


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.bfloat16)])
def test_what_a_rank_holds_is_what_lives(
    ranks: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_deepspeed()
    monkeypatch.setattr(memory, "BUCKET_ELEMENTS", 1000)
    held = total(rank_memory(small_model(), dtype=dtype, data_ranks=ranks, micro_batch_size=1, seq_len=16).held)
    for live in run_ranks(ranks, measure_rank, dtype, folder=tmp_path):
        # Beside the flat tensors live the router's biases, rotary frequencies, counters of steps and little else.
        assert held <= live < held + 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 0, "num_nextn_predict_layers": 0}])
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, changes: dict[str, int | None]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "v_head_dim": 12}
    config = small_model(**{**sizes, **changes})
    model = Transformer(config)
    initialize(model, config, seed=0)
    model.to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 96, (2, 128 + 1 + config.num_nextn_predict_layers))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(tokens)
    parts = activation_parts(config, num_bytes=dtype.itemsize, tokens=256, seq_len=128)
    assert losses.lm_loss.isfinite()
    assert total(parts) == pytest.approx(sum(kept.values()), rel=0.04)


def test_peaks_seen_on_an_h200() -> None:
    """The most that torch.cuda had allocated, in GiB, in three steps of three micro-batches through ZeroOptimizer."""
    seen = [
        ("small", 1, "bf16", 15.08),
        ("small", 2, "bf16", 20.39),
        ("small", 1, "fp32", 17.06),
        ("dsv3_2b", 1, "bf16", 58.51),
        ("dsv3_2b", 2, "bf16", 65.36),
        ("dsv3_2b", 4, "bf16", 76.22),
    ]
    for name, size, dtype, gib in seen:
        planned = plan(shipped(name, f"train.micro_batch_size={size}", f"precision.dtype={dtype}"), 1)
        assert planned.memory.peak / memory.GIB == pytest.approx(gib, rel=0.01)


def test_a_mask_of_documents_is_counted() -> None:
    model = small_model()
    plain, masked = (
        total(activation_parts(model, num_bytes=2, tokens=256, seq_len=128, masked_documents=mask))
        for mask in (False, True)
    )
    assert masked - plain == 256 * 128 * (1 + 2)


@pytest.mark.parametrize(
    ("name", "gib", "message"),
    [
        ("dsv3_2b", 64, "masters and moments, 31.0 GiB; train.micro_batch_size = 1 would fit"),
        ("dsv3_2b", 32, "masters and moments, 31.0 GiB; 16 ranks with train.micro_batch_size = 1 would fit"),
        ("dsv3_671b", 80, "masters and moments, 7629.1 GiB; even 3072 ranks with train.micro_batch_size = 1 would"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(name: str, gib: float, message: str) -> None:
    config = shipped(name)
    planned = plan(config, 1)
    with pytest.raises(UserError) as caught:
        check_memory(config, planned, gib)
    needed = (planned.memory.peak + memory.DEVICE_OVERHEAD) / memory.GIB
    assert str(caught.value).startswith(
        f"a rank needs {needed:.1f} GiB, more than --device-memory {gib}; the largest part is {message}"
    )
    check_memory(config, planned, needed + 0.01)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(PROJECT / "configs" / "dsv3_2b.toml")
    assert main(["plan", config, "--device-memory", "80"]) == 0
    assert "2.77B, of which a token uses 517M" in capsys.readouterr().out
    assert main(["plan", config, "--device-memory", "40"]) == 2
    assert "would fit" in capsys.readouterr().err
    assert main(["plan", config, "--world-size", "7"]) == 2
    assert "train.batch_size = 320 must be a multiple of" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "dsv3_671b"])
def test_tables_fit_a_terminal_of_80_columns(name: str) -> None:
    narrow, wide = (printed(name, width=width).split("\n") for width in (80, 200))
    assert [line.rstrip() for line in narrow] == [line.rstrip() for line in wide]
    assert {"parameters", "ranks", "peak"} <= {line.split()[0] for line in narrow if line.strip()}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1.00K"), (1000, "1.00K"), (9_996, "10.0K"), (99_960, "100K"),
     (516_589_056, "517M"), (36_625_603_584, "36.6B"), (671_026_404_352, "671B"), (14.8e12, "14.8T"), (3e15, "3000T")],
)  # fmt: skip
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text
