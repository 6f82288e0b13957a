"""`pretrain report A B`: runs that are there already, side by side on one page, whatever samples they saw.

Runs are laid over one another by the tokens they have seen; between two of its steps a run is taken to go straight.
Where two runs saw the same tokens at every step, the noise of their gap is known, as in `pretrain.loss_gap`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.shards import write_atomically
from pretrain.errors import UserError
from pretrain.loss_gap import MIN_STEPS, estimate_end, last_steps, relative_gaps
from pretrain.reports.config_cards import shown_value
from pretrain.reports.config_values import differing
from pretrain.reports.facts import last, of, tail
from pretrain.reports.findings import find
from pretrain.reports.page import Card, Facts, Notice, page, table
from pretrain.reports.pictures import picture
from pretrain.reports.plots import Line, Panel
from pretrain.reports.progress import slow_bar
from pretrain.reports.run_record import RunRecord, read_record
from pretrain.reports.series import Column
from pretrain.units import short

# As many as there are colours.
MAX_RUNS = 6
_MAX_NAME = 40
# Of the run: what the difference is averaged over, so that it can be seen through the noise of steps.
_AVERAGED = 50
_MAX_TOKENS_DRAWN = 200_000


@dataclass(frozen=True)
class Runs:
    """Records with a name each that no other has, and the token counts [T] over which they are drawn."""

    names: tuple[str, ...]
    records: tuple[RunRecord, ...]
    tokens: Column

    def lines(self, key: str, factor: float = 1.0, *, points: bool = False) -> list[Line]:
        """A column of every run."""
        return [
            Line(name, factor * self.along(record, key, between=not points), points=points)
            for name, record in zip(self.names, self.records, strict=True)
        ]

    def along(self, record: RunRecord, key: str, *, between: bool = True) -> Column:
        """A column of a run at `tokens`, NaN outside of what the run has seen. Without `between`, at its own steps
        only."""
        own, values = record.columns["tokens"], record.columns[key]
        known = np.isfinite(values)
        if not known.any():
            return np.full(len(self.tokens), np.nan)
        if between:
            return np.interp(self.tokens, own[known], values[known], left=np.nan, right=np.nan)
        found = np.full(len(self.tokens), np.nan)
        found[np.searchsorted(self.tokens, own[known]).clip(0, len(self.tokens) - 1)] = values[known]
        return found


def write_side_by_side(folders: Sequence[Path], out: Path | None) -> Path:
    """Writes a page that compares runs to `out`, or beside the first run, and returns where it lies. Raises UserError
    if a run is missing, is named twice, or there are too many."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("report compares runs with one another: name each folder once")
    if len(folders) > MAX_RUNS:
        raise UserError(
            f"report compares at most {MAX_RUNS} runs, as many as can be told apart; {len(folders)} are named"
        )
    names = _names(folders)
    with slow_bar("report") as tell:
        records = []
        for number, folder in enumerate(folders):
            records.append(read_record(folder, lambda share, number=number: tell((number + share) / len(folders))))  # type: ignore[misc]
        runs = Runs(names, tuple(records), _tokens(records))
        content = page(
            title=" · ".join(names),
            subtitle=", ".join(f"{name}: {folder}" for name, folder in zip(names, folders, strict=True)),
            tiles=_tiles(runs),
            cards=[card for card in _cards(runs) if card.picture],
            config_text="\n".join(
                f"# {name}\n{record.config_text}" for name, record in zip(names, records, strict=True)
            ),
            kind=f"Comparison of {len(names)} runs",
            notices=_notices(runs),
        )
    path = out or folders[0].parent / f"compare-{'-'.join(folder.resolve().name for folder in folders)}.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; use --out") from None
    return path


