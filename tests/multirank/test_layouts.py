"""Any layout, the same numbers: three whole training steps against one process in plain torch.

The reference is the whole model, plain autograd, `clip_grad_norm_` and AdamW, over the same samples. Every layout must
give its losses, gradient norms, parameters and expert biases. CI runs a pairwise cover of the axes;
`pytest tests/multirank/test_layouts.py --all-layouts` runs their whole product.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import put_together, reference, relative_errors, rounding_gaps, train_rank, write_config
from layouts import Layout, all_layouts, pairwise_cover
from support import run_ranks, write_dataset
from torch import Tensor

from model import linear
from parallel.zero import load_deepspeed


def check(layout: Layout, folder: Path, meeting: Path) -> tuple[float, float]:
    """Returns the largest error of losses and norms, and of parameters. Those of bf16 may be up to twice as far from
    fp32 as the reference in bf16 is, each for itself."""
    load_deepspeed()
    path = write_config(folder, layout)
    ours = put_together(run_ranks(layout.world_size, train_rank, path, layout, folder=meeting))
    exact = reference(path, layout.skew, torch.float32)
    for name, bias in exact.biases.items():
        assert layout.dtype == "bf16" or torch.equal(ours.biases[name], bias), name
    errors = relative_errors(ours, exact)
    gaps = rounding_gaps(path, layout.skew) if layout.dtype == "bf16" else dict.fromkeys(errors, 5e-6)
    wrong = {name: (error, 2 * gaps[name]) for name, error in errors.items() if error >= 2 * gaps[name]}
    assert not wrong, f"wrong, with their bounds: {wrong}"
    of_steps = max(errors.pop("losses"), errors.pop("grad_norm"))
    return of_steps, max(errors.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    write_dataset(folder / "data")
    return folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        layouts = all_layouts() if metafunc.config.getoption("all_layouts") else pairwise_cover()
        metafunc.parametrize("layout", layouts, ids=str)


def test_same_as_one_process(layout: Layout, folder: Path, tmp_path: Path, record_property: Any) -> None:
    errors = check(layout, folder, tmp_path)
    record_property("layout", f"{layout!s:<96} {errors[0]:8.1e} {errors[1]:8.1e}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bounds_see_a_wrong_gradient(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: of the rows of all experts here, the second half is left out of the gradients of their weights."""
    right = linear._grouped_weight_gradient

    def wrong(grad: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        left_out = torch.arange(len(grad) // 2, len(grad))
        return right(grad.index_fill(0, left_out, 0.0), rows, counts)

    layout = replace(pairwise_cover()[0], pp=2, schedule="dualpipev", ep=2, cp=1, zero_stage=1, rounds=0, dtype=dtype)
    path = write_config(folder, layout)
    reference(path, layout.skew, torch.float32)
    rounding_gaps(path, layout.skew)
    monkeypatch.setattr(linear, "_grouped_weight_gradient", wrong)
    with pytest.raises(AssertionError, match=r"mlp\.experts"):
        check(layout, folder, tmp_path)
