"""The axes of test_layouts.py, their product, and a cover of all pairs of values."""

import itertools
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

AXES: dict[str, tuple[Any, ...]] = {
    "pp": (1, 2, 4),
    "schedule": ("1f1b", "zb1p", "zbv", "dualpipe", "dualpipev"),
    "ep": (1, 2, 4),
    "cp": (1, 2),
    "extra_dp": (1, 2),
    "zero_stage": (0, 1, 2, 3),
    "recompute": ((), ("norms", "mla_up", "swiglu", "expert_rows"), ("block",)),
    "depth": (0, 1),
    "layers": (3, 7),
    "skew": ("none", "one takes all", "half get nothing"),
    "rounds": (0, 24),
    "node_size": (0, 2),
    "dtype": ("fp32", "bf16"),
}
MAX_RANKS = 8


@dataclass(frozen=True)
class Layout:
    """One value of each axis. The data ranks are those that ep and cp need, times `extra_dp`."""

    pp: int
    schedule: str
    ep: int
    cp: int
    extra_dp: int
    zero_stage: int
    recompute: tuple[str, ...]
    depth: int
    layers: int
    skew: str
    rounds: int
    node_size: int
    dtype: str

    @property
    def world_size(self) -> int:
        return self.pp * max(self.ep, self.cp) * self.extra_dp

    @property
    def model(self) -> dict[str, Any]:
        groups = {} if self.skew == "none" else {"n_group": 1, "topk_group": 1}
        return {
            "num_nextn_predict_layers": self.depth,
            "num_hidden_layers": self.layers,
            "aux_loss_alpha": 0.01,
            **groups,
        }

    @property
    def model_key(self) -> str:
        return f"{self.depth}-{self.layers}-{self.skew == 'none'}"

    @property
    def overrides(self) -> list[str]:
        keys = ("pp", "ep", "cp", "zero_stage")
        values = [f"parallel.{key}={getattr(self, key)}" for key in keys]
        values += [f"parallel.schedule={self.schedule}", f"parallel.max_expert_rows={self.rounds}"]
        return [*values, f"parallel.recompute={list(self.recompute)}"]

    @property
    def is_valid(self) -> bool:
        """Whether the layout exists: what `pretrain` refuses, and axes without effect, are left out."""
        stages = self.pp * (2 if self.schedule in ("zbv", "dualpipev") else 1)
        return (
            self.world_size <= MAX_RANKS
            and not (self.zero_stage > 1 and self.pp > 1)
            and not (self.schedule == "dualpipe" and self.pp == 1)
            and self.layers >= stages - 1
            and not (self.node_size and self.ep == 1)
            and not (self.rounds and (self.ep == 1 or self.zero_stage == 3))
            and not (self.rounds and self.ep % self.cp)
            and 16 // (self.world_size // self.pp // self.cp) >= 2 * self.pp
        )

    def __str__(self) -> str:
        parts = [f"{name}{getattr(self, name)}" for name in ("pp", "ep", "cp")]
        parts += [f"dp{self.world_size // self.pp // self.cp}", self.schedule, f"zero{self.zero_stage}", self.dtype]
        parts += [f"mtp{self.depth}", f"layers{self.layers}", "+".join(self.recompute) or "kept"]
        parts += [self.skew.replace(" ", "_")] if self.skew != "none" else []
        parts += [f"rounds{self.rounds}"] if self.rounds else []
        return "-".join([*parts, *([f"nodes{self.node_size}"] if self.node_size else [])])


@cache
def all_layouts() -> list[Layout]:
    """Every layout there is."""
    product = (Layout(**dict(zip(AXES, values, strict=True))) for values in itertools.product(*AXES.values()))
    return [layout for layout in product if layout.is_valid]


def pairs_of(layout: Layout) -> set[tuple[str, Any, str, Any]]:
    """The pairs of values that a layout shows."""
    values = [(name, getattr(layout, name)) for name in AXES]
    return {(*one, *other) for one, other in itertools.combinations(values, 2)}


@cache
def pairwise_cover() -> list[Layout]:
    """Few layouts that show every pair of values that any layout shows, found greedily among a sample of them and one
    layout for each pair."""
    layouts = list(all_layouts())
    Random(0).shuffle(layouts)
    witnesses = {}
    for (one, values), (other, more) in itertools.combinations(AXES.items(), 2):
        for pair in itertools.product(values, more):
            shows = (layout for layout in layouts if (getattr(layout, one), getattr(layout, other)) == pair)
            if (witness := next(shows, None)) is not None:
                witnesses[one, pair[0], other, pair[1]] = witness
    candidates = {layout: pairs_of(layout) for layout in [*layouts[:2000], *witnesses.values()]}
    missing, cover = set(witnesses), []
    while missing:
        # Of those that show as many, the one with the fewest processes.
        best = max(candidates, key=lambda layout: (len(candidates[layout] & missing), -layout.world_size))
        cover.append(best)
        missing -= candidates[best]
    return cover
