"""Mistakes in the `[data]` table are refused with the key, the value, the rule and the remedy."""

import pytest

from data.config import DataConfig, DatasetConfig

CODE = DatasetConfig(path="code")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"datasets": ()}, r"data\.datasets = \[\] must name at least one dataset; make one"),
        ({"datasets": (CODE, CODE)}, r"data\.datasets lists code twice; list it once"),
        ({"fim_rate": 1.5}, r"data\.fim_rate = 1\.5 must lie between 0 and 1; the report uses 0\.1"),
        ({"fim_rate": float("nan")}, r"data\.fim_rate = nan must lie between 0 and 1"),
        ({"prefetch": -1}, r"data\.prefetch = -1 must be a number of batches; 0 reads none ahead"),
    ],
)
def test_data_mistakes(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"datasets": (CODE,)} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(
        ValueError, match=rf"data\.datasets\.weight = {weight} of code must be a number above 0; remove"
    ):
        DatasetConfig(path="code", weight=weight)


def test_a_dataset_has_a_path() -> None:
    with pytest.raises(ValueError, match=r"data\.datasets\.path = '' must name a folder"):
        DatasetConfig(path="")
