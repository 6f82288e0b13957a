"""The bubbles of the schedules, exactly, and what makes a schedule one that can be carried out.

With equal stages and free sends, the bubble of the rank that waits longest is
    1f1b                  (PP - 1)(F + B)               for all F, B
    zb1p                  (PP - 1)(F + B - 2W)          if and only if W <= F and W <= I
    dualpipe, dualpipev   (PP/2 - 1)(F&B + B - 3W)      if F <= I and W <= I, and max(F, B) <= F&B <= F + B
    zbv                   (PP/2 - 1) F                  if F = I = W
where I = B - W, PP is the number of stages and the number of micro-batches is any that fills the pipeline.
"""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.schedule import Action, Kind, Overlapped, Schedule, ScheduleName, Step, make_schedule
from parallel.simulate import (
    Costs,
    Recv,
    ScheduleError,
    Send,
    Span,
    check_lowering,
    lower,
    simulate,
    validate,
)

NAMES = get_args(ScheduleName)
FOLDED = ("zbv", "dualpipev")


def formula(name: ScheduleName, num_stages: int, costs: Costs) -> float:
    forward, backward, weight = costs.forward, costs.backward, costs.weight
    if name == "1f1b":
        return (num_stages - 1) * (forward + backward)
    if name == "zb1p":
        return (num_stages - 1) * (forward + backward - 2 * weight)
    if name == "zbv":
        return (num_stages // 2 - 1) * forward
    overlapped = forward + backward if costs.overlapped is None else costs.overlapped
    return (num_stages // 2 - 1) * (overlapped + backward - 3 * weight)


def is_exact(name: ScheduleName, costs: Costs) -> bool:
    forward, weight, input_grad = costs.forward, costs.weight, costs.backward - costs.weight
    if name == "1f1b":
        return True
    if name == "zb1p":
        return weight <= forward and weight <= input_grad
    return forward == input_grad == weight if name == "zbv" else forward <= input_grad and weight <= input_grad


def schedules(name: ScheduleName, num_stages: int) -> list[Schedule]:
    """Those of the least number of micro-batches, of a few more, and of a multiple."""
    num_ranks = num_stages // 2 if name in FOLDED else num_stages
    least = {"1f1b": 1, "zb1p": num_ranks}.get(name, 2 * num_ranks)
    numbers = (least + 2,) if num_stages > 32 else (least, least + 1, least + 2, 3 * num_ranks)
    return [
        make_schedule(name, num_ranks=num_ranks, num_micro_batches=number)
        for number in numbers
        if name != "dualpipe" or number % 2 == 0
    ]


@pytest.mark.parametrize("num_stages", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_the_bubble_is_that_of_the_table(name: ScheduleName, num_stages: int) -> None:
    all_costs = [
        Costs(2, 4, 2, 6),
        Costs(2, 4, 2, 5),
        Costs(2, 4, 2, 4),
        Costs(1, 3, 1),
        Costs(2, 5, 2, 6),
        Costs(Fraction(1, 3), Fraction(5, 7), Fraction(1, 3), Fraction(20, 21)),
    ]
    for schedule in schedules(name, num_stages):
        for costs in all_costs:
            if is_exact(name, costs):
                assert simulate(schedule, costs).bubble == formula(name, num_stages, costs), costs


@pytest.mark.parametrize("name", NAMES)
def test_the_conditions_of_exactness(name: ScheduleName) -> None:
    """Over a grid of costs: where they hold, the bubble is that of the table; where they do not, it is not."""
    for schedule in schedules(name, 8):
        for forward, input_grad, weight in product(range(1, 4), repeat=3):
            costs = Costs(forward, input_grad + weight, weight)
            equal = simulate(schedule, costs).bubble == formula(name, 8, costs)
            assert equal >= is_exact(name, costs), costs
            if name != "zbv":
                assert equal == is_exact(name, costs), costs


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_the_bubble_with_overlap_is_that_of_the_middle(name: ScheduleName) -> None:
    """Where pairs save time, ranks save as often as they overlap; those in the middle do most, and wait longest."""
    for schedule in schedules(name, 8):
        for forward, input_grad, weight in product(range(1, 4), repeat=3):
            backward = input_grad + weight
            for overlapped in range(max(forward, backward), forward + backward + 1):
                costs = Costs(forward, backward, weight, overlapped)
                if is_exact(name, costs):
                    timeline = simulate(schedule, costs)
                    assert timeline.bubble == timeline.idle(3) == formula(name, 8, costs), costs


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_the_bubble_of_zbv_does_not_grow_with_micro_batches(num_ranks: int) -> None:
    """Whatever the costs; and it stays under that of 1f1b, whose stages are twice as long."""
    for forward, input_grad, weight in product(range(2, 5), repeat=3):
        costs = Costs(forward, input_grad + weight, weight)
        few, many = (
            simulate(make_schedule("zbv", num_ranks=num_ranks, num_micro_batches=number), costs).bubble
            for number in (3 * num_ranks, 5 * num_ranks)
        )
        assert few == many < (num_ranks - 1) * 2 * (costs.forward + costs.backward), costs


@pytest.mark.parametrize("num_stages", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipe", "dualpipev"])
def test_few_micro_batches_end_before_those_of_1f1b(name: ScheduleName, num_stages: int) -> None:
    """On as many ranks and with as many micro-batches, whether or not pairs save time; and one more costs more."""
    num_ranks = num_stages // 2 if name in FOLDED else num_stages
    size = num_stages // num_ranks
    for costs in (Costs(2, 4, 2), Costs(2, 4, 2, 5), Costs(3, 7, 3)):
        before: float = 0
        for number in range(2, 2 * num_ranks, 2):
            ours, plain = (make_schedule(one, num_ranks=num_ranks, num_micro_batches=number) for one in (name, "1f1b"))
            whole = Costs(size * costs.forward, size * costs.backward, size * costs.weight)
            makespan = simulate(ours, costs).makespan
            assert before < makespan < simulate(plain, whole).makespan
            before = makespan


def test_the_batches_that_dualpipe_of_16_ranks_may_have() -> None:
    """24 micro-batches are what the report's first batch, 3072, gives to each of 128 data ranks."""

    def bubble(name: ScheduleName, number: int) -> float:
        return simulate(make_schedule(name, num_ranks=16, num_micro_batches=number), Costs(2, 4, 2)).bubble

    assert [bubble("dualpipe", number) for number in (16, 24, 30, 32, 64)] == [42, 44, 32, 28, 28]
    assert bubble("1f1b", 24) == 90


@st.composite
def made(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(NAMES))
    num_ranks = 2 * draw(st.integers(1, 4)) if name == "dualpipe" else draw(st.integers(1, 7))
    number = draw(st.integers(1, 3 * num_ranks + 2))
    number += number % 2 if name == "dualpipe" else 0
    return make_schedule(name, num_ranks=num_ranks, num_micro_batches=number)


@st.composite
def any_costs(draw: st.DrawFn) -> Costs:
    part = st.fractions(Fraction(1, 8), 8, max_denominator=8)
    forward, input_grad, weight = draw(part), draw(part), draw(part)
    backward = input_grad + weight
    saved = draw(st.fractions(0, 1, max_denominator=4)) * min(forward, backward)
    return Costs(forward, backward, weight, forward + backward - saved, send=draw(st.fractions(0, 4)))


@given(made(), any_costs())
@settings(max_examples=150, deadline=None)
def test_every_schedule_is_complete_and_within_its_memory(schedule: Schedule, costs: Costs) -> None:
    validate(schedule)
    check_lowering(schedule, lower(schedule))
    timeline = simulate(schedule, costs)
    most = schedule.num_stages + (schedule.name in ("dualpipe", "dualpipev"))
    assert max(timeline.peak_activations) <= most
    assert max(timeline.peak_share) <= Fraction(most, schedule.num_stages)
    for row in timeline.spans:
        assert all(one.end <= two.start for one, two in pairwise(row))
    work = sum(span.end - span.start for row in timeline.spans for span in row)
    assert sum(timeline.bubbles) == schedule.num_ranks * timeline.makespan - work
    assert min(timeline.bubbles) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_steps_run_when_the_last_they_wait_for_has_arrived(name: ScheduleName) -> None:
    """Every start is the least that its inputs and its rank allow, worked out again from the spans."""
    schedule, costs = make_schedule(name, num_ranks=4, num_micro_batches=10), Costs(3, 7, 2, 9, send=1)
    timeline = simulate(schedule, costs)
    ends: dict[Action, float] = {}
    for span in (span for row in timeline.spans for span in row):
        step = span.step
        for action in (step.forward, step.backward) if isinstance(step, Overlapped) else (step,):
            ends[action] = span.end

    def arrival(action: Action, source: Action) -> float:
        ranks = [schedule.rank_of(at.stage, at.micro_batch) for at in (action, source)]
        return ends[source] + (0 if ranks[0] == ranks[1] else costs.send)

    def inputs(action: Action) -> list[Action]:
        last = schedule.num_stages - 1
        before, after = (replace(action, stage=action.stage + delta) for delta in (-1, 1))
        if action.kind == Kind.FORWARD:
            return [before] if action.stage else []
        if action.kind == Kind.WEIGHT_GRAD:
            return [replace(action, kind=Kind.INPUT_GRAD)]
        given = [replace(after, kind=kind) for kind in (Kind.BACKWARD, Kind.INPUT_GRAD)]
        own = replace(action, kind=Kind.FORWARD)
        return [own] if action.stage == last else [own, *(source for source in given if source in ends)]

    for row in timeline.spans:
        free: float = 0
        for span in row:
            step = span.step
            actions = (step.forward, step.backward) if isinstance(step, Overlapped) else (step,)
            arrivals = [arrival(action, source) for action in actions for source in inputs(action)]
            assert span.start == max([free, *arrivals])
            assert span.end - span.start == costs.of_step(step)
            free = span.end


def test_costs_of_each_action() -> None:
    """A pipeline whose second stage takes twice as long."""
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    timeline = simulate(schedule, lambda action: (1 + action.stage) * (2 if action.kind == Kind.BACKWARD else 1))
    assert timeline.spans[1] == (
        Span(Action(Kind.FORWARD, 1, 0), 1, 3),
        Span(Action(Kind.BACKWARD, 1, 0), 3, 7),
        Span(Action(Kind.FORWARD, 1, 1), 7, 9),
        Span(Action(Kind.BACKWARD, 1, 1), 9, 13),
    )
    assert timeline.makespan == 15
    assert timeline.bubbles == (9, 3)
    assert timeline.bubble == 9


def test_sending_takes_time_between_ranks_only() -> None:
    costs = Costs(1, 2, 1, send=5)
    alone = simulate(make_schedule("dualpipev", num_ranks=1, num_micro_batches=2), costs)
    assert alone.makespan == 2 * 2 * 3
    two = simulate(make_schedule("1f1b", num_ranks=2, num_micro_batches=1), costs)
    assert two.makespan == 2 * 3 + 2 * 5


def test_a_pair_with_an_input_gradient_leaves_the_weight_gradient_out() -> None:
    forward, input_grad = Action(Kind.FORWARD, 0, 1), Action(Kind.INPUT_GRAD, 0, 0)
    assert Costs(2, 5, 2).of_step(Overlapped(forward, input_grad)) == 5
    assert Costs(2, 5, 2, 6).of_step(Overlapped(forward, input_grad)) == 4


def test_activations_are_held_from_forward_to_weight_gradient() -> None:
    def peaks(name: ScheduleName) -> tuple[int, ...]:
        return simulate(make_schedule(name, num_ranks=4, num_micro_batches=12), Costs(1, 2, 1)).peak_activations

    assert peaks("1f1b") == (4, 3, 2, 1)
    assert peaks("zb1p") == (4, 4, 4, 4)
    assert peaks("zbv") == (8, 8, 8, 8)
    assert peaks("dualpipe") == (5, 5, 5, 5)
    assert peaks("dualpipev") == (9, 9, 9, 9)


def with_steps(schedule: Schedule, rank: int, steps: tuple[Step, ...]) -> Schedule:
    return replace(schedule, steps=(*schedule.steps[:rank], steps, *schedule.steps[rank + 1 :]))


@given(made(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_step_dropped_doubled_or_moved_is_found(schedule: Schedule, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = schedule.steps[rank]
    place = data.draw(st.integers(0, len(steps) - 1))
    with pytest.raises(ScheduleError, match="needs F once"):
        validate(with_steps(schedule, rank, (*steps[:place], *steps[place + 1 :])))
    with pytest.raises(ScheduleError, match="needs F once"):
        validate(with_steps(schedule, rank, (*steps[:place], steps[place], *steps[place:])))
    if schedule.num_ranks > 1:
        dropped = with_steps(schedule, rank, (*steps[:place], *steps[place + 1 :]))
        other = (rank + 1) % schedule.num_ranks
        moved = with_steps(dropped, other, (*dropped.steps[other], steps[place]))
        with pytest.raises(ScheduleError, match=f"rank {other}: .* belongs on rank {rank}"):
            validate(moved)


@pytest.mark.parametrize("name", NAMES)
def test_a_swap_of_what_depends_is_found(name: ScheduleName) -> None:
    """The backward pass of each micro-batch, put before its forward pass, and W before I."""
    schedule = make_schedule(name, num_ranks=2, num_micro_batches=6)
    num_swaps = 0
    for rank, steps in enumerate(schedule.steps):
        for one, two in product(range(len(steps)), repeat=2):
            first, second = steps[one], steps[two]
            if not isinstance(first, Action) or not isinstance(second, Action) or one >= two:
                continue
            same = (first.stage, first.micro_batch) == (second.stage, second.micro_batch)
            if same:
                swapped = list(steps)
                swapped[one], swapped[two] = second, first
                with pytest.raises(ScheduleError, match=r"rank . waits for ever: its step .* needs the"):
                    validate(with_steps(schedule, rank, tuple(swapped)))
                num_swaps += 1
    assert num_swaps >= 2


def test_a_deadlock_names_rank_step_and_what_is_missing() -> None:
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    forward, backward = Action(Kind.FORWARD, 0, 0), Action(Kind.BACKWARD, 0, 0)
    late = with_steps(schedule, 0, (forward, backward, Action(Kind.FORWARD, 0, 1), Action(Kind.BACKWARD, 0, 1)))
    validate(late)
    first = Action(Kind.FORWARD, 1, 1)
    crossed = with_steps(late, 1, (first, *(step for step in late.steps[1] if step != first)))
    with pytest.raises(ScheduleError) as error:
        simulate(crossed, Costs(1, 2, 1))
    assert str(error.value) == (
        "rank 0 waits for ever: its step 1, B0.0, needs the gradient of stage 1 for micro-batch 0"
    )


def test_a_wrong_pair_or_a_step_out_of_range_is_found() -> None:
    schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=2)
    one, two = Action(Kind.FORWARD, 0, 0), Action(Kind.FORWARD, 0, 1)
    with pytest.raises(ScheduleError, match="overlaps something else than F with B or I"):
        validate(with_steps(schedule, 0, (Overlapped(one, two),)))
    with pytest.raises(ScheduleError, match=r"F0\.2 is outside of 1 stages and 2 micro-batches"):
        validate(with_steps(schedule, 0, (*schedule.steps[0], Action(Kind.FORWARD, 0, 2))))
    with pytest.raises(ScheduleError, match="1 lists of steps for 2 ranks"):
        validate(replace(schedule, num_ranks=2))
    both = tuple(Action(kind, 0, number) for number in (0, 1) for kind in Kind)
    with pytest.raises(ScheduleError, match="runs F 1 times, B 1 times, I 1 times, W 1 times; it needs F once"):
        validate(with_steps(schedule, 0, both))


def test_a_micro_batch_cannot_overlap_its_own_backward_pass() -> None:
    schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=1)
    forward, backward = Action(Kind.FORWARD, 0, 0), Action(Kind.BACKWARD, 0, 0)
    with pytest.raises(ScheduleError, match=r"F0\.0&B0\.0, needs the activation of stage 0"):
        validate(with_steps(schedule, 0, (Overlapped(forward, backward),)))


def test_transfers_of_1f1b() -> None:
    lowered = lower(make_schedule("1f1b", num_ranks=2, num_micro_batches=2))
    forward, backward = ([Action(kind, stage, m) for stage in (0, 1) for m in (0, 1)] for kind in list(Kind)[:2])
    assert lowered[0] == (
        forward[0],
        Send("activation", 1, 0, peer=1),
        forward[1],
        Send("activation", 1, 1, peer=1),
        Recv("gradient", 0, 0, peer=1),
        backward[0],
        Recv("gradient", 0, 1, peer=1),
        backward[1],
    )
    assert lowered[1] == (
        Recv("activation", 1, 0, peer=0),
        forward[2],
        Recv("activation", 1, 1, peer=0),
        backward[2],
        Send("gradient", 0, 0, peer=0),
        forward[3],
        backward[3],
        Send("gradient", 0, 1, peer=0),
    )


def test_stages_on_one_rank_need_no_transfer() -> None:
    for name in ("zbv", "dualpipev"):
        (ops,) = lower(make_schedule(name, num_ranks=1, num_micro_batches=4))
        assert not any(isinstance(op, Send | Recv) for op in ops)


@pytest.mark.parametrize("name", NAMES)
def test_a_transfer_dropped_or_swapped_is_found(name: ScheduleName) -> None:
    schedule = make_schedule(name, num_ranks=2, num_micro_batches=6)
    lowered = lower(schedule)
    for place, op in enumerate(lowered[0]):
        dropped = (*lowered[0][:place], *lowered[0][place + 1 :])
        if isinstance(op, Send | Recv):
            with pytest.raises(ScheduleError):
                check_lowering(schedule, (dropped, lowered[1]))
        if isinstance(op, Send) and place < len(dropped) and not isinstance(dropped[place], Send | Recv):
            later = (*dropped[: place + 1], op, *dropped[place + 1 :])
            with pytest.raises(ScheduleError, match="not sent before"):
                check_lowering(schedule, (later, lowered[1]))


def test_lists_that_wait_for_one_another_are_found() -> None:
    """Two ranks that exchange gradients and activations, each with its own first."""
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=2)
    left, right = lower(schedule)
    place = next(place for place, op in enumerate(right) if op == Recv("activation", 1, 1, peer=0))
    late = (*right[:place], right[place + 1], right[place + 2], right[place], *right[place + 3 :])
    with pytest.raises(ScheduleError, match="rank 0 waits for ever for the other end of Send"):
        check_lowering(schedule, (left, late))


def test_transfers_in_another_order_are_found() -> None:
    """The second activation asked for before the first: in time for both, but they would be exchanged."""
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=3)
    left, right = lower(schedule)
    second = Recv("activation", 1, 1, peer=0)
    mixed = (second, *(op for op in right if op != second))
    with pytest.raises(ScheduleError, match=r"channel \(0, 1, 'activation'\): sent \[\(1, 0\), \(1, 1\), "):
        check_lowering(schedule, (left, mixed))


@pytest.mark.parametrize("name", NAMES)
def test_lowering_of_forward_passes_alone(name: ScheduleName) -> None:
    """As in evaluation, one micro-batch after another."""
    schedule = make_schedule(name, num_ranks=4, num_micro_batches=8)
    forward = tuple(
        tuple(
            Action(Kind.FORWARD, stage, micro_batch)
            for micro_batch in range(8)
            for stage in schedule.stages_of(rank)
            if schedule.rank_of(stage, micro_batch) == rank
        )
        for rank in range(4)
    )
    only = replace(schedule, steps=forward)
    check_lowering(only, lower(only))
    transfers = [op for ops in lower(only) for op in ops if isinstance(op, Send)]
    assert {op.payload for op in transfers} == {"activation"}
    assert len(transfers) == 8 * (6 if name in FOLDED else 3)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", NAMES)
def test_64_ranks_and_256_micro_batches(name: ScheduleName) -> None:
    """Work in proportion to the number of steps: a quadratic simulation would not end in time."""
    schedule = make_schedule(name, num_ranks=64, num_micro_batches=256)
    assert simulate(schedule, Costs(1, 2, 1)).bubble == formula(name, schedule.num_stages, Costs(1, 2, 1))
