"""The end of a step on a GPU, where AdamW is a kernel, against torch's AdamW and clipping."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_cases import check_kernel, update_with_kernel
from torch import Tensor, nn

from parallel.launch import Place, join_processes, leave_processes
from parallel.mesh import Mesh, MeshShape, make_mesh
from parallel.optimizer import Optimizer, OptimizerConfig
from parallel.zero import ZeroConfig, load_deepspeed, make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16, FP32 = torch.bfloat16, torch.float32
STEPS, RATE = 3, 1e-2


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("numel", [100_000_000, 10_000_019])
def test_kernel_is_torch_s_adamw(numel: int, moments: Any) -> None:
    check_kernel(numel, moments, "cuda", rounds_to_nearest=True)
    one, other = (update_with_kernel(numel, moments, "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    load_deepspeed()
    join_processes(Place(0, 1, 0, torch.device("cuda", 0), 1))
    yield make_mesh(MeshShape(world_size=1))
    leave_processes()


def make_module() -> nn.Module:
    """Matrices, of which one gets no gradient, and vectors."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = {"first": (37, 1001), "unused": (8, 16), "norm": (1001,), "second": (512, 333)}
    module = nn.Module()
    for name, shape in shapes.items():
        value = torch.randn(shape, device="cuda", generator=generator)
        module.register_parameter(name, nn.Parameter(value.to(BF16).float()))
    return module


def gradients(module: nn.Module) -> dict[str, list[Tensor]]:
    """Of each step, exact in bf16."""
    generator = torch.Generator("cuda").manual_seed(1)
    return {
        name: [torch.randn(p.shape, device="cuda", generator=generator).to(BF16) for _ in range(STEPS + 1)]
        for name, p in module.named_parameters()
        if name != "unused"
    }


def train_plainly(moments: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Norms, and weights after all steps."""
    module = make_module()
    found = gradients(module)
    groups = [
        {"params": [p for p in module.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(STEPS):
        for name, parameter in module.named_parameters():
            parameter.grad = 2 * found[name][step].float() if name in found else torch.zeros_like(parameter)
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), 1.0)))
        adam.step()
        for state in adam.state.values():
            for key in ("exp_avg", "exp_avg_sq") if moments == "bf16" else ():
                state[key] = state[key].to(BF16).to(FP32)
    return norms, {name: parameter.detach() for name, parameter in module.named_parameters()}


def take_step(optimizer: Optimizer, module: nn.Module, found: dict[str, list[Tensor]], step: int) -> tuple[float, bool]:
    """Two micro-batches with the same gradients."""
    with optimizer.accumulating():
        for _ in range(2):
            for name, parts in found.items():
                parameter = module.get_parameter(name)
                parameter.backward(parts[step].to(parameter.dtype))
    return optimizer.step(RATE)


def snapshot(optimizer: Optimizer, module: nn.Module) -> list[Tensor]:
    kept = [tensor for shard in optimizer.shards() for tensor in shard.tensors.values()]
    return [tensor.detach().clone() for tensor in (*kept, *module.parameters())]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "dtype", "offload"),
    [(0, BF16, "none"), (0, FP32, "none"), (1, BF16, "none"), (1, FP32, "none"), (1, BF16, "cpu"), (2, BF16, "none")],
)
def test_same_as_torch(mesh: Mesh, stage: Any, dtype: torch.dtype, offload: Any, moments: Any) -> None:
    norms, expected = train_plainly(moments)
    module = make_module()
    found = gradients(module)
    optimizer = make_optimizer(
        module,
        mesh=mesh,
        config=OptimizerConfig(moments=moments),
        zero=ZeroConfig(stage=stage, offload=offload),
        dtype=dtype,
        micro_batch_size=1,
        shared={},
    )
    for step, norm in enumerate(norms):
        before = snapshot(optimizer, module)
        found["norm"][STEPS].fill_(torch.nan if step else torch.inf)
        assert not take_step(optimizer, module, found, STEPS)[1]
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, module), strict=True))
        assert take_step(optimizer, module, found, step) == (pytest.approx(norm, rel=1e-5), True)
    for shard in optimizer.shards():
        master, whole = shard.tensors["param"], expected[shard.name].flatten()
        assert (master - whole[shard.start :][: len(master)].to(master.device)).norm() < 1e-5 * whole.norm()
    for name, parameter in module.named_parameters():
        tolerance = 1e-5 if dtype == FP32 else 4e-3
        assert (parameter.float() - expected[name]).norm() < tolerance * expected[name].norm()
