import pytest

from parallel.schedule import (
    Action,
    Kind,
    Overlapped,
    Schedule,
    ScheduleName,
    Step,
    actions_of,
    make_schedule,
    num_stages,
)


def text(steps: tuple[Step, ...]) -> str:
    return " ".join(str(step) for step in steps)


def folded(steps: tuple[Step, ...], half: int) -> list[tuple[str, ...]]:
    """Kinds, stages and places within their direction."""
    return [
        tuple(f"{action.kind.value}{action.stage}.{action.micro_batch % half}" for action in actions_of(step))
        for step in steps
    ]


def test_1f1b() -> None:
    schedule = make_schedule("1f1b", num_ranks=2, num_micro_batches=3)
    assert [text(steps) for steps in schedule.steps] == [
        "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]


def test_1f1b_on_one_rank_takes_turns() -> None:
    schedule = make_schedule("1f1b", num_ranks=1, num_micro_batches=2)
    assert text(schedule.steps[0]) == "F0.0 B0.0 F0.1 B0.1"


def test_1f1b_with_fewer_micro_batches_than_ranks() -> None:
    schedule = make_schedule("1f1b", num_ranks=4, num_micro_batches=1)
    assert [text(steps) for steps in schedule.steps] == [f"F{stage}.0 B{stage}.0" for stage in range(4)]


def test_zb1p_puts_weight_gradients_off_by_the_rank() -> None:
    schedule = make_schedule("zb1p", num_ranks=2, num_micro_batches=3)
    assert [text(steps) for steps in schedule.steps] == [
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
    ]


def test_zbv() -> None:
    schedule = make_schedule("zbv", num_ranks=2, num_micro_batches=4)
    assert [text(steps[:11]) for steps in schedule.steps] == [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 F0.3 I0.0",
        "F1.0 F2.0 F1.1 F2.1 I2.0 W2.0 F1.2 I1.0 W1.0 F2.2 I2.1",
    ]


def test_dualpipev() -> None:
    """The eight phases, of a rank at the ends and one in the middle."""
    schedule = make_schedule("dualpipev", num_ranks=2, num_micro_batches=4)
    assert [text(steps) for steps in schedule.steps] == [
        "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 F0.3&B3.1 F3.2&B0.0 B3.2 F3.3&B0.1 B3.3 I0.2 W0.2 I0.3 W0.3",
        "F1.0 F2.0 F1.1 F2.1 F1.2&B2.0 F2.2&B1.0 F1.3&B2.1 F2.3&B1.1 B2.2 B1.2 I2.3 I1.3 W2.3 W1.3",
    ]


def test_dualpipev_on_one_rank_overlaps_its_two_stages() -> None:
    schedule = make_schedule("dualpipev", num_ranks=1, num_micro_batches=3)
    assert text(schedule.steps[0]) == "F0.0 F1.0 F0.1&B1.0 F1.1&B0.0 F0.2&B1.1 F1.2&B0.1 B1.2 I0.2 W0.2"


def test_zb1p_with_fewer_micro_batches_than_ranks() -> None:
    schedule = make_schedule("zb1p", num_ranks=3, num_micro_batches=2)
    assert [text(steps) for steps in schedule.steps] == [
        "F0.0 F0.1 I0.0 W0.0 I0.1 W0.1",
        "F1.0 F1.1 I1.0 I1.1 W1.0 W1.1",
        "F2.0 I2.0 F2.1 I2.1 W2.0 W2.1",
    ]


def test_dualpipev_with_few_micro_batches_leaves_the_last_out() -> None:
    """Of `test_dualpipev`'s, with 3 and 2: pairs become single steps, the order stays."""

    def first_rank(number: int) -> str:
        return text(make_schedule("dualpipev", num_ranks=2, num_micro_batches=number).steps[0])

    assert first_rank(3) == "F0.0 F0.1 F0.2 F3.0 I3.0 W3.0 F3.1 B3.1 F3.2&B0.0 B3.2 B0.1 I0.2 W0.2"
    assert first_rank(2) == "F0.0 F0.1 F3.0 I3.0 W3.0 F3.1 B3.1 B0.0 B0.1"


def test_dualpipe_with_few_micro_batches_keeps_half_of_either_direction() -> None:
    schedule = make_schedule("dualpipe", num_ranks=4, num_micro_batches=4)
    assert text(schedule.steps[0]) == "F0.0 F0.1 F3.2 I3.2 W3.2 F3.3 B3.3 B0.0 B0.1"
    assert text(schedule.steps[3]) == "F0.2 F0.3 F3.0 I3.0 W3.0 F3.1 B3.1 B0.2 B0.3"
    assert [schedule.rank_of(0, micro_batch) for micro_batch in range(4)] == [0, 0, 3, 3]


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches"), [(1, 1), (1, 2), (1, 5), (2, 3), (2, 4), (3, 1), (3, 7), (4, 5), (4, 13)]
)
def test_dualpipe_is_dualpipev_unfolded(num_ranks: int, num_micro_batches: int) -> None:
    """Ranks r and 2R - 1 - r of one do what rank r of the other does, with the directions exchanged."""
    pairs = make_schedule("dualpipe", num_ranks=2 * num_ranks, num_micro_batches=2 * num_micro_batches)
    folds = make_schedule("dualpipev", num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    for rank in range(num_ranks):
        expected = folded(folds.steps[rank], num_micro_batches)
        assert folded(pairs.steps[rank], num_micro_batches) == expected
        assert folded(pairs.steps[2 * num_ranks - 1 - rank], num_micro_batches) == expected


def test_placement() -> None:
    def ranks(name: ScheduleName, micro_batch: int) -> list[int]:
        schedule = make_schedule(name, num_ranks=4, num_micro_batches=10)
        return [schedule.rank_of(stage, micro_batch) for stage in range(schedule.num_stages)]

    assert ranks("1f1b", 7) == ranks("zb1p", 7) == [0, 1, 2, 3]
    assert ranks("zbv", 7) == ranks("dualpipev", 7) == [0, 1, 2, 3, 3, 2, 1, 0]
    assert ranks("dualpipe", 4) == [0, 1, 2, 3]
    assert ranks("dualpipe", 5) == [3, 2, 1, 0]


def test_stages_of_a_rank() -> None:
    def stages(name: ScheduleName) -> list[tuple[int, ...]]:
        schedule = make_schedule(name, num_ranks=4, num_micro_batches=8)
        assert schedule.num_stages == num_stages(name, 4)
        return [schedule.stages_of(rank) for rank in range(4)]

    assert stages("1f1b") == stages("zb1p") == [(0,), (1,), (2,), (3,)]
    assert stages("zbv") == stages("dualpipev") == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert stages("dualpipe") == [(0, 3), (1, 2), (1, 2), (0, 3)]


def test_steps_are_written_with_stage_and_micro_batch() -> None:
    forward, backward = Action(Kind.FORWARD, 3, 0), Action(Kind.BACKWARD, 1, 12)
    assert str(forward) == "F3.0"
    assert str(Overlapped(forward, backward)) == "F3.0&B1.12"


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_micro_batches", "message"),
    [
        ("1f1b", 2, 0, 'schedule "1f1b" has 0 micro-batches on 2 ranks; it needs at least 1: use more micro-batches'),
        ("1f1b", 0, 1, 'schedule "1f1b" has 0 ranks; it needs at least 1'),
        ("zbv", 4, 0, 'schedule "zbv" has 0 micro-batches on 4 ranks; it needs at least 1: use more micro-batches'),
        (
            "dualpipe", 4, 0,
            'schedule "dualpipe" has 0 micro-batches on 4 ranks; it needs at least 2: use more micro-batches',
        ),
        (
            "dualpipe", 4, 11,
            'schedule "dualpipe" has 11 micro-batches; it needs an even number, since one half goes each way: use 12, '
            'or "dualpipev"',
        ),
        (
            "dualpipe", 4, 5,
            'schedule "dualpipe" has 5 micro-batches; it needs an even number, since one half goes each way: use 6, '
            'or "dualpipev"',
        ),
        (
            "dualpipe", 3, 12,
            'schedule "dualpipe" has 3 ranks; it needs an even number, since ranks hold the stages in pairs: use 4 '
            'ranks, or "dualpipev"',
        ),
        (
            "gpipe", 4, 8,
            'there is no schedule "gpipe"; choose one of 1f1b, zb1p, zbv, dualpipe, dualpipev',
        ),
    ],
)  # fmt: skip
def test_numbers_without_a_schedule(name: ScheduleName, num_ranks: int, num_micro_batches: int, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    assert str(error.value) == message


def test_a_schedule_is_a_value() -> None:
    one, two = (make_schedule("zbv", num_ranks=3, num_micro_batches=7) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert isinstance(one, Schedule)
