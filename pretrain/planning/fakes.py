"""Tensors without memory that a training step takes for real ones, alone on one rank of a large layout.

Three modes of torch lie on one another. `FakeTensorMode` gives every tensor a shape and no storage. `Mirror` above it
supplies what a shape does not tell. What decides about shapes, such as how many rows go where, is whole numbers: small
tensors of them therefore have values beside them, and what is done on such tensors is done on the values too. Other
ranks are not there: each of them is taken to send what this one does. `Ledger` counts the bytes of the storages that
are alive; it can be laid on a real run too.

`as_on_gpu` makes the program take the paths of a GPU, kernels included, of which none is launched. Rows for other ranks
are packed by plain torch, as counts must be known.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from model.kernels import skipping_launches

aten, c10d = torch.ops.aten, torch.ops.c10d
_KNOWN_ELEMENTS = 1 << 23


class UnknownValueError(RuntimeError):
    """A whole number was read that nobody knows."""


class Passed(NamedTuple):
    """A tensor that was sent to, or received from, a rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rank: int


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they are alive: `live`, and the most at once since
    `restart`, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watchers: dict[int, Any] = {}

    def restart(self) -> None:
        """Begins a new peak."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = size = storage.nbytes()
        self._watchers[address] = weakref.ref(storage, lambda _: self._forget(address))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)
        del self._watchers[address]


class Mirror(TorchDispatchMode):
    """Values of small integer tensors, and other ranks that do what this one does. `sent` and `received` are the
    transfers from rank to rank, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Any = WeakIdKeyDictionary()
        self.sent: list[Passed] = []
        self.received: list[Passed] = []
        self.num_collectives = 0

    def tell(self, tensor: Tensor, value: Tensor) -> None:
        """Says what a tensor holds."""
        assert tensor.shape == value.shape, f"{tuple(tensor.shape)} cannot hold {tuple(value.shape)}"
        with _disable_current_modes():
            self._values[tensor] = value.clone()

    def known(self, tensor: Tensor) -> Tensor | None:
        """What a tensor holds, if that is known."""
        value: Tensor | None = self._values.get(tensor)
        return value

    def forget(self, tensors: Any) -> None:
        """Says that something unknown was written to tensors."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._values.pop(tensor, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._communicate(func, args)
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        try:
            out = func(*args, **kwargs)
        except DynamicOutputShapeException:
            value = self._on_values(func, args, kwargs)
            out = torch.empty(value.shape, dtype=value.dtype)
            self.tell(out, value)
            return out
        self._follow(func, args, kwargs, out)
        return out

    def _read(self, tensor: Tensor) -> Any:
        value = self.known(tensor)
        if value is not None:
            with _disable_current_modes():
                return value.item()
        if tensor.dtype.is_floating_point:
            # Losses and norms: they only must be finite.
            return 1.0
        if tensor.dtype in (torch.bool, torch.uint8):
            # Whether something is amiss with them: nothing is.
            return 0
        raise UnknownValueError(f"a step read a whole number that a dry run does not know, of {tuple(tensor.shape)}")

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Does on the values what was done on tensors."""
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if all(tensor.dtype.is_floating_point for tensor in results):
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        size = sum(tensor.numel() for tensor in results)
        if size > _KNOWN_ELEMENTS or any(tensor not in self._values for tensor in given):
            if func._schema.is_mutable:
                self.forget(results)
            return
        made = self._on_values(func, args, kwargs)
        for tensor, value in zip(results, (x for x in tree_leaves(made) if isinstance(x, Tensor)), strict=True):
            self._values[tensor] = value

    def _on_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with _disable_current_modes():
            real_args, real_kwargs = tree_map_only(Tensor, self._values.__getitem__, (tuple(args), dict(kwargs)))
            return func(*real_args, **real_kwargs)

    def _communicate(self, func: Any, args: Sequence[Any]) -> Any:
        work = torch._C._distributed_c10d.FakeWork().boxed()
        name = func._schema.name.removeprefix("c10d::")
        if name == "send":
            tensors, group, rank = args[0], _group(args[1]), args[2]
            self._note(self.sent, tensors, group, rank)
            return work
        if name == "recv_":
            tensors, group, rank = args[0], _group(args[1]), args[2]
            self._note(self.received, tensors, group, rank)
            return work
        self.num_collectives += 1
        if name == "barrier":
            return work
        if name == "alltoall_base_":
            self._all_to_all(args[0], args[1], _group(args[2]), args[3], args[4])
            return work
        if name == "allgather_":
            self._all_gather(args[0], args[1])
        elif name not in ("allreduce_", "broadcast_", "_allgather_base_", "reduce_scatter_", "_reduce_scatter_base_"):
            raise NotImplementedError(f"a dry run knows no {name}")
        return args[0], work

    @staticmethod
    def _note(notes: list[Passed], tensors: Sequence[Tensor], group: dist.ProcessGroup, rank: int) -> None:
        notes += [Passed(tuple(x.shape), x.dtype, dist.get_global_rank(group, rank)) for x in tensors]

    def _all_gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        for parts, tensor in zip(outputs, inputs, strict=True):
            if tensor in self._values:
                for part in parts:
                    self.tell(part, self._values[tensor])

    def _all_to_all(
        self, out: Tensor, given: Tensor, group: dist.ProcessGroup, arriving: list[int], leaving: list[int]
    ) -> None:
        for what, tensor, sizes in (("leave", given, leaving), ("arrive", out, arriving)):
            if sizes and sum(sizes) != len(tensor):
                raise ValueError(f"{sum(sizes)} rows {what} in an all-to-all of a tensor of {len(tensor)}")
        if given not in self._values:
            return
        with _disable_current_modes():
            value = self._values[given]
            if leaving:
                # This rank's own rows lie before what is sent, and are as many as each of the others sends here.
                own = max(arriving)
                before = value.storage_offset() - own * value.stride(0)
                parts = [value.as_strided((own, *value.shape[1:]), value.stride(), before)] * (group.size() - 1)
            else:
                parts = [value.chunk(group.size())[group.rank()]] * group.size()
            if out in self._values:
                # In place: it may be part of a tensor whose values are known with it.
                self._values[out].copy_(torch.cat(parts))
            else:
                self._values[out] = torch.cat(parts)