def _names(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders' own names, with those above them where that does not tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:])[-_MAX_NAME:] for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{number}: {part[-1]}"[:_MAX_NAME] for number, part in enumerate(parts, 1))


def _tokens(records: Sequence[RunRecord]) -> Column:
    """Every count of tokens after a step of any run, or, of very many, some."""
    tokens = np.unique(np.concatenate([record.columns["tokens"] for record in records]))
    return tokens[:: -(-len(tokens) // _MAX_TOKENS_DRAWN)]


def _tiles(runs: Runs) -> Facts:
    return [
        (f"loss of {name}, last 1 %", of(tail(record.columns["lm_loss"]), np.mean, "{:.4f}".format) or "–")
        for name, record in zip(runs.names, runs.records, strict=True)
    ]


def _notices(runs: Runs) -> list[Notice]:
    found = [
        Notice(f"{name}: {finding.text}", is_bad=finding.is_bad, is_odd=not finding.is_bad)
        for name, record in zip(runs.names, runs.records, strict=True)
        for finding in find(record)
    ]
    return found or [Notice("Nothing unusual in any of them.")]


def _cards(runs: Runs) -> list[Card]:
    return [
        _in_numbers(runs),
        _plotted(runs, "Loss", Panel("nats a token", runs.lines("lm_loss"))),
        _difference(runs),
        _late(runs),
        _plotted(runs, "Held-out loss", Panel("nats a token", runs.lines("val_loss", points=True))),
        _plotted(
            runs,
            "Throughput",
            Panel("tokens a second", runs.lines("tokens_per_s"), from_zero=True),
            Panel("MFU, % of the device's peak", runs.lines("mfu", 100), from_zero=True),
        ),
        _plotted(runs, "Gradient", Panel("norm before clipping", runs.lines("grad_norm"), log=True)),
        _plotted(
            runs,
            "Learning rate and batch",
            Panel("learning rate", runs.lines("lr"), from_zero=True),
            Panel("batch size, sequences", runs.lines("batch_size"), from_zero=True, whole=True),
        ),
        _plotted(
            runs,
            "Balance of the experts",
            Panel("largest load / mean load − 1, worst layer", runs.lines("load_max_violation"), from_zero=True),
        ),
        _plotted(runs, "Memory", Panel("most on the first rank, GiB", runs.lines("max_memory_gib"), from_zero=True)),
        _configurations(runs),
    ]


def _plotted(runs: Runs, title: str, *panels: Panel) -> Card:
    return Card(title, picture(runs.tokens, panels), ())


def _in_numbers(runs: Runs) -> Card:
    rows = []
    for name, record in zip(runs.names, runs.records, strict=True):
        columns = record.columns
        rows.append(
            [
                name,
                f"{columns['step'][-1]:,.0f}",
                short(columns["tokens"][-1]),
                of(tail(columns["lm_loss"]), np.mean, "{:.4f}".format),
                last(columns["val_loss"], "{:.4f}"),
                of(columns["tokens_per_s"], np.median, short),
                of(100 * columns["mfu"], np.median, "{:.1f} %".format),
                of(columns["max_memory_gib"], np.max, "{:.1f} GiB".format),
                last(columns["skipped"], "{:,.0f}"),
            ]
        )
    head = ["run", "steps", "tokens", "loss, last 1 %", "held out", "tokens/s", "MFU", "memory", "skipped"]
    return Card("In numbers", table("medians over the run where nothing else is said", head, rows), (), is_wide=True)


def _difference(runs: Runs) -> Card:
    """Each run less the first, where both have been."""
    first = runs.along(runs.records[0], "lm_loss")
    # The first has no line, but keeps its colour.
    lines, facts = [Line(runs.names[0], np.full(len(first), np.nan))], []
    for name, record in zip(runs.names[1:], runs.records[1:], strict=True):
        difference = runs.along(record, "lm_loss") - first
        lines.append(Line(f"{name}, averaged", _averaged(difference)))
        facts.append((f"{name}, last fifth", _gap(runs.records[0], record, difference)))
    title = f"nats a token less those of {runs.names[0]}"
    shown = picture(runs.tokens, [Panel(title, lines, limit=(0.0, "equal"))])
    return Card("Difference of the losses", shown or "<p></p>", facts)


def _averaged(values: Column) -> Column:
    """Means over a fiftieth of what is known."""
    known = np.flatnonzero(np.isfinite(values))
    averaged = np.full(len(values), np.nan)
    if len(known):
        size = max(1, len(known) // _AVERAGED)
        sums = np.cumsum(np.concatenate([[0.0], values[known]]))
        begins = np.maximum(np.arange(1, len(known) + 1) - size, 0)
        averaged[known] = (sums[1:] - sums[begins]) / (np.arange(1, len(known) + 1) - begins)
    return averaged


def _gap(a: RunRecord, b: RunRecord, difference: Column) -> str:
    """With its noise where the steps of both saw the same tokens."""
    known = difference[np.isfinite(difference)]
    if not len(known):
        return "no tokens in common"
    mean = f"{known[-last_steps(max(2, len(known))) :].mean():+.4f} nats"
    _, in_a, in_b = np.intersect1d(a.columns["step"], b.columns["step"], return_indices=True)
    alike = np.array_equal(a.columns["tokens"][in_a], b.columns["tokens"][in_b])
    if not alike or len(in_a) < MIN_STEPS:
        return mean
    end = estimate_end(relative_gaps(a.columns["lm_loss"][in_a], b.columns["lm_loss"][in_b]))
    return f"{mean}, {100 * end.mean:+.2f} ± {100 * end.noise:.2f} %"


def _late(runs: Runs) -> Card:
    begin = len(runs.tokens) // 5
    later = replace(runs, tokens=runs.tokens[begin:])
    if begin < MIN_STEPS:
        return Card("", "", ())
    return _plotted(later, "Loss after the first fifth", Panel("nats a token", later.lines("lm_loss")))


def _configurations(runs: Runs) -> Card:
    found = differing(*(record.config for record in runs.records))
    rows = [[key, *map(shown_value, values)] for key, values in found.items()]
    if not rows:
        return Card("What differs", "<p>No key of the configurations.</p>", (), is_wide=True)
    caption = f"{len(rows)} keys of the configurations"
    return Card("What differs", table(caption, ["key", *runs.names], rows, of_words=True), (), is_wide=True)
