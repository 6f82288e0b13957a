"""`pretrain rehearse`: a long run played through in minutes, so that it will not be the first to cross its boundaries.

OUT/text.jsonl, OUT/data     what the samples are made of      OUT/rehearsal.json   what was seen, as numbers
OUT/rehearse-NAME            a run folder like any other       OUT/output.txt       what the processes printed
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from data.shards import write_atomically
from pretrain.checkpoints.checkpoint import CheckpointReader, list_checkpoints
from pretrain.config import Config, check_layout, dump_config, load_config
from pretrain.errors import DONE, REHEARSAL_FAILED, UserError
from pretrain.rehearsal.axis import boundaries
from pretrain.rehearsal.check import Metrics, check_stretch, crossings, row_of
from pretrain.rehearsal.ranks import RankError, load, train_on_ranks
from pretrain.rehearsal.scale import Rehearsal, describe, make_rehearsal
from pretrain.rehearsal.text import count_ends, samples
from pretrain.reports.report import write_report

RECORD = "rehearsal.json"
_WIDTH = 110
_COLUMNS = ("boundary", "tokens", "steps", "learning rate", "batch", "γ", "MTP", "loss", "")


def rehearse(config: Config, *, out: Path | None, processes: int, steps: int) -> int:
    """Rehearses a run, prints what was seen, and returns the exit status. Raises UserError for a run that cannot be
    rehearsed."""
    began = time.monotonic()
    out = Path(config.run.dir) / f"rehearse-{config.run.name}" if out is None else out
    _check(config, processes)
    _clear(out)
    data, vocab_size, source = samples(config.data, out / "data")
    plan = make_rehearsal(config, vocab_size=vocab_size, processes=processes, steps=steps)
    small = replace(plan.config, data=data, run=replace(plan.config.run, dir=str(out)))
    plan = replace(plan, config=_through_toml(small, out / "rehearsal.toml"))
    check_layout(plan.config, plan.world_size)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)
    _tell_plan(plan, source, console)
    load()
    mistakes = _play(plan, out, steps, console)
    return _report(plan, out, mistakes, time.monotonic() - began, console)


def _check(config: Config, processes: int) -> None:
    """What can be said before anything is prepared."""
    make_rehearsal(config, vocab_size=64, processes=processes, steps=2)


def _clear(out: Path) -> None:
    """Makes the folder, and removes what an earlier rehearsal left there, but for its data."""
    record = out / RECORD
    if out.exists() and not record.is_file() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no rehearsal; give another --out")
    for path in out.glob("rehearse-*"):
        shutil.rmtree(path)
    (out / "output.txt").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(record, b"{}\n")


def _through_toml(config: Config, path: Path) -> Config:
    """The same configuration, read as a user's would be, with all its checks."""
    path.write_text(dump_config(config), encoding="utf-8")
    return load_config(path)


def _play(plan: Rehearsal, out: Path, steps: int, console: Console) -> list[list[str]]:
    """Trains stretch after stretch, each in new processes, until one is not as it should be. Returns what was wrong
    with each."""
    mistakes: list[list[str]] = []
    num_stretches = len(boundaries(plan.original))
    with _progress(plan, console) as tick:
        for number in range(num_stretches):
            stretch, begin = plan.stretch(number), time.monotonic()
            before = len(read_lines(stretch.run.folder))
            try:
                train_on_ranks(stretch, plan.world_size, out / "output.txt", tick)
                lines = read_lines(stretch.run.folder)
                found = check_stretch(plan, number, lines, steps) + _check_saved(stretch, lines, before)
            except RankError as error:
                found = [f"{error} (see {out / 'output.txt'})"]
            mistakes.append(found)
            count = len(read_lines(stretch.run.folder)) - before
            console.print(
                f"stretch {number + 1} of {num_stretches}: {count} steps in {time.monotonic() - begin:.0f} s"
                + (", FAIL" if found else "")
            )
            sys.stdout.flush()
            if found:
                break
    return mistakes


