"""Drawings of a timeline: text for a terminal, SVG for a page. One row a rank, time from left to right."""

import textwrap
from collections.abc import Iterator
from html import escape

from parallel.schedule import Overlapped, Step, actions_of
from parallel.simulate import Span, Timeline

LEGEND = (
    "F forward, B backward, I input gradient, W weight gradient, & the two overlapped, numbers are micro-batches, "
    "small letters the second stage of a rank, . idle."
)

# Colours of Okabe and Ito, told apart with any colour vision; black text is legible on each.
COLOURS = {"F": "#56B4E9", "B": "#E69F00", "I": "#F0E442", "W": "#009E73", "&": "#CC79A7"}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "&": "overlapped"}
SVG_WIDTH, LEFT, TOP, ROW, PITCH = 1200, 70, 50, 24, 30


def ascii_timeline(timeline: Timeline, width: int = 120) -> str:
    """Lines of at most `width` characters. Raises ValueError where that leaves no room for a row."""
    labels = [f"{rank} |" for rank in range(len(timeline.spans))]
    num_columns = width - len(labels[-1])
    if num_columns < 1:
        raise ValueError(f"width = {width} leaves no room beside the labels of {len(labels)} ranks; use 40 or more")
    scale = num_columns / timeline.makespan if timeline.makespan else 1
    # Whole columns, where there is room, make equal steps equally wide.
    scale = int(scale) if scale >= 1 else scale
    rows = [
        label.rjust(len(labels[-1])) + _ascii_row(timeline, rank, scale, num_columns)
        for rank, label in enumerate(labels)
    ]
    return "\n".join([_wrapped(summary(timeline), width), *rows, _wrapped(LEGEND, width)])


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def _ascii_row(timeline: Timeline, rank: int, scale: float, num_columns: int) -> str:
    row = ["."] * min(num_columns, round(timeline.makespan * scale))
    for span in timeline.spans[rank]:
        first, last = round(span.start * scale), min(round(span.end * scale), len(row))
        letter = _letter(span.step)
        letter = letter.lower() if _is_second(timeline, rank, span.step) else letter
        numbers = [str(action.micro_batch) for action in actions_of(span.step)]
        text = letter.join(numbers) if len(numbers) > 1 else letter + numbers[0]
        # What cannot be written whole is not written in part.
        room = last - first - (len(numbers) - 1)
        text = text if len(text) <= room else letter
        row[first:last] = text.ljust(last - first, "-")[: last - first]
    return "".join(row)


def _letter(step: Step) -> str:
    return "&" if isinstance(step, Overlapped) else step.kind.value


def _is_second(timeline: Timeline, rank: int, step: Step) -> bool:
    """Whether a step, the forward one of two, belongs to the higher stage of a rank with two."""
    first, *others = timeline.schedule.stages_of(rank)
    return actions_of(step)[0].stage in others and first not in others


def summary(timeline: Timeline) -> str:
    """Numbers of a timeline in a sentence."""
    schedule, share = timeline.schedule, float(max(timeline.peak_share))
    part = float(timeline.bubble / timeline.makespan) if timeline.makespan else 0
    return (
        f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, {schedule.num_micro_batches} "
        f"micro-batches; time {_number(timeline.makespan)}, bubble {_number(timeline.bubble)} ({part:.1%}), at most "
        f"{share:.4g} x the activations of a micro-batch in the whole model."
    )


def _number(value: float) -> str:
    return f"{float(value):.6g}"


def svg_timeline(timeline: Timeline) -> str:
    """A complete SVG document. Each step tells its name and times when pointed at."""
    height = TOP + PITCH * len(timeline.spans) + 30
    title = escape(summary(timeline))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SVG_WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{title}</title>",
        f'<rect width="{SVG_WIDTH}" height="{height}" fill="#FFFFFF"/>',
        f'<text x="{LEFT}" y="18">{title}</text>',
        *_svg_legend(),
    ]
    for rank in range(len(timeline.spans)):
        top = TOP + PITCH * rank
        parts.append(f'<text x="{LEFT - 8}" y="{top + 16}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{LEFT}" y="{top}" width="{SVG_WIDTH - LEFT - 10}" height="{ROW}" fill="#EEEEEE"/>')
        parts += (_svg_span(timeline, rank, span) for span in timeline.spans[rank])
    parts.append(f'<text x="{LEFT}" y="{height - 10}">0</text>')
    parts.append(f'<text x="{SVG_WIDTH - 10}" y="{height - 10}" text-anchor="end">{_number(timeline.makespan)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _svg_legend() -> Iterator[str]:
    for place, (letter, name) in enumerate(NAMES.items()):
        x = LEFT + 150 * place
        yield f'<rect x="{x}" y="27" width="14" height="14" fill="{COLOURS[letter]}"/>'
        yield f'<text x="{x + 20}" y="38">{escape(letter)} {name}</text>'
    yield f'<text x="{LEFT + 750}" y="38">framed: second stage of a rank</text>'


def _svg_span(timeline: Timeline, rank: int, span: Span) -> str:
    scale = (SVG_WIDTH - LEFT - 10) / float(timeline.makespan or 1)
    x, width, top = LEFT + float(span.start) * scale, float(span.end - span.start) * scale, TOP + PITCH * rank
    tooltip = f"{describe(span.step)}, {_number(span.start)} to {_number(span.end)}"
    frame = 'stroke="#000000"' if _is_second(timeline, rank, span.step) else 'stroke="#FFFFFF"'
    label = "/".join(str(action.micro_batch) for action in actions_of(span.step))
    text = f'<text x="{x + width / 2:.2f}" y="{top + 16}" text-anchor="middle">{label}</text>'
    return (
        f"<g><title>{escape(tooltip)}</title>"
        f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{ROW}" fill="{COLOURS[_letter(span.step)]}" {frame} '
        f'stroke-width="{min(1.0, width / 8):.2f}"/>{text if width > 7 * len(label) else ""}</g>'
    )


def describe(step: Step) -> str:
    """A step in words."""
    return " beside ".join(
        f"{NAMES[action.kind.value]} of micro-batch {action.micro_batch} in stage {action.stage}"
        for action in actions_of(step)
    )
