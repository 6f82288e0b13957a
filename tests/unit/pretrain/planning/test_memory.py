"""What a plan says of memory is what lives: tensors of the optimizer, and what forward passes leave behind."""

import gc
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROJECT, run_ranks, small_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.fp8 import LEAST_SIZE_ON_GPU, PARTS_ON_GPU, Fp8Config
from model.transformer import whole_model
from parallel.build import build_executor, build_model, placement, shared_parameters
from parallel.chunk import LossWeights, MicroBatch, Outcome
from parallel.config import ParallelConfig
from parallel.mesh import make_mesh
from parallel.optimizer import OptimizerConfig
from parallel.peer_copies import HEADROOM, NUM_PARTS, _Goods
from parallel.schedule import make_schedule
from parallel.simulate import UNIT, simulate
from parallel.stages import split_layers
from parallel.tape import Tape, run_to_end
from parallel.transfer import Traffic
from parallel.zero import ZeroConfig, load_deepspeed, make_optimizer
from pretrain.config import load_config
from pretrain.planning import memory
from pretrain.planning.activations import Activations, Sizes, peak_of_live
from pretrain.planning.memory import Memory, rank_memories, rounded_weights, total
from pretrain.planning.plan import plan

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


def sizes_of(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, *, size: int = 1, seq_len: int = 64
) -> Activations:
    """Activations on nodes that no expert group spans."""
    return Activations(
        model=model, parallel=parallel, num_bytes=dtype.itemsize, micro_batch_size=size, seq_len=seq_len, node_size=0
    )


def memories(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, ranks: int, **optimizer: Any
) -> tuple[Memory, ...]:
    return rank_memories(
        sizes_of(model, parallel, dtype),
        dtype=dtype,
        optimizer=OptimizerConfig(**optimizer),
        world_size=ranks,
        num_micro_batches=4 * parallel.pp,
    )


def held(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, ranks: int, **optimizer: Any
) -> dict[str, int]:
    return {part.name: part.bytes for part in memories(model, parallel, dtype, ranks, **optimizer)[0].held}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return load_config(PROJECT / "configs" / "dsv3_2b.toml").model


TRAINED = 2_773_124_608


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_memory_follows_zero(model: ModelConfig, stage: Any, ranks: int) -> None:
    parts = held(model, ParallelConfig(zero_stage=stage), BF16, ranks)
    over = {what: ranks if stage >= least else 1 for what, least in (("masters", 1), ("sums", 2), ("weights", 3))}
    assert parts["weights"] == pytest.approx(2 * TRAINED / over["weights"], rel=1e-6)
    assert parts["gradient sums"] == pytest.approx(4 * TRAINED / over["sums"], rel=1e-6)
    assert parts["masters and moments"] == pytest.approx(12 * TRAINED / over["masters"], rel=1e-6)


def test_memory_in_fp32_has_no_second_sums(model: ModelConfig) -> None:
    parts = held(model, ParallelConfig(), FP32, 8)
    assert parts == {
        "weights": pytest.approx(4 * TRAINED, rel=1e-6),
        "gradients": 4 * TRAINED,
        "masters and moments": pytest.approx(12 * TRAINED / 8, rel=1e-6),
    }
    assert held(model, ParallelConfig(zero_stage=0), FP32, 8)["masters and moments"] == 8 * TRAINED


def test_experts_are_divided_over_fewer_ranks(model: ModelConfig) -> None:
    experts = 6 * 64 * 3 * 2048 * 1024
    parts = held(model, ParallelConfig(ep=4), BF16, 8)
    here = TRAINED - experts + experts / 4
    assert parts["weights"] == pytest.approx(2 * here, rel=1e-6)
    assert parts["masters and moments"] == pytest.approx(12 * ((TRAINED - experts) / 8 + experts / 4 / 2), rel=1e-6)


