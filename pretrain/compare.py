"""`pretrain compare`: two configurations trained on the same samples, to judge the gap between their losses.

Both are ordinary runs, A in OUT/a and B in OUT/b, one after another in the same processes: what was interrupted goes
on, what is complete is not trained again. Instead of a configuration, the folder of a run that is there already may be
given. Configurations may differ in how they compute, such as precision, kernels or layout, but not in what.
"""

import gc
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from parallel.launch import Place, gather_texts
from pretrain.assemble import assemble, failing_together, open_data
from pretrain.checkpoints.checkpoint import CheckpointReader, list_checkpoints
from pretrain.config import Config, load_config
from pretrain.errors import DONE, GAP_TOO_LARGE, UserError
from pretrain.loop import catch_stop_signals, train
from pretrain.loss_gap import MIN_STEPS, Verdict
from pretrain.recorder import METRICS
from pretrain.reports.compare import RunPair, measure, write_comparison
from pretrain.reports.config_values import flatten, show_value
from pretrain.reports.run_record import CONFIG
from pretrain.state import TrainState

# What must be alike, or the samples, or what is learned from them, would not be. Tables stand for all their keys.
_ALIKE = (
    "model", "timeline", "run.seed", "run.init_seed", "data.fim_rate", "data.cross_document_attention",
    "train.seq_len", "train.batch_size", "optimizer.beta1", "optimizer.beta2", "optimizer.eps",
    "optimizer.weight_decay", "optimizer.clip",
)  # fmt: skip
_ENDS = ("train.steps", "train.tokens")
# What may change while a run goes on.
_MAY_CHANGE = (
    "run.dir", "run.name", "data.prefetch", "data.verify", "parallel", "checkpoint", "logging",
    "train.validate_every", "train.validation_samples", *_ENDS,
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One run: what it is called beside the others (A, B), its own name, its configuration with the folder where it
    lies, and whether it is trained or only read."""

    role: str
    name: str
    config: Config
    trains: bool

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return self.config.run.folder


@dataclass(frozen=True)
class Comparison:
    """Runs A and B, and runs like A with other initial weights; where results go; the limit, as a fraction."""

    a: Side
    b: Side
    seeds: tuple[Side, ...]
    out: Path
    limit: float
    last_step: int | None

    @property
    def trained(self) -> list[Side]:
        """The runs to train, in order."""
        return [side for side in (self.a, self.b, *self.seeds) if side.trains]


def plan_comparison(
    paths: tuple[Path, Path],
    *,
    overrides: Sequence[str],
    overrides_b: Sequence[str],
    steps: int | None,
    num_seeds: int,
    out: Path | None,
    limit: float,
) -> Comparison:
    """Reads both configurations, or those of runs that are there, and checks that they are about the same samples.
    Raises UserError, before any work, for what does not fit together."""
    if steps is not None and steps < MIN_STEPS:
        raise UserError(f"--steps = {steps} must be at least {MIN_STEPS}: a gap and its noise need as many")
    _check_overrides(paths, overrides, overrides_b)
    configs = [_read(paths[0], overrides), _read(paths[1], [*overrides, *overrides_b])]
    names = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    out = out or Path(configs[0].run.dir) / f"compare-{names[0]}-{names[1]}"
    a, b = (
        Side(role, name, config, trains=False)
        if path.is_dir()
        else _trained(role, name, config, out / role.lower(), steps)
        for path, name, config, role in zip(paths, names, configs, "AB", strict=True)
    )
    _check_alike(a, b)
    seeds = []
    for number in range(1, num_seeds + 1):
        side = _trained(f"A with seed {number}", names[0], a.config, out / f"a-seed-{number}", steps)
        run = replace(side.config.run, init_seed=side.config.run.weights_seed + number)
        seeds.append(replace(side, config=replace(side.config, run=run)))
    return Comparison(a, b, tuple(seeds), out, limit, steps)


def train_runs(comparison: Comparison, place: Place) -> bool:
    """Trains what is not complete yet; False when a signal stopped it before all was. Processes must have been joined.
    Raises UserError, on all ranks alike, before the first step; LostRankError as `train` does."""
    if any(side.config.run.deterministic for side in comparison.trained):
        # Has to be there before cuBLAS is first used, whichever run is the deterministic one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    complete: list[str] = []
    with failing_together():
        if place.is_first:
            complete = [str(side.folder) for side in comparison.trained if _is_complete(side)]
            _check_same_samples(comparison)
    complete = json.loads(gather_texts(json.dumps(complete))[0])
    pending = [side for side in comparison.trained if str(side.folder) not in complete]
    if comparison.b in pending[1:]:
        _try_building(comparison.b.config, place)
    # While a run lasts it has its own handlers; these are for the time between two.
    with catch_stop_signals() as stop:
        for side in pending:
            _forget_last_run(place)
            if any(gather_texts("stop" if stop.requested else "")) or not train(side.config, place):
                return False
    return True


def report_gap(comparison: Comparison) -> int:
    """Compares what the runs have recorded, writes page, picture and numbers, prints the table; returns the exit
    status. Raises UserError where a run is missing, too short, or saw other samples."""
    pair = RunPair(
        name_a=comparison.a.name,
        name_b=comparison.b.name,
        folder_a=comparison.a.folder,
        folder_b=comparison.b.folder,
        seeds=[side.folder for side in comparison.seeds],
        last_step=comparison.last_step,
        limit=comparison.limit,
    )
    gap = measure(pair)
    comparison.out.mkdir(parents=True, exist_ok=True)
    write_comparison(gap, comparison.out)
    return DONE if gap.verdict is Verdict.WITHIN else GAP_TOO_LARGE


def report_together(comparison: Comparison, place: Place) -> int:
    """The same from the first of joined processes; all return the status."""
    status = DONE
    with failing_together():
        if place.is_first:
            status = report_gap(comparison)
    return int(gather_texts(str(status))[0])


def _check_overrides(paths: tuple[Path, Path], overrides: Sequence[str], overrides_b: Sequence[str]) -> None:
    """Raises UserError for overrides of a run that is there already."""
    folders = [path for path in paths if path.is_dir()]
    if overrides and folders:
        raise UserError(
            f"--set {overrides[0]} cannot change {folders[0]}, a run that is there already; remove it, or use --set-b "
            "if only B is trained"
        )
    if overrides_b and paths[1].is_dir():
        raise UserError(
            f"--set-b {overrides_b[0]} cannot change {paths[1]}, a run that is there already; remove it, or give a "
            "configuration"
        )


def _read(path: Path, overrides: Sequence[str]) -> Config:
    if not path.is_dir():
        return load_config(path, overrides)
    if not (path / METRICS).is_file():
        raise UserError(f"no metrics at {path / METRICS}; name the folder of a run that was trained, or a TOML file")
    config = _load_stored(path / CONFIG)
    return replace(config, run=replace(config.run, dir=str(path.parent), name=path.name))


def _load_stored(path: Path) -> Config:
    try:
        return load_config(path)
    except UserError as error:
        raise UserError(f"{path}, which that run has left, cannot be used: {error}") from None


def _trained(role: str, name: str, config: Config, folder: Path, steps: int | None) -> Side:
    run = replace(config.run, dir=str(folder.parent), name=folder.name)
    end = config.train if steps is None else replace(config.train, steps=steps, tokens=None)
    return Side(role, name, replace(config, run=run, train=end), trains=True)


def _check_alike(a: Side, b: Side) -> None:
    """Raises UserError where the configurations are about different samples, models or timelines."""
    names = _ALIKE + (_ENDS if a.trains and b.trains else ())
    found = [item for item in _differences(a.config, b.config) if _is_among(item[0], names)]
    if found:
        listed = "".join(f"\n  {key} = {one} in A, {other} in B" for key, one, other in found)
        raise UserError(
            "A and B must see the same samples, with the same model and timeline, or their gap would not tell how they "
            f"compute; make equal:{listed}"
        )


def _check_same_samples(comparison: Comparison) -> None:
    """Raises UserError where the data of the runs, by checksums, are not the same: those that configurations name, and
    those that checkpoints tell of."""
    known = []
    for side in (comparison.a, comparison.b, *comparison.seeds):
        reader = _newest(side)
        if reader is not None:
            known.append((f"the run in {side.folder}", reader.manifest.state.get("data")))
    for side in (comparison.a, comparison.b):
        if side.trains:
            known.append((f"data.datasets of {side.role}", open_data(side.config).fingerprint))
    for what, fingerprint in known[1:]:
        if fingerprint != known[0][1]:
            raise UserError(
                f"{what} has other samples than {known[0][0]}; use the same datasets and weights, or, if a dataset was "
                "prepared anew since, another --out"
            )


def _is_complete(side: Side) -> bool:
    """Whether the run is at its end. Raises UserError if what lies in its folder is another run."""
    reader = _newest(side)
    if reader is None:
        return False
    stored = _load_stored(reader.folder / CONFIG)
    found = [item for item in _differences(stored, side.config) if not _is_among(item[0], _MAY_CHANGE)]
    if found:
        key, there, here = found[0]
        raise UserError(
            f"{side.folder} holds a run with {key} = {there}, but {side.role} has {here}; give another --out, or "
            "remove that folder"
        )
    state = TrainState.from_json(reader.manifest.state["train"])
    return side.config.train.is_end(state.step, state.tokens)


def _newest(side: Side) -> CheckpointReader | None:
    checkpoints = list_checkpoints(side.folder)
    return CheckpointReader(checkpoints[-1]) if checkpoints else None


def _differences(a: Config, b: Config) -> list[tuple[str, str, str]]:
    """The keys whose values differ, with both values."""
    left, right = flatten(asdict(a)), flatten(asdict(b))
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    return [(key, show_value(left.get(key)), show_value(right.get(key))) for key in keys]


def _is_among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _try_building(config: Config, place: Place) -> None:
    """Builds the second run once before the first is trained, so that what this machine cannot do is told at once."""
    with failing_together():
        stream = open_data(config)
    assemble(config, place, stream).executor.dispatcher.close()


def _forget_last_run(place: Place) -> None:
    """Frees what the run before has held, and undoes what it has set for the process."""
    gc.collect()
    torch.use_deterministic_algorithms(False)
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(place.device)
