"""The configuration: what sets a run apart from what it was made from, and from the defaults."""

from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.reports.config_values import UNTOLD, default_values, flatten, show_value
from pretrain.reports.page import Card, table
from pretrain.reports.run_record import RunRecord

_MAX_SHOWN = 120


def differences(record: RunRecord) -> Card:
    """The keys that differ from the base of the run's file, or, where the run does not say which, from the defaults."""
    config, defaults = flatten(record.config), default_values()
    base = record.origin.get("base")
    values = base.get("values") if isinstance(base, dict) else None
    if isinstance(base, dict) and isinstance(values, dict):
        name, before = str(base.get("file", "its base"))[:200], defaults | flatten(values)
    else:
        name, before = "the defaults", defaults
    rows = [
        [key, shown_value(before[key]) if key in before else "no default", shown_value(config.get(key))]
        for key in dict.fromkeys([*config, *before])
        if key not in UNTOLD and config.get(key) != before.get(key)
    ]
    text = table(f"{len(rows)} keys differ from {name}", ["key", name, "this run"], rows, of_words=True) if rows else ""
    facts = [("differs from", f"{name}: nothing")] if not rows else []
    facts += [(label, value) for label, value in _told(record.origin)]
    return Card("Differences of the configuration", text or "<p></p>", facts, is_wide=True)


def _told(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(origin.get("file"), str):
        yield "file", origin["file"][:300]
    if isinstance(origin.get("overrides"), list):
        for override in origin["overrides"][:50]:
            yield "--set", str(override)[:300]


def shown_value(value: object) -> str:
    """The same, cut where it is long."""
    text = show_value(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} …"
