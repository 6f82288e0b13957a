"""What an overlapped pair of passes keeps: the forward pass has run some layers, the backward pass has freed some.

Turns are those of `parallel.tape`, of which the backward pass has the first. Counted is what a turn leaves, as in
`pretrain.planning.activations`, not what it has for a while. Where rows go in two hops, both passes have more turns of
the same layer, and meet as they do with one.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from parallel.tape import TURNS_A_LAYER, TurnCounts, pauses_left_out
from pretrain.planning.activations import Activations, Sizes


class Turns(NamedTuple):
    """Of a stage, what each turn of its forward pass adds, and what each of its backward pass frees; and how many of
    them are pauses if it takes all."""

    forward: list[Sizes]
    backward: list[Sizes]
    forward_counts: TurnCounts = TurnCounts(0, 0)
    backward_counts: TurnCounts = TurnCounts(0, 0)


def turns(activations: Activations, layers: Sequence[int], *, is_last: bool) -> Turns:
    """Those of a stage. Passes take turns only where experts are elsewhere. Rows that go in rounds are computed again,
    in as many turns as there are rounds: as if the backward pass had freed nothing before the other ends."""
    if not activations.copies or activations.num_rounds > 1:
        whole = activations.stage(layers, is_last=is_last)
        return Turns([whole], [whole] if not activations.copies else [Sizes(), whole])
    # What comes before the second half of each layer, and after the last; and these halves: whether experts, and what.
    between, halves = [activations.masks()], list[tuple[bool, Sizes]]()

    def add_layer(index: int) -> None:
        kept, is_moe = Sizes(activations.kept(index)), index in activations.model.moe_layers
        name = "routed experts" if is_moe else "other MLPs"
        halves.append((is_moe, Sizes({name: kept.pop(name, 0)})))
        between[-1].update(kept)
        between.append(Sizes())

    main, *depths = activations.ends(is_last=is_last)
    for index in layers:
        add_layer(index)
    between[-1].update(main)
    for index, end in zip(activations.blocks_of((), is_last=is_last), depths, strict=True):
        add_layer(index)
        between[-1].update(end)
    forward, backward = [between[0]], [between[-1]]
    for (is_moe, half), after in zip(halves, between[1:], strict=True):
        # Experts begin when rows have arrived.
        forward += [Sizes(), half, after] if is_moe else [half, Sizes(), after]
    again = TURNS_A_LAYER if "block" in activations.parallel.recompute else 0
    for (_, half), before in zip(halves[::-1], between[-2::-1], strict=True):
        # A layer that is computed again gives nothing back meanwhile, nor while gradients of results are under way.
        backward += [*(Sizes() for _ in range(again + 1)), half, before]
    with_experts = sum(is_moe for is_moe, _ in halves)
    forward_counts, backward_counts = (
        TurnCounts(turns * with_experts, turns * (len(halves) - with_experts))
        for turns in (TURNS_A_LAYER, TURNS_A_LAYER + again)
    )
    return Turns(forward, backward, forward_counts, backward_counts)


def side_by_side(one: Turns, other: Turns) -> tuple[list[Sizes], list[Sizes]]:
    """The turns of the forward pass of one stage and the backward pass of the other, without the pauses they leave
    out: what would come after each of these comes in the turn before."""
    fewer_backward, fewer_forward = map(len, pauses_left_out(other.backward_counts, one.forward_counts))
    first, kept = fewer_forward + 1, len(other.backward) - fewer_backward - 1
    forward = [sum(one.forward[:first], Sizes()), *one.forward[first:]]
    return forward, [*other.backward[:kept], sum(other.backward[kept:], Sizes())]


def most_beside(forward: Sequence[Sizes], backward: Sequence[Sizes]) -> Sizes:
    """What the turns of a forward pass have added, less what those of a backward pass have freed, when it is most."""
    live, most = Sizes(), Sizes()
    for added, freed in zip_longest(forward, backward, fillvalue=Sizes()):
        live.subtract(freed)
        live.update(added)
        most = max(most, live.copy(), key=Sizes.total)
    return most
