"""Results that are computed again in the backward pass instead of kept (report, section 3.2.3).

A product keeps its input for the gradient of its weight, attention its queries, keys and values. Where such a tensor is
cheap to compute from something that is kept anyway, only the recipe is kept: inside `region`, what autograd saves is
looked up among the results of `again`, and a recipe takes the place of the tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from model.fp8 import Fp8
from model.linear import WeightGradients

Recomputable = Literal["norms", "mla_up", "swiglu", "expert_rows"]
Result = TypeVar("Result", Tensor, tuple[Tensor, ...])


class _Recipe:
    """How to compute some tensors again; what one use computes the others take."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Any, ...]) -> None:
        self._function, self._inputs = function, inputs
        self._results: tuple[Tensor, ...] = ()
        self.uses = 0

    @torch.no_grad()
    def take(self, number: int) -> Tensor:
        if not self._results:
            made = self._function(*self._inputs)
            self._results = made if isinstance(made, tuple) else (made,)
        result = self._results[number]
        self.uses -= 1
        if not self.uses:
            self._results = ()
        return result


@dataclass(frozen=True)
class _Kept:
    """What autograd keeps in place of a tensor: a recipe, which of its results, and how the tensor lies in that."""

    recipe: _Recipe
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recompute:
    """Which `parts` a rank computes again; a value that its layers share."""

    def __init__(self, parts: frozenset[str] = frozenset()) -> None:
        self.parts = parts
        # By the storage of a result, which lasts until the region ends.
        self._known: dict[int, tuple[_Recipe, int, Tensor]] = {}

    def again(self, part: Recomputable, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """function(*inputs), whose results are kept as a recipe by whoever saves them in this region. What the function
        saves for its own gradient is kept as it is, so it should be made of its inputs."""
        results = function(*inputs)
        self.remember(part, results, function, *inputs)
        return results

    def remember(
        self,
        part: Recomputable,
        results: Tensor | tuple[Tensor, ...],
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        *inputs: Tensor,
    ) -> None:
        """Says that `results` are function(*inputs), whoever made them."""
        if part not in self.parts or not torch.is_grad_enabled():
            return
        recipe = _Recipe(function, tuple(tensor.detach() for tensor in inputs))
        for number, result in enumerate(results if isinstance(results, tuple) else (results,)):
            self._known[result.untyped_storage()._cdata] = recipe, number, result.detach()

    @contextmanager
    def region(self) -> Iterator[None]:
        """Where results of `again` are looked for among what is saved."""
        if not self.parts or not torch.is_grad_enabled():
            yield
            return
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Kept:
        found = self._known.get(tensor.untyped_storage()._cdata)
        if found is None:
            return tensor
        recipe, number, _ = found
        recipe.uses += 1
        return _Kept(recipe, number, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Tensor | _Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.take(kept.number).as_strided(kept.size, kept.stride, kept.offset)


@dataclass(frozen=True)
class Execution:
    """How the layers of a rank run: which weight gradients wait, what is computed again, which products are in FP8, and
    whether the inputs of SwiGLU are kept in it."""

    weight_gradients: WeightGradients = field(default_factory=WeightGradients)
    recompute: Recompute = field(default_factory=Recompute)
    fp8: Fp8 = field(default_factory=Fp8)
    packs_swiglu: bool = False
