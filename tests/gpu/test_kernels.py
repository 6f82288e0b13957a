"""Kernels on a GPU at real sizes, each twice: the same bits."""

from collections.abc import Callable

import pytest
import torch
from dispatch_cases import KINDS, check_rows
from kernel_cases import (
    check_fp8_rows,
    check_keys,
    check_norm,
    check_places,
    check_rotation,
    check_sum_rows,
    check_swiglu,
)
from torch import Tensor

from parallel.rows import Members

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def twice(run: Callable[[], list[Tensor]]) -> None:
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@DTYPES
@pytest.mark.parametrize(
    ("num_rows", "size"), [(8192, 2048), (8192, 512), (1000, 7168), (500, 8192), (333, 1000), (0, 64)]
)
def test_norm(num_rows: int, size: int, dtype: torch.dtype) -> None:
    twice(lambda: check_norm(num_rows, size, dtype, torch.float32))
    twice(lambda: check_norm(num_rows, size, dtype, dtype))


@DTYPES
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("num_rows", "size"), [(49152, 1024), (4096, 8192), (777, 1000), (0, 64)])
def test_swiglu(num_rows: int, size: int, weighted: bool, dtype: torch.dtype) -> None:
    twice(lambda: check_swiglu(num_rows, size, dtype, weighted=weighted))


def test_more_values_than_31_bits_count() -> None:
    from model.kernels.swiglu import swiglu

    num_rows, size = 2**21 + 1, 1024
    gate_up = torch.full((num_rows, 2 * size), 32.0, dtype=torch.bfloat16, device="cuda")
    weights = torch.arange(num_rows, dtype=torch.float32, device="cuda")
    assert torch.equal(swiglu(gate_up, weights)[:, -1], (1024 * weights).bfloat16())


@DTYPES
@pytest.mark.parametrize("num_addends", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "num_slots", "size"),
    [(49152, 8192, 6, 2048), (9000, 2000, 8, 7168), (500, 100, 16, 1000)],
)
def test_sums(num_rows: int, num_tokens: int, num_slots: int, size: int, num_addends: int, dtype: torch.dtype) -> None:
    twice(lambda: check_sum_rows(num_rows, num_tokens, num_slots, size, dtype, num_addends))


@pytest.mark.parametrize("kind", ["even", "skewed", "one expert", "none"])
@pytest.mark.parametrize(("num_choices", "num_experts"), [(196608, 64), (65537, 256), (1000, 1024), (1, 8)])
def test_places(kind: str, num_choices: int, num_experts: int) -> None:
    twice(lambda: check_places(kind, num_choices, num_experts))


@DTYPES
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "rotary_dim"), [((2, 4096, 16, 192), 64), ((1, 2048, 128, 192), 64), ((2, 4096, 1, 64), 64)]
)
def test_rotation(shape: tuple[int, int, int, int], rotary_dim: int, heads_first: bool, dtype: torch.dtype) -> None:
    twice(lambda: check_rotation(shape, rotary_dim, dtype, heads_first=heads_first))


@DTYPES
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("batch", "length", "num_heads"), [(2, 4096, 16), (1, 1000, 128), (1, 77, 3)])
def test_keys(batch: int, length: int, num_heads: int, heads_first: bool, dtype: torch.dtype) -> None:
    twice(lambda: check_keys(batch, length, num_heads, (128, 64, 128), dtype, heads_first=heads_first))


@DTYPES
@pytest.mark.parametrize(("num_rows", "width"), [(8192, 2048), (1000, 7168), (333, 1000), (0, 64)])
def test_fp8_rows(num_rows: int, width: int, dtype: torch.dtype) -> None:
    twice(lambda: check_fp8_rows(num_rows, width, dtype))


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("num_tokens", "num_choices", "members", "size"),
    [
        (8192, 6, Members(4, 16, 2), 2048),
        (5000, 8, Members(64, 4, 63), 7168),
        (333, 8, Members(3, 3, 0), 1000),
        (100, 4, Members(1, 8, 0), 128),
        (0, 2, Members(2, 4, 1), 64),
    ],
)
def test_rows_that_leave(
    num_tokens: int, num_choices: int, members: Members, size: int, kind: str, dtype: torch.dtype
) -> None:
    twice(lambda: check_rows(kind, num_tokens, num_choices, members, size, dtype))
