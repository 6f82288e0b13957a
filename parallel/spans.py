"""When the steps of a pipeline ran, on all of its ranks and one clock."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist

from parallel.clock import Lap, between
from parallel.executor import Executed, Executor
from parallel.schedule import Schedule, actions_of
from parallel.simulate import Span, Timeline


@dataclass(frozen=True)
class Run:
    """What this rank's executor did in one step: `executed` steps of `schedule`, in the lap of its clock."""

    schedule: Schedule
    executed: Sequence[Executed]
    lap: Lap


def newest_run(executor: Executor) -> Run:
    """To be asked for before the executor runs again."""
    num_micro_batches = len({action.micro_batch for done in executor.executed for action in actions_of(done.step)})
    return Run(executor.schedule(num_micro_batches), executor.executed, executor.clock.newest)


def measured_timeline(run: Run, group: dist.ProcessGroup, device: torch.device) -> Timeline:
    """The times of all ranks in seconds, from the earliest; a collective of the pipeline `group`."""
    schedule = run.schedule
    mine = torch.zeros(max(len(steps) for steps in schedule.steps), 2, dtype=torch.float64)
    for place, done in enumerate(run.executed):
        mine[place, 0] = between(run.lap.origin, done.start)
        mine[place, 1] = between(run.lap.origin, done.end)
    times = [torch.empty_like(mine, device=device) for _ in range(schedule.num_ranks)]
    dist.all_gather(times, mine.to(device), group=group)
    begin = min(float(rows[0, 0]) for rows in times)
    return Timeline(
        schedule,
        tuple(
            tuple(Span(step, start - begin, end - begin) for step, (start, end) in zip(steps, rows, strict=False))
            for steps, rows in zip(schedule.steps, (rows.tolist() for rows in times), strict=True)
        ),
    )
