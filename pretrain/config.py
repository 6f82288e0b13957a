"""The configuration of a run: TOML in, one frozen tree of small dataclasses out.

Each table is a dataclass beside the code that it configures. Unknown keys are refused with the nearest known name,
`base = "other.toml"` inherits, `--set table.key=value` overrides. Nothing the user wrote is changed in silence.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from keyword import iskeyword
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w
from pydantic import TypeAdapter, ValidationError

from data.config import DataConfig
from model.config import ModelConfig
from parallel.build import check_model
from parallel.config import ParallelConfig
from parallel.schedule import make_schedule
from parallel.zero import OptimizerConfig
from pretrain.errors import UserError
from pretrain.guards import GuardsConfig
from pretrain.logging_config import LoggingConfig
from pretrain.timeline import Timeline, TimelineConfig, value_at

Table = dict[str, Any]
Parsed = TypeVar("Parsed")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`[run]`: the run's folder is `dir`/`name`. `seed` chooses the order of samples and the initial weights;
    `init_seed`, if given, the weights alone. A run that has no checkpoint yet begins with the weights of `init_from`, a
    checkpoint or the folder of another run, and with its moments if it has them. `deterministic` makes GPU kernels
    repeat their bits, at a price."""

    name: str
    dir: str = "runs"
    seed: int = 0
    init_seed: int | None = None
    init_from: str | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"name = {self.name!r} must be a plain folder name; the folder above it is run.dir")
        for name in ("seed", "init_seed"):
            if not 0 <= (getattr(self, name) or 0) < 1 << 63:
                raise ValueError(f"{name} = {getattr(self, name)} must lie between 0 and 2^63 - 1")
        if self.init_from is not None and Path(self.init_from) in (Path(), self.folder):
            raise ValueError(
                f"init_from = {self.init_from!r} must be a checkpoint or the folder of another run; this one goes on "
                "from its own checkpoints by itself"
            )

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return Path(self.dir) / self.name

    @property
    def weights_seed(self) -> int:
        """What chooses the initial weights."""
        return self.seed if self.init_seed is None else self.init_seed


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`[train]`: sizes of a step, and where to stop: after `steps` or `tokens`, whichever is given.

    `batch_size` counts sequences a step over all ranks; each rank works through its share `micro_batch_size` at a time.
    Every `validate_every` steps (0: never) up to `validation_samples` held-out sequences are scored.
    """

    seq_len: int
    micro_batch_size: int
    batch_size: int | None = None
    steps: int | None = None
    tokens: int | None = None
    validate_every: int = 0
    validation_samples: int = 64

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            lowest = 0 if item.name == "validate_every" else 1
            if value is not None and value < lowest:
                raise ValueError(f"{item.name} = {value} must be at least {lowest}")
        if (self.steps is None) == (self.tokens is None):
            given = "neither is given" if self.steps is None else f"both are given, {self.steps} and {self.tokens}"
            raise ValueError(f"steps or tokens says where to stop: {given}; give exactly one")

    def is_end(self, step: int, tokens: int) -> bool:
        """Whether a run that has made `step` steps and seen `tokens` tokens is at its end."""
        return step >= self.steps if self.steps is not None else tokens >= (self.tokens or 0)


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """`[precision]`: the dtype of weights and activations; masters, moments and gradient sums are always fp32. With
    `fp8` the operands of most products are rounded to 8 bits: with a scale for every tile of a tensor ("block", the
    report's), for every tensor ("current"), or for every tensor from the steps before ("delayed"). Scales are
    powers of two unless `fp8_power_of_two` is false. A GPU leaves those products in `dtype` that are no faster in FP8,
    unless `fp8_everywhere`."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["off", "block", "current", "delayed"] = "off"
    fp8_power_of_two: bool = True
    fp8_everywhere: bool = False

    def __post_init__(self) -> None:
        for name, usual in (("fp8_power_of_two", True), ("fp8_everywhere", False)):
            value = getattr(self, name)
            if value != usual and self.fp8 == "off":
                raise ValueError(f'{name} = {str(value).lower()} has no effect with fp8 = "off"; remove it, or set fp8')


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`[checkpoint]`: saved every so many steps (0: only at the end); the last `keep` stay (0: all), and those of every
    `keep_every`-th step for good (0: of none). With `async`, the run goes on while the disk writes, and each rank holds
    a copy of its part in memory of the host. `ema`, such as 0.999 (0: none), is how much of the moving average of the
    weights stays at each step; it is kept in memory of the host, and saved."""

    every: int = 1000
    keep: int = 2
    keep_every: int = 0
    async_: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema} must lie in [0, 1); 0.999 averages about 1000 steps, 0 is no average")
        if self.keep_every and not self.keep:
            raise ValueError(f"keep_every = {self.keep_every} has no effect with keep = 0, which keeps all; remove it")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole configuration; its fields are the tables of the file."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    timeline: TimelineConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    @property
    def full_timeline(self) -> Timeline:
        """The timeline with `[train]`'s sizes where it gives none."""
        return Timeline(self.timeline, self.train.batch_size, self.train.seq_len)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a file, its bases and `key=value` overrides. Raises UserError for anything wrong with them."""
    table = read_table(path)
    for override in overrides:
        _apply_override(table, override)
    return parse_config(table)


def parse_config(table: Table) -> Config:
    """Checks and types a raw table. Raises UserError naming the key, the value and the rule."""
    config = parse_table(table, Config)
    _check_between_tables(config)
    return config


def parse_table(table: Table, kind: type[Parsed]) -> Parsed:
    """A raw table as a dataclass. Raises UserError naming the key, the value and the rule."""
    mistakes = list(_mistakes(table, kind, ""))
    if mistakes:
        raise UserError("\n".join(mistakes))
    try:
        return TypeAdapter(kind).validate_python(_with_field_names(table))
    except ValidationError as error:
        # Types are right already, so what else is reported are only the other branches of a union.
        found = [item for item in error.errors() if item["type"] == "value_error" or item["type"].startswith("missing")]
        known = frozenset(_field_names(kind))
        lines = [_describe(item, known) for item in found or error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as TOML, every default written out; reading it gives the same configuration."""
    return dump_toml(_with_keys(dataclasses.asdict(config)))


def dump_toml(table: Table) -> str:
    """A table as TOML, which has no null: what is None is left out."""
    return tomli_w.dumps(_without_none(table))


def check_layout(config: Config, world_size: int) -> None:
    """Checks that ranks, layers, experts and every batch of the timeline divide. Raises UserError."""
    try:
        shape = config.parallel.mesh_shape(world_size)
        check_model(config.model, config.parallel)
    except ValueError as error:
        raise UserError(str(error)) from None
    for key, length in _sequence_lengths(config).items():
        if length % shape.cp:
            raise UserError(
                f"{key} = {length:g} must be a multiple of parallel.cp = {shape.cp}, among whose ranks positions are "
                "divided; change one of them"
            )
    share = shape.dp * config.train.micro_batch_size
    key, sizes = _batch_sizes(config)
    for size in sizes:
        if size % share:
            nearest = sorted({max(size // share, 1) * share, (size // share + 1) * share})
            raise UserError(
                f"{key} = {size} must be a multiple of train.micro_batch_size × data ranks = "
                f"{config.train.micro_batch_size} × {shape.dp} = {share}; use {' or '.join(map(str, nearest))}"
            )
    first = config.full_timeline.at(0).batch_size
    for size in {first, *(size if key != "timeline.batch_size_multiple" else first + size for size in sizes)}:
        try:
            make_schedule(config.parallel.schedule, num_ranks=shape.pp, num_micro_batches=size // share)
        except ValueError as error:
            raise UserError(
                f"a batch of {size} sequences is {size // share} micro-batches of {config.train.micro_batch_size} for "
                f"each of {shape.dp} data ranks: {error}"
            ) from None


def _batch_sizes(config: Config) -> tuple[str, list[int]]:
    """The key that sets the batch, and the sizes (of a ramp: their common divisor) that must divide."""
    batch = config.timeline.batch_size
    if batch is None:
        return "train.batch_size", [config.full_timeline.at(0).batch_size]
    if isinstance(batch, tuple) and any(piece.shape != "constant" for piece in batch):
        return "timeline.batch_size_multiple", [config.timeline.batch_size_multiple]
    tokens = [0, *config.full_timeline.boundaries()]
    return "timeline.batch_size", [config.full_timeline.at(seen).batch_size for seen in tokens]


def read_table(path: Path, seen: tuple[Path, ...] = ()) -> Table:
    """A file with its bases, unchecked; `seen` files lead to it. Raises UserError if one cannot be read."""
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base, through {' → '.join(str(p.name) for p in seen)}; remove one `base`")
    if not path.exists():
        raise UserError(f"no configuration at {path}" + (f", the base of {seen[-1]}" if seen else ""))
    table = read_toml(path)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UserError(f"base = {base!r} in {path} must be the path of another file")
    return _merged(read_table(path.parent / base, (*seen, path.resolve())), table)


def read_toml(path: Path) -> Table:
    """A file's tables, as they are. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def _merged(base: Table, over: Table) -> Table:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _apply_override(table: Table, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise UserError(f"--set {override} must read table.key=value, such as --set train.steps=100")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {part} is a value, not a table")
    table[parts[-1]] = value


def _mistakes(value: Any, hint: Any, key: str) -> Iterator[str]:
    """What is wrong with a raw value of a field of type `hint`, and with all inside it: types and unknown keys."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    fitting = next((option for option in options if _fits(value, option)), None)
    if fitting is None:
        rules = [_rule(option) for option in options if option is not type(None)]
        is_number = isinstance(value, float) and "a number" in rules
        yield f"{key} = {value!r} must be {'finite' if is_number else ' or '.join(rules)}"
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from _mistakes(item, typing.get_args(fitting)[0], f"{key}, entry {number}")
    elif isinstance(value, dict):
        fields = {_key(name): hint for name, hint in typing.get_type_hints(fitting).items()}
        for name, item in value.items():
            path = _join(key, name)
            if name in fields:
                yield from _mistakes(item, fields[name], path)
            else:
                yield f"{path} is not a known key; {_nearest(name, fields)}"


def _fits(value: Any, option: Any) -> bool:
    """Whether a TOML value is one of `option`: a dataclass, `tuple[X, ...]`, `Literal[...]` or a plain type."""
    if dataclasses.is_dataclass(option):
        return isinstance(value, dict)
    if typing.get_origin(option) is tuple:
        return isinstance(value, list)
    if typing.get_origin(option) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(option))
    if option in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and (option is float or value == int(value))
    return type(value) is option


def _rule(option: Any) -> str:
    """What a value of a type is called, for a user."""
    if dataclasses.is_dataclass(option):
        return "a table"
    if typing.get_origin(option) is tuple:
        return "a list"
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes"}[option]


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"known here: {', '.join(sorted(known))}"


def _join(key: str, name: str) -> str:
    return f"{key}{': ' if ', entry ' in key.rpartition('.')[2] else '.'}{name}" if key else name


def _describe(error: Mapping[str, Any], field_names: frozenset[str]) -> str:
    """One line on what pydantic found: a missing key, or a rule that a dataclass checks itself."""
    key = ""
    for part in error["loc"]:
        if isinstance(part, int):
            key = f"{key}, entry {part + 1}"
        elif part in field_names:
            key = _join(key, part)
    if error["type"] == "value_error":
        return _put_before(key, str(error["ctx"]["error"]))
    if error["type"].startswith("missing"):
        by_option = f", or use --set {key}=..." if "." in key and "," not in key else ""
        return f"{key} is missing and has no default; add it to the file{by_option}"
    return f"{key} = {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _put_before(key: str, message: str) -> str:
    """The message with the path of its key in front, as far as it does not begin with it already."""
    names = key.partition(",")[0].split(".")
    for count in range(len(names)):
        if message.startswith(".".join(names[count:]) + "."):
            return ".".join([*names[:count], message])
    return _join(key, message)


def _field_names(hint: Any) -> Iterator[str]:
    """The names of all fields of the dataclasses that a type is or contains."""
    if dataclasses.is_dataclass(hint):
        for name, inner in typing.get_type_hints(hint).items():
            yield name
            yield from _field_names(inner)
    for argument in typing.get_args(hint):
        yield from _field_names(argument)


def _check_between_tables(config: Config) -> None:
    train, timeline = config.train, config.timeline
    if (train.batch_size is None) == (timeline.batch_size is None):
        given = (
            "neither is given" if train.batch_size is None else f"both are given, train.batch_size = {train.batch_size}"
        )
        raise UserError(
            f"train.batch_size is constant, timeline.batch_size may change over the run: {given}; give exactly one"
        )
    if train.batch_size is not None and timeline.batch_size_multiple != 1:
        raise UserError(
            f"timeline.batch_size_multiple = {timeline.batch_size_multiple} rounds timeline.batch_size, but the batch "
            f"is constant, train.batch_size = {train.batch_size}; remove one of them"
        )
    if config.guards.on_spike == "rollback" and not config.checkpoint.every:
        raise UserError(
            'guards.on_spike = "rollback" goes back to the newest checkpoint, but checkpoint.every = 0 saves only at '
            'the end; set it, or use guards.on_spike = "skip"'
        )
    for key, length in _sequence_lengths(config).items():
        if config.model.num_nextn_predict_layers >= length:
            raise UserError(
                f"model.num_nextn_predict_layers = {config.model.num_nextn_predict_layers} must be below "
                f"{key} = {length:g}"
            )
    if timeline.seq_len is not None and value_at(timeline.seq_len, 0) != train.seq_len:
        raise UserError(
            f"timeline.seq_len starts at {value_at(timeline.seq_len, 0):g}, but train.seq_len = {train.seq_len}; "
            "make them equal"
        )


def _sequence_lengths(config: Config) -> dict[str, float]:
    """Every length that sequences have in the run, by the key that sets it."""
    lengths = {"train.seq_len": float(config.train.seq_len)}
    pieces = config.timeline.seq_len if isinstance(config.timeline.seq_len, tuple) else ()
    for number, piece in enumerate(pieces, 1):
        lengths[f"timeline.seq_len, piece {number}: value"] = piece.value
    return lengths


def _key(name: str) -> str:
    """The key of a field: a word of Python's own has an underscore after it as a field."""
    return name.removesuffix("_")


def _with_keys(value: Any) -> Any:
    return {_key(name): _with_keys(item) for name, item in value.items()} if isinstance(value, dict) else value


def _with_field_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {f"{key}_" if iskeyword(key) else key: _with_field_names(item) for key, item in value.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
