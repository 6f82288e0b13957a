"""Any layout, the same numbers: three whole training steps against one process in plain torch.

The reference is the whole model, plain autograd, `clip_grad_norm_` and AdamW, over the same samples. Every layout must
give its losses, gradient norms, parameters and expert biases. CI runs a pairwise cover of the axes;
`pytest tests/multirank/test_layouts.py --all-layouts` runs their whole product.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import put_together, reference, relative_error, rounding_gaps, train_rank, write_config
from layouts import Layout, all_layouts, pairwise_cover
from support import run_ranks, write_dataset

from parallel.zero import load_deepspeed


def check(layout: Layout, folder: Path, meeting: Path) -> tuple[float, float]:
    load_deepspeed()
    path = write_config(folder, layout)
    ours = put_together(run_ranks(layout.world_size, train_rank, path, layout, folder=meeting))
    exact = reference(path, layout.skew, torch.float32)
    for name, bias in exact.biases.items():
        assert layout.dtype == "bf16" or torch.equal(ours.biases[name], bias), name
    errors = relative_error(ours, exact)
    if layout.dtype == "fp32":
        bounds = (1e-5, 1e-5)
    else:
        gaps = rounding_gaps(path, layout.skew)
        bounds = (2 * gaps[0], 2 * gaps[1])
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)
    return errors


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
