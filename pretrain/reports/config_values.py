"""Values of configurations, laid side by side."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from pretrain.config import Config

# Where a run lies and what it is called sets no two runs apart.
UNTOLD = ("run.dir", "run.name")


def default_values(config: Any = Config, prefix: str = "") -> dict[str, Any]:
    """The defaults of all keys that have one, by dotted keys, as a resolved configuration would hold them."""
    hints = typing.get_type_hints(config)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        key = prefix + item.name.removesuffix("_")
        if dataclasses.is_dataclass(hints[item.name]):
            values |= default_values(hints[item.name], f"{key}.")
        elif item.default is not dataclasses.MISSING:
            values[key] = list(item.default) if isinstance(item.default, tuple) else item.default
    return values


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def show_value(value: object) -> str:
    """A value of a configuration as people read it."""
    return "none" if value is None else json.dumps(value, default=str, ensure_ascii=False)


def differing(*configs: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The keys in which configurations differ, with the values of all, None for one that is not there."""
    flat = [flatten(config) for config in configs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in UNTOLD)
    found = {key: tuple(values.get(key) for values in flat) for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
