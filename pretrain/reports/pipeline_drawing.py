"""Drawings of pipelines for the page: rows of boxes, one row a rank, several pipelines below one another on one scale.

The boxes of one kind are one path, so that tens of thousands cost a browser nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from parallel.schedule import Action, Overlapped, actions_of
from parallel.simulate import Timeline
from parallel.timeline_drawing import COLOURS, NAMES

_WIDTH, _LEFT, _ROW, _PITCH, _HEAD = 1200, 66, 22, 26, 34
_FONT, _LETTER = 13, 8
_MAX_LABELS = 3000
UNKNOWN = "?"
_COLOURS = COLOURS | {UNKNOWN: "#999999"}
_NAMES = NAMES | {UNKNOWN: "other"}


@dataclass(frozen=True)
class Box:
    """A step: its kind (a letter of `parallel.timeline_drawing.COLOURS`, or `UNKNOWN`), its times, what is written into
    it, and whether it belongs to the second stage of its rank."""

    kind: str
    start: float
    end: float
    label: str = ""
    is_second: bool = False


@dataclass(frozen=True)
class Pipeline:
    """A pipeline to draw: a title and the boxes of each rank."""

    title: str
    rows: tuple[tuple[Box, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last box ends."""
        return max((box.end for row in self.rows for box in row), default=0.0)

    def idle(self, rank: int) -> float:
        """How long a rank does nothing."""
        busy = reached = 0.0
        for box in sorted(self.rows[rank], key=lambda box: box.start):
            busy += max(0.0, box.end - max(box.start, reached))
            reached = max(reached, box.end)
        return self.makespan - busy

    @property
    def bubble(self) -> float:
        """The share of the step in which the rank that waits longest does nothing."""
        longest = max((self.idle(rank) for rank in range(len(self.rows))), default=0.0)
        return longest / self.makespan if self.makespan else 0.0


def of_timeline(timeline: Timeline, title: str) -> Pipeline:
    """A simulated pipeline."""
    rows = []
    for rank, spans in enumerate(timeline.spans):
        first, *others = timeline.schedule.stages_of(rank)
        row = []
        for span in spans:
            actions = actions_of(span.step)
            is_second = actions[0].stage in others and first not in others
            row.append(Box(_kind(span.step), float(span.start), float(span.end), _label(actions), is_second))
        rows.append(tuple(row))
    return Pipeline(title, tuple(rows))


def _kind(step: Action | Overlapped) -> str:
    return "&" if isinstance(step, Overlapped) else step.kind.value


def _label(actions: Sequence[Action]) -> str:
    return "/".join(str(action.micro_batch) for action in actions)


def draw(pipelines: Sequence[Pipeline], unit: str) -> str:
    """An `svg` element with all pipelines below one another, on the time scale of the longest."""
    longest = max(pipeline.makespan for pipeline in pipelines) or 1.0
    scale = (_WIDTH - _LEFT - 8) / longest
    kinds = [kind for kind in _COLOURS if any(box.kind == kind for p in pipelines for row in p.rows for box in row)]
    parts, top = [*_legend(kinds)], 30
    labels_left = _MAX_LABELS
    for pipeline in pipelines:
        parts.append(f'<text x="0" y="{top + 20}" font-weight="bold" class="ink">{escape(pipeline.title)}</text>')
        top += _HEAD
        parts += _rows(pipeline, top, scale)
        texts = list(_labels(pipeline, top, scale))
        if len(texts) <= labels_left:
            parts += texts
            labels_left -= len(texts)
        top += _PITCH * len(pipeline.rows)
        x = _LEFT + pipeline.makespan * scale
        parts.append(f'<text x="{_LEFT}" y="{top + 12}" class="ink">0</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{top + 12}" text-anchor="end" class="ink">{pipeline.makespan:.4g} {unit}</text>'
        )
        top += 24
    label = escape("; ".join(pipeline.title for pipeline in pipelines))
    body = "\n".join(parts).replace('class="ink"', 'fill="var(--ink)"')
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {top}" font-size="{_FONT}" '
        f'font-family="sans-serif">\n{body}\n</svg>'
    )


def _legend(kinds: Sequence[str]) -> Iterator[str]:
    for place, kind in enumerate(kinds):
        x = 150 * place
        yield f'<rect x="{x}" y="4" width="14" height="14" fill="{_COLOURS[kind]}"/>'
        yield f'<text x="{x + 20}" y="16" class="ink">{escape(_NAMES[kind])}</text>'


def _rows(pipeline: Pipeline, top: float, scale: float) -> Iterator[str]:
    paths: dict[str, list[str]] = {}
    frames = []
    for rank, row in enumerate(pipeline.rows):
        y = top + _PITCH * rank
        width = pipeline.makespan * scale
        yield f'<text x="{_LEFT - 6}" y="{y + 16}" text-anchor="end" class="ink">rank {rank}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_ROW}" fill="var(--grid)" opacity="0.5"/>'
        for box in row:
            x, wide = _LEFT + box.start * scale, (box.end - box.start) * scale
            # A gap between neighbours, as far as there is room for one.
            wide = max(wide - min(1.0, wide / 6), 0.2)
            outline = f"M{x:.1f} {y}h{wide:.1f}v{_ROW}h{-wide:.1f}z"
            paths.setdefault(box.kind if box.kind in _COLOURS else UNKNOWN, []).append(outline)
            if box.is_second:
                frames.append(f"M{x:.1f} {y + _ROW - 2}h{wide:.1f}")
    for kind, outlines in paths.items():
        yield f'<path fill="{_COLOURS[kind]}" d="{"".join(outlines)}"/>'
    if frames:
        yield f'<path stroke="#000000" stroke-width="3" d="{"".join(frames)}"/>'


def _labels(pipeline: Pipeline, top: float, scale: float) -> Iterator[str]:
    for rank, row in enumerate(pipeline.rows):
        y = top + _PITCH * rank + 16
        for box in row:
            if box.label and (box.end - box.start) * scale > _LETTER * len(box.label) + 2:
                x = _LEFT + (box.start + box.end) / 2 * scale
                yield f'<text x="{x:.1f}" y="{y}" text-anchor="middle" fill="#000000">{escape(box.label)}</text>'