def test_moments_in_bf16_and_on_the_host(model: ModelConfig) -> None:
    assert held(model, ParallelConfig(), BF16, 1, moments="bf16")["masters and moments"] == pytest.approx(8 * TRAINED)
    offloaded = memories(model, ParallelConfig(optimizer_offload=True), BF16, 2)[0]
    assert "masters and moments" not in {part.name for part in offloaded.held}
    assert offloaded.on_host == pytest.approx(6 * TRAINED, rel=1e-6)


def live_bytes() -> int:
    """Bytes of all tensors there are, of gradients too, each storage once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor) and not item.is_meta]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def measure_rank(rank: int, ranks: int, parallel_config: ParallelConfig, dtype: torch.dtype) -> int:
    """What weights and optimizer take after the micro-batches of a step."""
    before = live_bytes()
    mesh = make_mesh(parallel_config.mesh_shape(ranks))
    part = build_model(small_model(), parallel_config, mesh, seed=0, device=torch.device("cpu"))
    optimizer = make_optimizer(
        part,
        mesh=mesh,
        config=OptimizerConfig(),
        zero=ZeroConfig(stage=parallel_config.zero_stage),
        dtype=dtype,
        micro_batch_size=1,
        shared=shared_parameters(part, mesh),
    )
    executor = build_executor(part, parallel_config, mesh, defers=optimizer.defers_weight_gradients)
    num_micro_batches = 4 * parallel_config.pp
    batches = [MicroBatch(torch.randint(0, 96, (1, 18))) for _ in range(num_micro_batches)]
    with optimizer.accumulating():
        executor.train(batches, LossWeights(1.0, 0.3, 1e-4))
    del batches
    executor.executed.clear()
    return live_bytes() - before


@pytest.mark.parametrize(
    ("ranks", "layout", "dtype"),
    [
        (1, {}, FP32),
        (2, {}, BF16),
        (2, {"zero_stage": 0}, BF16),
        (2, {"ep": 2}, BF16),
        (2, {"ep": 2}, FP32),
        (2, {"pp": 2}, BF16),
        (2, {"pp": 2, "schedule": "dualpipe", "zero_stage": 0}, BF16),
        (4, {"pp": 2, "ep": 2, "schedule": "dualpipe"}, BF16),
    ],
)  # fmt: skip
def test_what_a_rank_holds_is_what_lives(
    ranks: int, layout: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    load_deepspeed()
    config = ParallelConfig(**layout)
    expected = [total(found.held) for found in memories(small_model(), config, dtype, ranks)]
    found = run_ranks(ranks, measure_rank, ranks, config, dtype, folder=tmp_path)
    for rank, live in enumerate(found):
        # Beside them live the router's biases, rotary frequencies, counters of steps and little else.
        place = config.mesh_shape(ranks).pp_rank(rank)
        assert expected[place] <= live < expected[place] + 6000


class Storages(TorchDispatchMode):
    """Remembers every storage that operators make, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def live_bytes(self, *, but: set[int]) -> int:
        """Bytes of those that are still there, less some."""
        gc.collect()
        return sum(size for key, (ref, size) in self._made.items() if key not in but and not ref.expired())


WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "v_head_dim": 12}


def measure_forward(rank: int, ranks: int, config: ModelConfig, layout: ParallelConfig, dtype: torch.dtype) -> int:
    """What the forward pass of a whole model leaves behind."""
    mesh = make_mesh(layout.mesh_shape(ranks))
    part = build_model(config, layout, mesh, seed=0, device=torch.device("cpu")).to(dtype)
    chunk = build_executor(part, layout, mesh, defers=True).chunks[0]
    weights = {tensor.untyped_storage()._cdata for tensor in [*part.parameters(), *part.buffers()]}
    # The same tokens whatever ran before: how far their choices are from the mean load depends on them.
    chance = torch.Generator().manual_seed(rank)
    batch = MicroBatch(torch.randint(0, 96, (2, 128 + 1 + config.num_nextn_predict_layers), generator=chance))
    tape, outcome = Tape(), Outcome(torch.zeros(3, dtype=torch.float64))
    with Storages() as storages:
        run_to_end(chunk.forward(tape, None, batch, LossWeights(1.0, 0.3, 1e-4), outcome))
    return storages.live_bytes(but=weights)


