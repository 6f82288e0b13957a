"""The loss, what drives it over the run, and the gradient."""

import math
from collections.abc import Iterator

import numpy as np

from pretrain.config import Config, parse_config
from pretrain.errors import UserError
from pretrain.reports.facts import known, last, of, tail, unless_zero
from pretrain.reports.page import Card
from pretrain.reports.pictures import picture
from pretrain.reports.plots import Line, Mark, Panel
from pretrain.reports.run_record import RunRecord
from pretrain.reports.series import as_number

_MIN_STEPS_TO_ZOOM = 50
# Of the width of a plot: marks nearer than this share a label.
_NEAR = 0.03
_NAMES = {
    "learning_rate": "learning rate",
    "bias_update_speed": "γ",
    "mtp_weight": "MTP weight",
    "batch_size": "batch",
    "seq_len": "length",
}


def loss(record: RunRecord) -> Card:
    """The loss over the whole run, with the boundaries of the timeline."""
    columns, marks = record.columns, boundaries(record)
    facts = known(
        ("next token, last step", last(columns["lm_loss"], "{:.4f}")),
        ("next token, last 1 % of the run", of(tail(columns["lm_loss"]), np.mean, "{:.4f}".format)),
        ("multi-token prediction, last step", last(unless_zero(columns["mtp_loss"]), "{:.4f}")),
        ("held out, last", last(columns["val_loss"], "{:.4f}")),
    )
    note = "Dotted lines: where a piece of the timeline ends." if marks else ""
    return Card("Loss", picture(columns["tokens"], [_loss_panel(record, 0)], marks), facts, note=note)


def late_loss(record: RunRecord) -> Card:
    """The loss after the first fifth, in which it falls too far to see the rest."""
    columns = record.columns
    begin = len(columns["step"]) // 5
    if begin < _MIN_STEPS_TO_ZOOM // 5:
        return Card("", "", ())
    held_out = columns["val_loss"]
    facts = known(
        ("next token, lowest step", of(columns["lm_loss"], np.min, "{:.4f}".format)),
        ("held out, lowest", of(held_out, np.min, "{:.4f}".format)),
        ("held out, last as perplexity", of(held_out, lambda values: math.exp(min(values[-1], 700)), "{:.4g}".format)),
    )
    shown = picture(columns["tokens"][begin:], [_loss_panel(record, begin)], boundaries(record))
    return Card("Loss after the first fifth", shown, facts)


def _loss_panel(record: RunRecord, begin: int) -> Panel:
    columns = record.columns
    lines = [
        Line("next token", columns["lm_loss"][begin:]),
        Line("multi-token prediction", unless_zero(columns["mtp_loss"])[begin:]),
        Line("held out", columns["val_loss"][begin:], points=True),
    ]
    return Panel("nats a token", lines)


def schedule(record: RunRecord) -> Card:
    """What the timeline sets."""
    columns = record.columns
    panels = [
        Panel("learning rate", [Line("learning rate", columns["lr"])], from_zero=True),
        Panel("batch size, sequences", [Line("batch size", columns["batch_size"])], from_zero=True, whole=True),
        Panel("speed of the bias update, γ", [Line("bias update speed", columns["bias_update_speed"])], from_zero=True),
        Panel("weight of multi-token prediction", [Line("MTP weight", columns["mtp_weight"])], from_zero=True),
    ]
    if len(np.unique(columns["seq_len"][np.isfinite(columns["seq_len"])])) > 1:
        panels.append(Panel("sequence length", [Line("length", columns["seq_len"])], from_zero=True, whole=True))
    facts = known(
        ("learning rate, highest", of(columns["lr"], np.max, "{:.3g}".format)),
        ("learning rate, last", last(columns["lr"], "{:.3g}")),
        ("batch, first", of(columns["batch_size"], lambda values: values[0], "{:,.0f}".format)),
        ("batch, last", last(columns["batch_size"], "{:,.0f}")),
        ("γ, last", last(columns["bias_update_speed"], "{:.3g}")),
        ("MTP weight, last", last(columns["mtp_weight"], "{:.3g}")),
    )
    return Card("Learning rate, batch, γ, MTP weight", picture(columns["tokens"], panels, boundaries(record)), facts)


def gradient(record: RunRecord) -> Card:
    """The gradient's norm and what was done about it."""
    norm, skipped = record.columns["grad_norm"], record.columns["skipped"]
    clip = _clip(record)
    limit = (clip, f"clipped at {clip:g}") if clip else None
    panel = Panel("norm before clipping", [Line("gradient norm", norm)], log=True, limit=limit)
    facts = known(
        ("median", of(norm, np.median, "{:.3g}".format)),
        ("median, last 1 % of the run", of(tail(norm), np.median, "{:.3g}".format)),
        ("largest", of(norm, np.max, "{:.3g}".format)),
        ("steps clipped", of(norm, lambda values: 100 * np.mean(values > clip), "{:.1f} %".format) if clip else ""),
        ("steps skipped", last(skipped, "{:,.0f}")),
    )
    return Card("Gradient", picture(record.columns["tokens"], [panel]), facts)


def boundaries(record: RunRecord) -> list[Mark]:
    """Where pieces of the timeline end, as far as the run has come; those that lie close together share a label."""
    end = float(record.columns["tokens"][-1])
    marks: list[Mark] = []
    for tokens, name in sorted(_ends_of_pieces(parsed(record))):
        if tokens >= end:
            continue
        if marks and tokens - marks[-1].tokens < _NEAR * end:
            names = marks[-1].label.split(", ")
            label = marks[-1].label if name in names else ", ".join([*names, name])
            marks[-1] = Mark(marks[-1].tokens, label)
        else:
            marks.append(Mark(tokens, name))
    return marks


def _ends_of_pieces(config: Config | None) -> Iterator[tuple[float, str]]:
    for key, name in _NAMES.items():
        pieces = getattr(config.timeline, key) if config else None
        for piece in pieces if isinstance(pieces, tuple) else ():
            if piece.until is not None:
                yield float(piece.until), name


def parsed(record: RunRecord) -> Config | None:
    """The configuration of the run, None where this version does not know its keys."""
    try:
        return parse_config(record.config)
    except (UserError, ValueError, TypeError, OverflowError, RecursionError):
        return None


def _clip(record: RunRecord) -> float:
    """The norm above which gradients were clipped, 0 if none."""
    optimizer = record.config.get("optimizer")
    clip = as_number(optimizer.get("clip")) if isinstance(optimizer, dict) else 0.0
    return clip if clip > 0 else 0.0
