"""What is computed again takes no memory, and gives the same gradients to the bit."""

from typing import Any

import pytest
import torch
from support import small_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.init import initialize
from model.recompute import Recompute, _Recipe
from model.transformer import Transformer

PARTS = [("norms",), ("mla_up",), ("swiglu",), ("expert_rows",), ("norms", "mla_up", "swiglu", "expert_rows")]


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors made inside that is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        return results

    def count(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def run(parts: tuple[str, ...], *, deferring: bool = False) -> tuple[int, list[Tensor]]:
    """Live bytes after a forward pass, and the gradients. Attention has equal head sizes, for which torch's kernel
    keeps queries, keys and values themselves."""
    config = small_model(hidden_size=64, intermediate_size=256, moe_intermediate_size=64, v_head_dim=12)
    model = Transformer(config, recompute=frozenset(parts))
    initialize(model, config, seed=0)
    tokens = torch.randint(0, 96, (4, 66), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live:
        losses = model(tokens)
        loss = losses.lm_loss + losses.mtp_loss + losses.balance_loss
        size = live.count()
    model.execution.weight_gradients.deferring = deferring
    loss.backward()
    for work in model.execution.weight_gradients.take():
        work()
    return size, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("deferring", [False, True])
def test_less_memory_same_gradients(parts: tuple[str, ...], deferring: bool) -> None:
    whole, expected = run(())
    less, gradients = run(parts, deferring=deferring)
    assert less < (0.82 if len(parts) > 1 else 0.97) * whole
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_wrong_recipe_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: what is computed again is not what it was."""
    take = _Recipe.take
    monkeypatch.setattr(_Recipe, "take", lambda recipe, number: take(recipe, number) * 1.01)
    _, expected = run(())
    _, gradients = run(("swiglu",))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))


def test_a_recipe_is_followed_once_for_all_who_kept_it() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    recompute = Recompute(frozenset({"mla_up"}))
    x = torch.randn(3, requires_grad=True)
    with recompute.region():
        y = recompute.again("mla_up", double, x)
        z = (y * y.exp() * y.sin()).sum()
    z.backward()
    assert len(calls) == 2
    expected = torch.autograd.functional.vjp(lambda x: (2 * x * (2 * x).exp() * (2 * x).sin()).sum(), x)[1]
    torch.testing.assert_close(x.grad, expected)
