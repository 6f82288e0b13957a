"""Numbers beside the plots: what columns come to, in words."""

from collections.abc import Callable, Iterator
from typing import SupportsFloat

import numpy as np

from pretrain.reports.page import Facts
from pretrain.reports.series import Column


def known(*facts: tuple[str, str]) -> Facts:
    """Those that say something."""
    return [fact for fact in facts if fact[1]]


def of(values: Column, reduce: Callable[[Column], SupportsFloat], show: Callable[[float], str]) -> str:
    """What `reduce` makes of the known values, empty where there is none."""
    finite = values[np.isfinite(values)]
    return show(float(reduce(finite))) if len(finite) else ""


def last(values: Column, template: str) -> str:
    """The last known value."""
    return of(values, lambda finite: finite[-1], template.format)


def tail(values: Column) -> Column:
    """The last hundredth of the run."""
    return values[-max(1, len(values) // 100) :]


def unless_zero(values: Column) -> Column:
    """NaN throughout where nothing but zeros was recorded."""
    return values if np.nan_to_num(values).any() else np.full_like(values, np.nan)


def duration(seconds: float) -> str:
    """Two units: 3 d 4 h, 2 h 5 min, 7 min 30 s."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((index for index, (_, size) in enumerate(units) if seconds >= size), len(units) - 1)
    parts = []
    for name, size in units[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)


def spread(names: list[str], most: int) -> Iterator[str]:
    """At most so many of the names, evenly spread, the first and the last among them."""
    for index in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).astype(int)) if names else ():
        yield names[index]
