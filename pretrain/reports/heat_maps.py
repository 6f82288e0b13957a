"""Heat maps as small PNG files: a few shades of one colour map, whose lightness alone tells more from less."""

import base64
import struct
import zlib

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

from pretrain.reports.series import Column

MAX_MOMENTS = 160
_COLORS = "cividis"
# So many shades are more than an eye tells apart side by side, and compress far better than all there are.
_SHADES = 32
_UNKNOWN = _SHADES
LOAD_SHOWN = 2.0


def draw_load(load: Column) -> str:
    """The load of a layer's experts over time, [moments, experts], as a `data:` address of a PNG: one row an expert,
    one column a moment, from no load to twice the mean and more."""
    summed = gathered(load, np.add)
    relative = summed / np.maximum(summed.mean(1, keepdims=True), 1e-12)
    return png_address(relative.T, 0.0, LOAD_SHOWN)


def gathered(values: Column, join: np.ufunc) -> Column:
    """At most `MAX_MOMENTS` rows of [moments, …]: neighbours joined by a function such as `np.maximum`."""
    size = -(-len(values) // MAX_MOMENTS)
    return values if size <= 1 else join.reduceat(values, np.arange(0, len(values), size))


def png_address(values: Column, low: float, high: float) -> str:
    """Values [rows, columns] as a `data:` address of a PNG, in shades from `low` to `high`; NaN is transparent."""
    scaled = (values - low) / max(high - low, 1e-300)
    shades = np.clip(np.nan_to_num(scaled) * _SHADES, 0, _SHADES - 1).astype(np.uint8)
    shades[~np.isfinite(values)] = _UNKNOWN
    return "data:image/png;base64," + base64.b64encode(_png(shades)).decode()


def color_scale() -> str:
    """The shades from low to high, as a CSS gradient."""
    stops = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in _palette()[:_SHADES:4].tolist()]
    return f"linear-gradient(to right, {', '.join(stops)})"


def _palette() -> NDArray[np.uint8]:
    colors = colormaps[_COLORS](np.linspace(0, 1, _SHADES))[:, :3]
    return np.concatenate([np.round(255 * colors), np.full((1, 3), 128)]).astype(np.uint8)


def _png(shades: NDArray[np.uint8]) -> bytes:
    """A PNG [rows, columns] of palette entries; every row begins with its filter, none."""
    rows, columns = shades.shape
    pixels = np.pad(shades, ((0, 0), (1, 0))).tobytes()
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0),
        b"PLTE": _palette().tobytes(),
        b"tRNS": bytes([255] * _SHADES + [0]),
        b"IDAT": zlib.compress(pixels, 6),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, body) for name, body in parts.items())


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
