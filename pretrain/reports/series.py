"""Values that a run records now and then, collected in columns: each row is a step, each key a column."""

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]

# Far above what a run of 61 layers and 2048 ranks writes; a file that holds more is not one of ours.
_MAX_KEYS = 4096


@dataclass(frozen=True)
class Series:
    """Columns of the same length [rows], NaN where a row has no such key; `steps` and `tokens` say when."""

    steps: Column
    tokens: Column
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.steps)

    def of(self, key: str) -> Column:
        """A column, NaN throughout where there is none."""
        return self.columns.get(key, np.full(len(self), math.nan))

    def matrix(self, keys: list[str]) -> Column:
        """Columns side by side [rows, keys]."""
        return np.stack([self.of(key) for key in keys], 1) if keys else np.zeros((len(self), 0))


class Collector:
    """Makes a `Series`, row by row."""

    def __init__(self) -> None:
        self._steps, self._tokens = array("d"), array("d")
        self._columns: dict[str, array[float]] = {}

    def add(self, step: float, tokens: float, values: Mapping[str, object]) -> None:
        """A row; values that are no finite numbers become NaN. A row without a number is left out."""
        numbers = {key: number for key, value in values.items() if not math.isnan(number := as_number(value))}
        if not numbers:
            return
        for key in numbers:
            if key not in self._columns and len(self._columns) < _MAX_KEYS:
                self._columns[key] = array("d", [math.nan] * len(self._steps))
        for key, column in self._columns.items():
            column.append(numbers.get(key, math.nan))
        self._steps.append(step)
        self._tokens.append(tokens)

    def series(self) -> Series:
        """All rows."""
        columns = {key: np.array(column) for key, column in self._columns.items()}
        return Series(np.array(self._steps), np.array(self._tokens), columns)


def flattened(table: Mapping[str, object]) -> dict[str, object]:
    """Values of a table of tables by `outer/inner`."""
    return {
        f"{outer}/{inner}": value
        for outer, values in table.items()
        if isinstance(values, dict)
        for inner, value in values.items()
    }


def as_number(value: object) -> float:
    """A finite number, NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
