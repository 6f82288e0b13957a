"""Grouped products in bf16 by QuACK, whose kernels gather rows and compute SwiGLU and its gradient in the products.

How a product is launched is worked out anew for every number of rows. Where that changes from step to step, it is
rounded up to a multiple of `ROWS`, so that there are few; rows past the last expert's are nobody's.

Each of these kernels has as many blocks as the GPU holds, and its tiles are dealt to them. Dealt out beforehand, tiles
wait for blocks that find no room while an all-to-all runs, and a product takes up to twice as long. So where other
kernels run beside, a block takes its next tile when it is done with one; where rows are gathered, QuACK has no such
way.
"""

from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.fused_experts import Backward, Matrices
from model.permute import Copies

OLDEST = (0, 6)
ROWS = 1024
MULTIPLE = 64


@lru_cache(maxsize=1)
def _load() -> Any:
    """What is used of it. Importing it takes seconds. Tiles are those that were fastest at the shape of dsv3_2b on an
    H200 (benchmarks/README.md)."""
    from quack.gemm import gemm
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_dgated, gemm_gated

    def tile(rows: int, columns: int, *, pingpong: bool) -> Any:
        return GemmConfig(
            tile_m=rows, tile_n=columns, cluster_m=2, cluster_n=1, pingpong=pingpong, is_dynamic_persistent=False
        )

    return SimpleNamespace(
        multiply=gemm,
        multiply_and_gate=gemm_gated,
        multiply_and_gate_backward=gemm_dgated,
        plain=tile(128, 192, pingpong=True),
        gated=tile(128, 256, pingpong=False),
        gated_backward=tile(128, 128, pingpong=True),
        wide_gradient=tile(256, 192, pingpong=False),
        narrow_gradient=tile(128, 256, pingpong=False),
    )


@lru_cache
def is_installed() -> bool:
    """Whether it is there, new enough, and this GPU is one that it was tried on."""
    try:
        major, minor, *_ = version("quack-kernels").split(".")
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= OLDEST and torch.cuda.get_device_capability()[0] == 9


def multiplies(hidden: int, inner: int) -> bool:
    """Whether experts of such sizes are multiplied by it here."""
    return inner % MULTIPLE == hidden % MULTIPLE == 0 and is_installed()


class Quack:
    """Grouped products of rows of which each expert has `counts` [E]; other kernels run `beside` or not."""

    weighs_sums = True
    gradient_dtype: torch.dtype | None = None

    def __init__(self, copies: Copies, counts: Tensor, *, beside: bool) -> None:
        self._beside = beside
        # The token of each row, [R] int32, and where each expert's begin and the last one's end, [E + 1] int32.
        self._tokens = _fill_up(copies.tokens.int())
        self._ends = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

    def forward(self, x: Tensor, weights: Tensor | None, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """gate_up [R, 2I], with gates and ups in turns, and results [R, D] of tokens x [T, D]."""
        kernels, (gate_up_proj, down_proj) = _load(), matrices
        gate_up, inner = kernels.multiply_and_gate(
            x,
            gate_up_proj.mT,
            activation="swiglu",
            cu_seqlens_m=self._ends,
            A_idx=self._tokens,
            concat_layout=("B",),
            config=kernels.gated,
            tuned=False,
        )
        return gate_up, self._multiply_rows(inner, down_proj)

    def backward(self, grad: Tensor, x: Tensor, gate_up: Tensor, weights: Tensor, matrices: Matrices) -> Backward:
        """From gradients of tokens [T, D], x [T, D], gate_up [R, 2I] and weights [R]."""
        kernels, (gate_up_proj, down_proj) = _load(), matrices
        grad_gate_up, inner, grad_weights = kernels.multiply_and_gate_backward(
            grad,
            down_proj,
            gate_up,
            activation="swiglu",
            colvec_scale=_fill_up(weights),
            colvec_reduce=True,
            cu_seqlens_m=self._ends,
            A_idx=self._tokens,
            dynamic_scheduler=False,
            config=kernels.gated_backward,
            tuned=False,
        )
        return Backward(
            self._multiply_rows(grad_gate_up, gate_up_proj.mT, concat_layout=("B",)),
            grad_weights[: len(weights)],
            partial(self._add_gate_up, x=x, grad_gate_up=grad_gate_up),
            partial(self._add_down, grad=grad, inner=inner),
        )

    def _add_gate_up(self, total: Tensor, *, x: Tensor, grad_gate_up: Tensor, is_first: bool) -> None:
        tile = _load().wide_gradient
        self._add_products(total.mT, x, grad_gate_up, tile, is_first=is_first, concat_layout=("out",))

    def _add_down(self, total: Tensor, *, grad: Tensor, inner: Tensor, is_first: bool) -> None:
        self._add_products(total, grad, inner, _load().narrow_gradient, is_first=is_first)

    def _multiply_rows(self, rows: Tensor, matrices: Tensor, **options: Any) -> Tensor:
        """Rows [R, in] by the matrices [E, out, in] of their experts."""
        out = rows.new_empty(len(rows), matrices.shape[1])
        taken = torch.zeros(1, dtype=torch.int32, device=rows.device) if self._beside else None
        _multiply(rows, matrices, out, _load().plain, taken, cu_seqlens_m=self._ends, **options)
        return out

    def _add_products(
        self, total: Tensor, of_tokens: Tensor, of_rows: Tensor, tile: Any, *, is_first: bool, **options: Any
    ) -> None:
        """Adds to total [E, M, N] the products of [T, M], gathered, and [R, N] over the rows of each expert."""
        _multiply(
            of_tokens.t(),
            of_rows.t(),
            total,
            tile,
            cu_seqlens_k=self._ends,
            A_idx=self._tokens,
            add_to_output=not is_first,
            **options,
        )


def _multiply(a: Tensor, b: Tensor, out: Tensor, tile: Any, taken: Tensor | None = None, **options: Any) -> None:
    """a bᵀ of every expert. Blocks that take tiles when they are done with others count those that are `taken`, [1]."""
    _load().multiply(
        a,
        b,
        out,
        None,
        taken,
        tile.tile_m,
        tile.tile_n,
        tile.cluster_m,
        tile.cluster_n,
        pingpong=tile.pingpong,
        is_dynamic_persistent=taken is not None,
        **options,
    )


def _fill_up(values: Tensor) -> Tensor:
    return F.pad(values, (0, -len(values) % ROWS))
