"""How much of the exchange of expert rows is hidden under compute, from a trace of torch's profiler, and a picture.

    python benchmarks/overlap.py intervals.json picture.svg       # what overlap_speed.py --intervals wrote

The main phase is where pairs run, F of one micro-batch beside B of another: from the first compute kernel launched in a
pair to the end of the last. An all-to-all is hidden where a compute kernel runs on another stream. Its rows are carried
by kernels of NCCL, or by copies within or between devices in a stream where no kernel runs.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

PAIR = "pair"
Kind = Literal["forward", "backward", "all-to-all", "other transfer"]
Interval = tuple[float, float]
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernel:
    """On the device, in microseconds. `pair` is the number of the pair that launched it, -1 if none did."""

    start: float
    end: float
    kind: Kind
    pair: int


@dataclass(frozen=True)
class Overlap:
    """Microseconds: the main phase, its all-to-alls, how much of them is hidden, and how long a compute kernel ran."""

    phase: float
    exchange: float
    hidden: float
    computing: float

    @property
    def share(self) -> float:
        """Of all-to-alls that is hidden; nan where there are none."""
        return self.hidden / self.exchange if self.exchange else float("nan")


def read_trace(file: Path) -> list[Kernel]:
    """The kernels of a step in which pairs were marked by `record_function(PAIR)`, in order."""
    events = [event for event in json.loads(file.read_text())["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == PAIR]
    pairs = sorted((event["ts"], event["ts"] + event["dur"]) for event in marks)
    threads = {event["tid"] for event in marks}
    launches = {event["args"].get("correlation"): event for event in events if event.get("cat") in _LAUNCHES}
    computing = {_stream(event) for event in events if event.get("cat") == "kernel"}
    kernels = []
    for event in events:
        if event.get("cat") in _DEVICE:
            launch = launches.get(event.get("args", {}).get("correlation"))
            pair = -1 if launch is None else _place(pairs, launch["ts"])
            # Autograd launches from a thread of its own.
            forward = launch is None or launch["tid"] in threads
            kind = _kind(event, forward=forward)
            if event["cat"] == "gpu_memcpy" and _stream(event) not in computing:
                kind = "all-to-all" if re.search("DtoD|PtoP", event["name"]) else "other transfer"
            kernels.append(Kernel(event["ts"], event["ts"] + event["dur"], kind, pair))
    return sorted(kernels, key=lambda kernel: kernel.start)


def _stream(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("stream")


def _place(intervals: Sequence[Interval], moment: float) -> int:
    return next((place for place, (start, end) in enumerate(intervals) if start <= moment <= end), -1)


def _kind(event: dict[str, Any], *, forward: bool) -> Kind:
    if "nccl" not in event["name"].lower():
        return "forward" if forward else "backward"
    said = str(event.get("args", {}).get("Collective name", ""))
    is_exchange = "all_to_all" in said or (not said and re.search("SendRecv|AllToAll", event["name"], re.IGNORECASE))
    return "all-to-all" if is_exchange else "other transfer"


def measure_overlap(kernels: Iterable[Kernel]) -> Overlap:
    """Of the main phase."""
    kernels = main_phase(kernels)
    computing = union((each.start, each.end) for each in kernels if each.kind in ("forward", "backward"))
    exchanges = union((each.start, each.end) for each in kernels if each.kind == "all-to-all")
    phase = max((each.end for each in kernels), default=0.0) - min((each.start for each in kernels), default=0.0)
    return Overlap(phase, length(exchanges), length(intersection(exchanges, computing)), length(computing))


def main_phase(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The kernels that begin in it."""
    kernels = list(kernels)
    inside = [each for each in kernels if each.pair >= 0 and each.kind in ("forward", "backward")]
    if not inside:
        return []
    begin, end = min(each.start for each in inside), max(each.end for each in inside)
    return [each for each in kernels if begin <= each.start < end]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments in intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The moments in both of two unions."""
    common, place = [], 0
    for start, end in one:
        while place and other[place - 1][1] > start:
            place -= 1
        while place < len(other) and other[place][0] < end:
            both = max(start, other[place][0]), min(end, other[place][1])
            if both[0] < both[1]:
                common.append(both)
            place += 1
    return common


def length(intervals: Iterable[Interval]) -> float:
    """Of all together."""
    return sum(end - start for start, end in intervals)


def write_intervals(kernels: Iterable[Kernel], title: str, file: Path) -> None:
    """Those of the main phase, for a picture."""
    file.write_text(json.dumps({"title": title, "kernels": [asdict(each) for each in main_phase(kernels)]}))


def draw_overlap(kernels: Sequence[Kernel], title: str, file: Path) -> None:
    """The pair in the middle of the main phase: what runs when, as SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "overlap", "svg.fonttype": "none"}
    from matplotlib import pyplot

    pairs = sorted({each.pair for each in kernels if each.pair >= 0})
    shown = [each for each in kernels if each.pair == pairs[len(pairs) // 2]]
    begin, end = min(each.start for each in shown), max(each.end for each in shown)
    # Of copies the trace does not say who launched them.
    shown += [each for each in kernels if each.pair < 0 and begin <= each.start and each.end <= end]
    times = {
        kind: union(((each.start - begin) / 1e3, (each.end - begin) / 1e3) for each in shown if each.kind == kind)
        for kind in ("forward", "backward", "all-to-all")
    }
    hidden = intersection(times["all-to-all"], union(times["forward"] + times["backward"]))
    rows = (
        (2, times["forward"], "#3b6fb6", "kernels of the forward pass"),
        (1, times["backward"], "#d1773c", "kernels of the backward pass"),
        (0, times["all-to-all"], "#b55d60", "all-to-all, nothing beside it"),
        (0, hidden, "#5f9e6e", "all-to-all under compute"),
    )
    figure, axes = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    for row, intervals, color, label in rows:
        widths = [(start, end - start) for start, end in intervals]
        axes.broken_barh(widths, (row - 0.4, 0.8), color=color, label=label, linewidth=0)
    axes.set_yticks([])
    axes.set_xlim(0, max(end for intervals in times.values() for _, end in intervals))
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    saved = json.loads(Path(sys.argv[1]).read_text())
    draw_overlap([Kernel(**each) for each in saved["kernels"]], saved["title"], Path(sys.argv[2]))
