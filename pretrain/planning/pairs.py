"""What an overlapped pair of passes keeps: the forward pass has run some layers, the backward pass has freed some.

Turns are those of `parallel.tape`, of which the backward pass has the first. Counted is what a turn leaves, as in
`pretrain.planning.activations`, not what it has for a while. Where rows go in two hops, both passes have more turns of
the same layer, and meet as they do with one.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from pretrain.planning.activations import Activations, Sizes

_TURNS = 3


class Turns(NamedTuple):
    """Of a stage, what each turn of its forward pass adds, and what each of its backward pass frees."""

    forward: list[Sizes]
    backward: list[Sizes]


def turns(activations: Activations, layers: Sequence[int], *, is_last: bool) -> Turns:
    """Those of a stage. Passes take turns only where experts are elsewhere. Rows that go in rounds are computed again,
    in as many turns as there are rounds: as if the backward pass had freed nothing before the other ends."""
    if not activations.copies or activations.num_rounds > 1:
        whole = activations.stage(layers, is_last=is_last)
        return Turns([whole], [whole] if not activations.copies else [Sizes(), whole])
    # By turns what comes before experts and the experts of a layer; at last what comes after all.
    parts = [activations.masks()]

    def add_layer(index: int) -> None:
        kept = Sizes(activations.kept(index))
        experts = Sizes({"routed experts": kept.pop("routed experts", 0)})
        parts[-1].update(kept)
        if index in activations.model.moe_layers:
            parts.extend((experts, Sizes()))

    main, *depths = activations.ends(is_last=is_last)
    for index in layers:
        add_layer(index)
    parts[-1].update(main)
    for index, end in zip(activations.blocks_of((), is_last=is_last), depths, strict=True):
        add_layer(index)
        parts[-1].update(end)
    again = _TURNS if "block" in activations.parallel.recompute else 0
    return Turns(_in_turns(parts, 0), _in_turns(parts[::-1], again))


def _in_turns(parts: Sequence[Sizes], again: int) -> list[Sizes]:
    """Of each layer: nothing in the turns that compute it `again`; nothing while rows leave, or their gradients; its
    experts; the rest, with what comes before the next."""
    made = [parts[0]]
    for experts, rest in zip(parts[1::2], parts[2::2], strict=True):
        made += [*(Sizes() for _ in range(again + 1)), experts, rest]
    return made


def most_beside(forward: Sequence[Sizes], backward: Sequence[Sizes]) -> Sizes:
    """What the turns of a forward pass have added, less what those of a backward pass have freed, when it is most."""
    live, most = Sizes(), Sizes()
    for added, freed in zip_longest(forward, backward, fillvalue=Sizes()):
        live.subtract(freed)
        live.update(added)
        most = max(most, live.copy(), key=Sizes.total)
    return most
