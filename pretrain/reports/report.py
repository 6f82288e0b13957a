"""The report of a run: what its metrics show, as one page of pictures with the numbers behind them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.shards import write_atomically
from pretrain.reports import config_cards, expert_cards, health_cards, loss_cards, pipeline_cards, speed_cards
from pretrain.reports.facts import duration, known, last, of
from pretrain.reports.findings import find
from pretrain.reports.page import Card, Facts, Notice, page
from pretrain.reports.progress import slow_bar
from pretrain.reports.run_record import RunRecord, read_record
from pretrain.units import short

REPORT = "report.html"
# Of the time a report takes, reading the metrics.
_READING = 0.6

CARDS: tuple[Callable[[RunRecord], Card], ...] = (
    loss_cards.loss,
    loss_cards.late_loss,
    loss_cards.schedule,
    loss_cards.gradient,
    speed_cards.throughput,
    speed_cards.memory,
    speed_cards.phases,
    speed_cards.ranks,
    expert_cards.balance,
    expert_cards.received,
    health_cards.parts,
    health_cards.fp8,
    pipeline_cards.pipeline,
    health_cards.events,
    expert_cards.layers,
    expert_cards.loads,
    config_cards.differences,
)


def write_report(run_folder: Path) -> Path:
    """Writes RUN/report.html from what lies in RUN, and returns where it lies. Raises UserError if there is no run to
    report on. On a terminal, a bar shows how far it is when it takes long."""
    with slow_bar(f"report of {run_folder.name}") as tell:
        record = read_record(run_folder, lambda share: tell(_READING * share))
        cards = []
        for number, make in enumerate(CARDS, 1):
            cards.append(make(record))
            tell(_READING + (1 - _READING) * number / len(CARDS))
        content = page(
            title=record.name,
            subtitle=f"last step on {record.written:%d %B %Y at %H:%M (UTC%z)}",
            tiles=tiles(record),
            cards=[card for card in cards if card.picture],
            config_text=record.config_text,
            notices=notices(record),
        )
    path = run_folder / REPORT
    write_atomically(path, content.encode("utf-8", errors="replace"))
    return path


def notices(record: RunRecord) -> list[Notice]:
    """What the page says first."""
    found = [Notice(finding.text, is_bad=finding.is_bad, is_odd=not finding.is_bad) for finding in find(record)]
    return found or [Notice("Nothing unusual: experts, ranks, loss, steps, saves and memory were looked at.")]


def tiles(record: RunRecord) -> Facts:
    """The numbers asked for most."""
    columns = record.columns
    return known(
        ("steps", f"{columns['step'][-1]:,.0f}"),
        ("tokens", short(columns["tokens"][-1])),
        ("loss", last(columns["lm_loss"], "{:.4f}")),
        ("held-out loss", last(columns["val_loss"], "{:.4f}")),
        ("tokens a second", of(columns["tokens_per_s"], np.median, short)),
        ("time in steps", of(columns["step_time_s"], np.sum, duration)),
    )
