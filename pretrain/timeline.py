"""Everything that changes over a run, as pure functions of the tokens seen before a step.

The `[timeline]` table gives each value as a number or as pieces that follow one another:

    learning_rate = [
      { shape = "linear", start = 0.0, value = 2.2e-4, until = 2e9 },
      { value = 2.2e-4, until = 10e12 },
      { shape = "cosine", value = 2.2e-5, until = 14.3e12 },
      { value = 7.3e-6 },
    ]

A piece ends at `value` when `until` tokens have been seen; it starts from `start`, or from the value before it, which
the first does not have. The last piece has no `until` and holds for ever. Where a run stops bends none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a timeline, up to `until` tokens."""

    value: float
    until: float | None = None
    shape: Literal["constant", "linear", "cosine"] = "constant"
    start: float | None = None

    def at(self, tokens: float, *, begin: float, before: float) -> float:
        """The value at `tokens`, when the piece begins at `begin` tokens and the value there was `before`."""
        if self.shape == "constant" or self.until is None:
            return self.value
        start = before if self.start is None else self.start
        progress = (tokens - begin) / (self.until - begin)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return start + (self.value - start) * progress


Pieces = float | tuple[Piece, ...]

_WHOLE = ("batch_size", "seq_len")


@dataclass(frozen=True, kw_only=True)
class TimelineConfig:
    """The `[timeline]` table. `batch_size` (sequences a step) and `seq_len`, if given, take the place of those in
    `[train]`; a ramp of `batch_size` is rounded to multiples of `batch_size_multiple`."""

    learning_rate: Pieces
    bias_update_speed: Pieces = 0.001
    mtp_weight: Pieces = 0.3
    batch_size: Pieces | None = None
    batch_size_multiple: int = 1
    seq_len: Pieces | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "bias_update_speed", "mtp_weight", "batch_size", "seq_len"):
            pieces = getattr(self, name)
            if pieces is not None:
                _check(name, pieces)
        if self.batch_size_multiple < 1:
            raise ValueError(f"batch_size_multiple = {self.batch_size_multiple} must be at least 1")
        pieces = self.batch_size if isinstance(self.batch_size, tuple) else ()
        constants = [self.batch_size] if isinstance(self.batch_size, int | float) else [piece.value for piece in pieces]
        for size in constants:
            if size % self.batch_size_multiple:
                raise ValueError(
                    f"batch_size = {size:g} must be a multiple of batch_size_multiple = {self.batch_size_multiple}"
                )
        if isinstance(self.seq_len, tuple) and any(piece.shape != "constant" for piece in self.seq_len):
            raise ValueError("seq_len must be made of constant pieces: a sequence length changes at once, not slowly")


@dataclass(frozen=True)
class TimelineValues:
    """What holds for one step."""

    learning_rate: float
    bias_update_speed: float
    mtp_weight: float
    batch_size: int
    seq_len: int


@dataclass(frozen=True)
class Timeline:
    """The timeline of a run, with [train]'s batch size and sequence length where the table gives none."""

    config: TimelineConfig
    batch_size: int | None
    seq_len: int

    def at(self, tokens: int) -> TimelineValues:
        """The values for the step that begins after `tokens` tokens."""
        config = self.config
        batch_size = config.batch_size if config.batch_size is not None else self.batch_size
        assert batch_size is not None
        multiple = config.batch_size_multiple if config.batch_size is not None else 1
        return TimelineValues(
            learning_rate=value_at(config.learning_rate, tokens),
            bias_update_speed=value_at(config.bias_update_speed, tokens),
            mtp_weight=value_at(config.mtp_weight, tokens),
            batch_size=max(multiple, multiple * round(value_at(batch_size, tokens) / multiple)),
            seq_len=round(value_at(self.seq_len if config.seq_len is None else config.seq_len, tokens)),
        )

    def boundaries(self) -> list[int]:
        """The token counts at which a piece of any value ends."""
        config = self.config
        all_pieces = (
            config.learning_rate,
            config.bias_update_speed,
            config.mtp_weight,
            config.batch_size,
            config.seq_len,
        )
        pieces = [piece for value in all_pieces if isinstance(value, tuple) for piece in value]
        return sorted({math.ceil(piece.until) for piece in pieces if piece.until is not None})


def value_at(pieces: Pieces, tokens: float) -> float:
    """The value after `tokens` tokens."""
    if not isinstance(pieces, tuple):
        return pieces
    begin, before = 0.0, pieces[0].value if pieces[0].start is None else pieces[0].start
    for piece in pieces:
        if piece.until is None or tokens < piece.until:
            return piece.at(tokens, begin=begin, before=before)
        begin, before = piece.until, piece.value
    return before


def _check(name: str, pieces: Pieces) -> None:
    if not isinstance(pieces, tuple):
        _check_value(name, name, pieces)
        return
    if not pieces:
        raise ValueError(f"{name} = [] must hold at least one piece, such as {{ value = 1e-4 }}")
    _check_order(name, pieces)
    for number, piece in enumerate(pieces, 1):
        _check_value(name, f"{name}, piece {number}: value", piece.value)
        if piece.start is not None:
            _check_value(name, f"{name}, piece {number}: start", piece.start)
        if piece.start is not None and piece.shape == "constant":
            raise ValueError(f'{name}, piece {number}: start = {piece.start} needs shape = "linear" or "cosine"')


def _check_order(name: str, pieces: Sequence[Piece]) -> None:
    reached = 0.0
    for number, piece in enumerate(pieces, 1):
        if piece.until is None and (number < len(pieces) or piece.shape != "constant"):
            raise ValueError(f"{name}, piece {number}: `until` is missing; only a last, constant piece may go without")
        if piece.until is not None:
            if piece.until <= reached:
                raise ValueError(f"{name}, piece {number}: until = {piece.until:g} must be above {reached:g} tokens")
            reached = piece.until
    if pieces[0].shape != "constant" and pieces[0].start is None:
        raise ValueError(f"{name}, piece 1: `start` is missing; no value comes before a first piece")


def _check_value(name: str, what: str, value: float) -> None:
    if name in _WHOLE and not (value >= 1 and float(value).is_integer()):
        raise ValueError(f"{what} = {value:g} must be a whole number, at least 1")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{what} = {value} must be a finite number, not below 0")
