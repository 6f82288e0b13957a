"""The load of each expert over a run, as it was recorded now and then."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.reports.series import Column

_MAX_SNAPSHOTS = 512


@dataclass
class Idle:
    """Of each expert of a layer [experts]: how many of the newest snapshots in a row gave it no token, how many tokens
    it would have had by the layer's mean, and the step and tokens of the first of them. `seen` counts snapshots."""

    snapshots: NDArray[np.int64]
    expected: Column
    step: Column
    tokens: Column
    seen: int = 0

    def add(self, step: float, tokens: float, counts: Column) -> None:
        """A snapshot [experts]."""
        idle = counts == 0
        begins = idle & (self.snapshots == 0)
        self.step[begins], self.tokens[begins] = step, tokens
        self.snapshots = np.where(idle, self.snapshots + 1, 0)
        self.expected = np.where(idle, self.expected + counts.mean(), 0.0)
        self.seen += 1


@dataclass(frozen=True)
class LoadHistory:
    """Tokens that each expert of a layer received, at moments spread over the run: `tokens` [moments] is when, and
    `layers` holds [moments, experts] by name; `idle` looks at all moments, also those left out here."""

    tokens: Column
    layers: dict[str, Column]
    idle: dict[str, Idle] = field(default_factory=dict)


class LoadReader:
    """Keeps at most `_MAX_SNAPSHOTS` loads, evenly spread however many there are; what does not look like the first is
    left out."""

    def __init__(self) -> None:
        self._kept: list[tuple[float, dict[str, Column]]] = []
        self._shapes: dict[str, int] = {}
        self._idle: dict[str, Idle] = {}
        self._stride = 1
        self._seen = 0

    def add(self, step: float, tokens: float, load: object) -> None:
        """The `expert_load` of a line, if it has one."""
        if not isinstance(load, dict):
            return
        layers = _layers(load)
        shapes = {name: len(counts) for name, counts in layers.items()}
        if not layers or (self._shapes and shapes != self._shapes):
            return
        self._shapes = shapes
        for name, counts in layers.items():
            if name not in self._idle:
                zeros = np.zeros(len(counts))
                self._idle[name] = Idle(np.zeros(len(counts), np.int64), zeros, zeros.copy(), zeros.copy())
            self._idle[name].add(step, tokens, counts)
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        self._kept.append((tokens, layers))
        if len(self._kept) > _MAX_SNAPSHOTS:
            self._kept = self._kept[::2]
            self._stride *= 2

    def history(self) -> LoadHistory:
        """All that was kept."""
        return LoadHistory(
            tokens=np.array([tokens for tokens, _ in self._kept]),
            layers={name: np.stack([layers[name] for _, layers in self._kept]) for name in self._shapes},
            idle=self._idle,
        )


def _layers(load: dict[str, Any]) -> dict[str, Column]:
    """The layers whose load is a list of numbers."""
    layers = {}
    for name, counts in load.items():
        try:
            numbers = np.array(counts, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            continue
        if numbers.ndim == 1 and len(numbers):
            layers[name] = np.where(np.isfinite(numbers), numbers, 0.0)
    return layers
