"""What a machine can do, from a file such as `configs/hardware/h100.toml`: peaks, and what share of them is reached.

An efficiency is a measured or published figure, never one that was fitted to a prediction; the file says where each
comes from.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import parse_table, read_toml
from pretrain.errors import UserError

FOLDER = Path(__file__).parent.parent.parent / "configs" / "hardware"
DEFAULT = FOLDER / "h100.toml"
_GIGA, _TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of a peak: of `bf16_tflops` the products of layers (`dense`), those of routed experts (`grouped`) and
    attention; of `fp8_tflops` the products in FP8, their rounding left out, `grouped_fp8` only where experts have them;
    of the memory's bandwidth what is neither (`elementwise`) and AdamW (`optimizer`); of a link's bandwidth
    collectives in a `node` and over the `network`. `overlapped` is the share of the arithmetic that goes on while rows
    are sent."""

    dense: float
    dense_fp8: float
    grouped: float
    grouped_fp8: float | None = None
    attention: float
    elementwise: float
    optimizer: float
    node: float
    network: float
    overlapped: float

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{item.name} = {value} must be a share above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """GPUs, `gpus_per_node` to a node. Peaks are those of one: of dense products, of its memory in both directions
    together, and of sending in one direction to others in the node or over the network. `forwards` says that rows for
    experts are passed on in the node while others still arrive over the network; else one comes after the other. 1 GB
    is 10^9 bytes."""

    name: str
    gpus_per_node: int
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    forwards: bool = False
    efficiency: Efficiency

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{item.name} = {value} must be above 0")

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs a second that are reached, by kind of arithmetic."""
        reached, bf16, fp8 = self.efficiency, _TERA * self.bf16_tflops, _TERA * self.fp8_tflops
        rates = {
            "dense": bf16 * reached.dense,
            "dense fp8": fp8 * reached.dense_fp8,
            "grouped": bf16 * reached.grouped,
            "attention": bf16 * reached.attention,
        }
        return rates if reached.grouped_fp8 is None else rates | {"grouped fp8": fp8 * reached.grouped_fp8}

    @property
    def memory_rate(self) -> float:
        """Bytes a second of what only moves them."""
        return _GIGA * self.memory_gb_per_s * self.efficiency.elementwise

    @property
    def optimizer_rate(self) -> float:
        """Bytes a second of AdamW."""
        return _GIGA * self.memory_gb_per_s * self.efficiency.optimizer

    @property
    def links(self) -> dict[str, float]:
        """Bytes a second that a GPU sends, by link."""
        return {
            "node": _GIGA * self.node_gb_per_s * self.efficiency.node,
            "network": _GIGA * self.network_gb_per_s * self.efficiency.network,
        }


def find_hardware(file: Path | None) -> Hardware | None:
    """The file that was asked for, or `DEFAULT`, which only a checkout has."""
    if file is not None:
        return load_hardware(file)
    return load_hardware(DEFAULT) if DEFAULT.exists() else None


def load_hardware(file: Path) -> Hardware:
    """Reads a file, or the shipped one of that name. Raises UserError for anything wrong with it."""
    shipped = FOLDER / f"{file.name}.toml"
    if not file.exists() and file.parent == Path() and shipped.is_file():
        file = shipped
    if not file.exists():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
        raise UserError(f"--hardware {file}: there is no such file" + (f"; shipped are {known}" if known else ""))
    return parse_table(read_toml(file), Hardware)