def _group(boxed: Any) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(boxed) if not isinstance(boxed, dist.ProcessGroup) else boxed


class _FusedAttention(torch.autograd.Function):
    """The shapes of fused attention: q, k [B, H, S, d], v [B, H, S, v] to [B, H, S, v], the heads of a position side by
    side. Besides these, a number for each row is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return tuple(torch.empty_like(x, memory_format=torch.preserve_format) for x in (q, k, v))


def _attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    result: Tensor = _FusedAttention.apply(q, k, v)
    return result


@contextmanager
def as_on_gpu(mirror: Mirror) -> Iterator[None]:
    """Takes the paths of a GPU, with products of experts by torch, which knows tensors without memory. Kernels write
    nothing, but for the one that decides about shapes."""
    from model import experts, flash, quack
    from model.kernels import permute

    count_and_place = permute.count_and_place

    def counting(choices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        value = mirror.known(choices)
        results = count_and_place(choices, num_experts)
        if value is not None:
            with _disable_current_modes():
                values = experts._count_and_place(value, num_experts)
            for tensor, known in zip((choices, *results), (value, *values), strict=True):
                mirror.tell(tensor, known)
        return results

    with (
        skipping_launches(mirror.forget),
        patch.object(permute, "count_and_place", counting),
        patch.object(functional, "scaled_dot_product_attention", _attend),
        patch.object(quack, "is_installed", lambda: False),
        patch.object(flash, "is_installed", lambda: False),
        patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        patch.object(FakeTensor, "is_cuda", True, create=True),
    ):
        yield


@contextmanager
def converting_in_place() -> Iterator[None]:
    """Modules are moved and converted as those of real tensors are: torch would exchange fake ones, and cannot."""

    def apply(module: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for part in module.modules() if recurse else (module,):
            for parameter in part.parameters(recurse=False):
                parameter.data = function(parameter.data)
            for name, buffer in list(part.named_buffers(recurse=False)):
                part._buffers[name] = function(buffer)
        return module

    with patch.object(torch.nn.Module, "_apply", apply):
        yield