PARTS = ("norms", "mla_up", "swiglu", "expert_rows")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("ranks", "layout", "changes"),
    [
        (1, {}, {}),
        (1, {}, {"q_lora_rank": None, "n_shared_experts": 0, "num_nextn_predict_layers": 0}),
        (1, {"recompute": ("norms",)}, {}),
        (1, {"recompute": ("mla_up",)}, {}),
        (1, {"recompute": ("swiglu",)}, {}),
        (1, {"fp8_swiglu": True}, {}),
        (1, {"fp8_swiglu": True, "recompute": ("swiglu",)}, {}),
        (1, {"recompute": ("expert_rows",)}, {}),
        (1, {"recompute": PARTS}, {}),
        (1, {"recompute": PARTS}, {"q_lora_rank": None}),
        (1, {"recompute": ("block",)}, {}),
        (2, {"cp": 2}, {}),
        (2, {"cp": 2, "recompute": PARTS}, {}),
        (2, {"ep": 2}, {}),
        (4, {"ep": 4, "recompute": PARTS}, {}),
        (4, {"ep": 4, "max_expert_rows": 110}, {}),
    ],
)  # fmt: skip
def test_activations_are_what_a_forward_pass_leaves(
    ranks: int, layout: dict[str, Any], changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    config, parallel_config = small_model(**{**WIDE, **changes}), ParallelConfig(**layout)
    counted = sizes_of(config, parallel_config, dtype, size=2, seq_len=128)
    expected = counted.stage(range(config.num_hidden_layers), is_last=True).total()
    found = run_ranks(ranks, measure_forward, ranks, config, parallel_config, dtype, folder=tmp_path)
    # Experts get what the tokens choose, not the mean load.
    assert expected == pytest.approx(sum(found) / ranks, rel=0.04 if parallel_config.ep == 1 else 0.05)


@pytest.mark.parametrize(
    ("name", "size", "gib", "overrides"),
    [
        ("small", 2, 12.3, ()),
        ("small", 8, 21.0, ()),
        ("dsv3_2b", 8, 55.9, ()),
        ("dsv3_2b", 16, 75.6, ()),
        ("dsv3_2b", 8, 66.3, ("optimizer.moments=fp32",)),
        ("dsv3_2b", 16, 86.0, ("optimizer.moments=fp32",)),
        ("dsv3_2b", 24, 105.7, ("optimizer.moments=fp32",)),
        ("dsv3_2b", 32, 125.4, ("optimizer.moments=fp32",)),
        ("dsv3_16b", 1, 76.0, ("model.num_hidden_layers=7", "model.vocab_size=32768")),
        ("dsv3_16b", 2, 79.3, ("model.num_hidden_layers=7", "model.vocab_size=32768")),
    ],
)
def test_peaks_seen_on_a_gpu(name: str, size: int, gib: float, overrides: tuple[str, ...]) -> None:
    """The most that torch.cuda had allocated on an H200, in steps of one micro-batch in bf16 (2026-11-28)."""
    of_step = (f"train.micro_batch_size={size}", f"train.batch_size={size}")
    planned = plan(load_config(PROJECT / "configs" / f"{name}.toml", [*of_step, *overrides]), 1)
    assert planned.memory.peak / memory.GIB == pytest.approx(gib, rel=0.006, abs=0.1)


def test_a_mask_of_documents_is_counted() -> None:
    plain, masked = (
        Activations(
            model=small_model(),
            parallel=ParallelConfig(),
            num_bytes=2,
            micro_batch_size=2,
            seq_len=128,
            masked_documents=mask,
        )
        .stage(range(3), is_last=True)
        .total()
        for mask in (False, True)
    )
    assert masked - plain == 256 * 128 * (1 + 2)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"])
def test_live_micro_batches_are_those_of_the_timeline(schedule: Any) -> None:
    made = make_schedule(schedule, num_ranks=4, num_micro_batches=12)
    stages, one = range(made.num_stages), Sizes(all=1)
    unit = {(stage,): one for stage in stages}
    pairs = {places: one for places in product(stages, stages)}
    peaks = [peak_of_live(steps, {"kept": unit, "deferred": unit, "pair": pairs})["all"] for steps in made.steps]
    assert tuple(peaks) == simulate(made, UNIT).peak_activations


def test_a_pipeline_s_first_rank_holds_most() -> None:
    config = small_model(num_hidden_layers=8)
    parallel_config = ParallelConfig(pp=4)
    first, *_, last = memories(config, parallel_config, BF16, 4)
    assert [memory.live for memory in memories(config, parallel_config, BF16, 4)] == [4, 3, 2, 1]
    layers = split_layers(config, placement(parallel_config).num_stages)
    one = sizes_of(config, parallel_config, BF16).stage(layers[0], is_last=False)
    assert {part.name: part.bytes for part in first.activations if part.name in one} == {
        name: 4 * size for name, size in one.items() if size
    }
    assert "loss" in {part.name for part in last.activations}


def test_tokens_are_copied_to_the_ranks_of_their_experts() -> None:
    published = load_config(PROJECT / "configs" / "dsv3_671b.toml").model
    nodes, ranks = Activations(
        model=published, parallel=ParallelConfig(ep=64), num_bytes=2, micro_batch_size=1, seq_len=4096
    ).copies
    generator = torch.Generator().manual_seed(0)
    hit_nodes, hit_ranks = 0, 0
    for _ in range(2000):
        groups = torch.randperm(8, generator=generator)[:4].sort().values
        chosen = torch.randperm(128, generator=generator)[:8]
        experts = groups[chosen // 32] * 32 + chosen % 32
        hit_nodes += len((experts // 32).unique())
        hit_ranks += len((experts // 4).unique())
    assert nodes == pytest.approx(hit_nodes / 2000, rel=0.01)
    assert ranks == pytest.approx(hit_ranks / 2000, rel=0.01)


def test_outboxes_hold_what_leaves() -> None:
    model = load_config(PROJECT / "configs/dsv3_2b.toml").model
    planned = sizes_of(model, ParallelConfig(ep=2), BF16, size=8, seq_len=4096)
    # Half of them for the other rank.
    count = round(8 * 4096 * planned.copies[-1])
    rows = torch.empty(count, model.hidden_size, dtype=BF16, device="meta")
    choices = torch.empty(count, model.num_experts_per_tok, device="meta")
    goods = _Goods(Traffic([[count // 2] * 2] * 2, 0), [rows, choices.to(FP32), choices.to(INT64)])
    assert planned.outboxes == pytest.approx(NUM_PARTS * HEADROOM * max(goods.ends), rel=1e-3)
    assert sizes_of(model, ParallelConfig(ep=2, copy_engines=False), BF16).outboxes == 0


def test_rounded_weights_are_kept_twice() -> None:
    model = load_config(PROJECT / "configs/dsv3_2b.toml").model
    fp8 = Fp8Config(recipe="block", parts=PARTS_ON_GPU)
    attention = 2048 * (16 * 192 + 512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048
    mlps = 3 * 2048 * (8192 + 6 * 2 * 1024)
    assert rounded_weights(model, whole_model(model), fp8) == 2 * (7 * attention + mlps)
    large = Fp8Config(recipe="block", parts=PARTS_ON_GPU, least_size=LEAST_SIZE_ON_GPU)
    assert rounded_weights(model, whole_model(model), large) == 2 * 3 * 2048 * 8192
    assert rounded_weights(model, whole_model(model), Fp8Config()) == 0
