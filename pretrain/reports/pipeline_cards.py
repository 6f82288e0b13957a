"""A step of the pipeline: as measured, beside the same schedule simulated with the durations that were measured."""

import math
import statistics
from collections import defaultdict
from typing import Any

from parallel.schedule import Schedule, make_schedule
from parallel.simulate import Costs, ScheduleError, simulate
from pretrain.planning.plan import pipeline_timeline
from pretrain.reports.facts import known
from pretrain.reports.loss_cards import parsed
from pretrain.reports.page import Card, folded_table, scrolled
from pretrain.reports.pictures import show
from pretrain.reports.pipeline_drawing import UNKNOWN, Box, Pipeline, draw, of_timeline
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import as_number

_MAX_RANKS, _MAX_BATCH, _MAX_ROWS = 1_000_000, 1_000_000, 64
_MAX_BOXES = 60_000
_KINDS = {"F", "B", "I", "W"}


def pipeline(record: RunRecord) -> Card:
    """Measured against simulated where the run has measured; else the last step, by the schedule. Nothing where there
    is no pipeline, or the run does not say how it was laid out."""
    measured = read_measured(record.pipeline)
    return _compared(record, measured) if measured else _scheduled(record)


def read_measured(table: dict[str, Any]) -> Pipeline | None:
    """RUN/pipeline.json as a drawing; None where it is missing or not as it should be."""
    spans = table.get("spans")
    if not isinstance(spans, list) or not 1 <= len(spans) <= _MAX_ROWS or sum(map(_length, spans)) > _MAX_BOXES:
        return None
    rows = []
    for rank, row in enumerate(spans):
        if not isinstance(row, list):
            return None
        boxes = _boxes(row, rank)
        if boxes is None:
            return None
        rows.append(boxes)
    found = Pipeline("measured", tuple(rows))
    return found if found.makespan > 0 else None


def _length(row: object) -> int:
    return len(row) if isinstance(row, list) else 0


def _boxes(row: list[Any], rank: int) -> tuple[Box, ...] | None:
    """The boxes of a rank; two entries at the same time are an overlapped pair. The first stage of a rank has the
    rank's number, in every schedule."""
    at: dict[tuple[float, float], list[tuple[str, float, float]]] = defaultdict(list)
    for entry in row:
        if not isinstance(entry, list) or len(entry) != 5:
            return None
        kind, (stage, micro_batch, start, end) = str(entry[0])[:1], map(as_number, entry[1:])
        if not (0 <= start <= end and math.isfinite(micro_batch) and math.isfinite(stage)):
            return None
        at[start, end].append((kind if kind in _KINDS else UNKNOWN, stage, micro_batch))
    boxes = []
    for (start, end), actions in at.items():
        kind = actions[0][0] if len(actions) == 1 else "&"
        label = "/".join(f"{action[2]:.0f}" for action in actions)
        boxes.append(Box(kind, start, end, label, is_second=actions[0][1] != rank))
    return tuple(boxes)


def _compared(record: RunRecord, measured: Pipeline) -> Card:
    table = record.pipeline
    simulated = _simulated(table, measured)
    shown = [_titled(measured, "measured"), *([_titled(simulated, "simulated")] if simulated else [])]
    step = as_number(table.get("step"))
    facts = known(
        ("step", f"{step:,.0f}" if math.isfinite(step) else ""),
        ("schedule", f"{str(table.get('schedule'))[:40]} on {len(measured.rows)} ranks"),
        ("micro-batches", show(as_number(table.get("num_micro_batches")))),
        ("bubble, measured", f"{100 * measured.bubble:.1f} %"),
        ("bubble, simulated", f"{100 * simulated.bubble:.1f} %" if simulated else ""),
        ("longer than simulated", f"{100 * (measured.makespan / simulated.makespan - 1):+.1f} %" if simulated else ""),
    )
    head = ["rank", "idle s, measured", *(["idle s, simulated"] if simulated else [])]
    rows = [
        [str(rank), *(f"{one.idle(rank):.4g}" for one in (measured, simulated) if one)]
        for rank in range(len(measured.rows))
    ]
    note = (
        "The first pipeline of the run. Simulated: the schedule with the median duration of each kind of step, and no "
    )
    return Card(
        "Pipeline",
        scrolled(draw(shown, "s")) + folded_table("values", "time in which each rank does nothing", head, rows),
        facts,
        is_wide=True,
        note=f"{note}time for sending. A line below a box: the second stage of its rank.",
    )


