"""Numbers as people read them."""

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def short(number: float) -> str:
    """Three digits and a unit: 671B, 36.6B, 14.8T; numbers below 1000 in three digits."""
    for size, unit in _UNITS:
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.3g}"