def _check_saved(config: Config, lines: list[Metrics], before: int) -> list[str]:
    """Whether the newest checkpoint is of the last step, and the stretch went on after the last of the one before."""
    found = []
    checkpoints = list_checkpoints(config.run.folder)
    saved = CheckpointReader(checkpoints[-1]).manifest.state["train"]["step"] if checkpoints else 0
    if saved != len(lines):
        found.append(f"saved after step {saved}, not after step {len(lines)}, the last")
    begins = [
        line
        for line in (config.run.folder / "log.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith(("started", "resumed"))
    ]
    expected = f"resumed after step {before:,}:" if before else "started:"
    if not begins or not begins[-1].startswith(expected):
        found.append(f"began with {begins[-1:]}, not {expected!r}")
    return found


def read_lines(run_folder: Path) -> list[Metrics]:
    """The steps that a run has recorded; a torn last line is left out."""
    path = run_folder / "metrics.jsonl"
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


@contextmanager
def _progress(plan: Rehearsal, console: Console) -> Iterator[Any]:
    """A bar over the tokens of the rehearsal, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=plan.config.train.tokens)
        num_steps, folder, seen = len(plan.starts()), plan.config.run.folder, [0.0]

        def tick() -> None:
            # Steps take seconds: reading their few lines once a second costs nothing.
            if time.monotonic() - seen[0] > 1:
                seen[0] = time.monotonic()
                lines = read_lines(folder)
                if lines:
                    text = f"step {lines[-1]['step']} of {num_steps} · loss {lines[-1]['loss']:.3f}"
                    bar.update(task, completed=lines[-1]["tokens"], description=text)

        yield tick


def _tell_plan(plan: Rehearsal, source: str, console: Console) -> None:
    model, parallel = plan.config.model, plan.config.parallel
    console.print(
        f"[bold]Rehearsal of {plan.original.run.name}[/]: {model.num_hidden_layers} layers and "
        f"{model.num_nextn_predict_layers} of multi-token prediction, {parallel.pp} pipeline ranks "
        f"({parallel.schedule}), {model.n_routed_experts} experts in {model.n_group} groups, "
        f"{model.num_experts_per_tok} a token, {plan.config.precision.dtype}",
        f"processes: {plan.world_size} on CPU, {len(plan.starts())} steps",
        f"text: {source}",
        sep="\n",
    )
    num_samples, ends, rewritten = count_ends(plan.config)
    console.print(f"samples: {num_samples:,} with {ends:,} ends of documents, {rewritten:,} of them rewritten for FIM")
    scaled, missing = describe(plan)
    if plan.config.data.fim_rate and not rewritten:
        missing.append(f"FIM, whose rate of {plan.config.data.fim_rate:g} takes more documents, such as of --steps 8")
    console.print(f"smaller: {'; '.join(scaled)}", f"not rehearsed: {'; '.join(missing)}", sep="\n", markup=False)


def _report(plan: Rehearsal, out: Path, mistakes: list[list[str]], seconds: float, console: Console) -> int:
    folder = plan.config.run.folder
    lines = read_lines(folder)
    rows = crossings(plan, lines, mistakes)
    failed = any(mistakes) or any(row.mistakes for row in rows)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Boundaries of {plan.original.run.name}", title_justify="left"
    )
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("boundary", "") else "right")
    for row in rows:
        table.add_row(*row_of(row), "[red]FAIL" if row.mistakes else "[green]PASS")
    console.print(table, soft_wrap=False)
    for text in dict.fromkeys(text for row in rows for text in row.mistakes):
        console.print(f"FAIL {text}", markup=False)
    record = {
        "config": plan.original.run.name,
        "passed": not failed,
        "seconds": seconds,
        "processes": plan.world_size,
        "steps": len(lines),
        "boundaries": [asdict(row) for row in rows],
    }
    write_atomically(out / RECORD, json.dumps(record, indent=1).encode())
    page = f", {write_report(folder)}" if lines else ""
    verdict = "FAIL" if failed else "PASS"
    console.print(f"{verdict} after {seconds / 60:.1f} minutes: {folder}{page}", markup=False)
    sys.stdout.flush()
    return REHEARSAL_FAILED if failed else DONE