def _titled(pipeline: Pipeline, what: str) -> Pipeline:
    title = f"{what}: {pipeline.makespan:.4g} s, bubble {100 * pipeline.bubble:.1f} %"
    return Pipeline(title, pipeline.rows)


def _simulated(table: dict[str, Any], measured: Pipeline) -> Pipeline | None:
    """The same schedule with the median of each kind of step; None where there is no such schedule."""
    number = as_number(table.get("num_micro_batches"))
    if not 1 <= number * len(measured.rows) <= _MAX_BOXES:
        return None
    try:
        schedule: Schedule = make_schedule(
            str(table.get("schedule")),  # type: ignore[arg-type]
            num_ranks=len(measured.rows),
            num_micro_batches=int(number),
        )
        return of_timeline(simulate(schedule, _costs(measured)), "simulated")
    except (ValueError, ScheduleError):
        return None


def _costs(measured: Pipeline) -> Costs:
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for row in measured.rows:
        for box in row:
            seconds[box.kind].append(box.end - box.start)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    weight = median.get("W", median.get("B", 0.0) / 2)
    backward = median.get("B", median.get("I", 0.0) + weight)
    return Costs(forward=median.get("F", backward / 2), backward=backward, weight=weight, overlapped=median.get("&"))


def _scheduled(record: RunRecord) -> Card:
    nothing = Card("", "", ())
    world_size, batch_size = (record.columns[key][-1] for key in ("world_size", "batch_size"))
    config = parsed(record)
    if config is None or not (1 <= world_size <= _MAX_RANKS and 1 <= batch_size <= _MAX_BATCH):
        return nothing
    parallel = config.parallel
    try:
        shape = parallel.mesh_shape(int(world_size))
        number = int(batch_size) // (shape.dp * config.train.micro_batch_size)
        if parallel.pp > _MAX_ROWS:
            return nothing
        timeline, drawn = (pipeline_timeline(parallel, count) for count in (number, min(number, 4 * parallel.pp)))
    except ValueError:
        return nothing
    if timeline is None or drawn is None:
        return nothing
    facts = (
        ("schedule", f"{parallel.schedule}, {timeline.schedule.num_stages} stages on {shape.pp} ranks"),
        ("pipelines", f"{shape.batch_ranks:,}"),
        ("micro-batches", f"{number:,}"),
        ("bubble", f"{100 * timeline.bubble / timeline.makespan:.1f} %"),
        ("micro-batches alive on a rank, most", f"{max(timeline.peak_activations)}"),
    )
    shown = drawn.schedule.num_micro_batches
    part = f"; drawn with {shown} micro-batches" if shown < number else ""
    idle = [[str(rank), f"{float(seconds):g}"] for rank, seconds in enumerate(drawn.bubbles)]
    table = folded_table("values", "time in which each rank does nothing, in forward passes", ["rank", "idle"], idle)
    picture = draw(
        [of_timeline(drawn, f"simulated, bubble {100 * drawn.bubble / drawn.makespan:.1f} %")], "forward passes"
    )
    return Card(
        "Pipeline",
        scrolled(picture) + table,
        facts,
        is_wide=True,
        note="The last step as scheduled, not as measured: backward passes take twice as long as forward passes, half "
        f"of it for the gradients of weights{part}.",
    )
