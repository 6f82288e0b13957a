"""What a run must remember to go on bit for bit: where it stands, weights, moments, expert biases, random numbers."""

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.stream import DataPosition
from model.fp8 import AMAX_HISTORY, Quantizer, quantizers
from model.router import BIAS_NAME
from parallel.launch import gather_texts
from parallel.optimizer import global_place
from pretrain.assemble import Assembly, failing_together
from pretrain.checkpoints.averages import Averages
from pretrain.checkpoints.checkpoint import (
    CheckpointReader,
    DamagedError,
    list_checkpoints,
    list_damaged,
    put_back_replaced,
    set_aside,
    step_folder,
)
from pretrain.checkpoints.saving import Saver, Snapshot
from pretrain.config import dump_config
from pretrain.errors import UserError

# Keys of [model] that a run may change on the way: longer contexts, and what matters to the loss or the start only.
_MAY_CHANGE = {"rope_scaling", "aux_loss_alpha", "initializer_range"}


@dataclass(frozen=True)
class TrainState:
    """After `step` optimizer steps: tokens seen, the place in the stream, and how many of the steps were skipped.
    `extra` is what else must go on after a resume, as values of JSON by the name of the part of the program they belong
    to; `after` keeps it."""

    step: int
    tokens: int
    position: DataPosition
    skipped: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def after(self, batch_size: int, *, skipped: bool) -> "TrainState":
        """The state after one more step of so many sequences."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + batch_size * self.position.seq_len,
            position=self.position.advanced(batch_size),
            skipped=self.skipped + skipped,
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {**asdict(self), "position": self.position.to_json(), "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainState":
        """The inverse of `to_json`."""
        position = DataPosition.from_json(value["position"])
        step, tokens, skipped = (int(value[name]) for name in ("step", "tokens", "skipped"))
        return cls(step, tokens, position, skipped, dict(value.get("extra", {})))


def first_state(run: Assembly) -> TrainState:
    """Before the first step, with the weights of `run.init_from` if it is given. Raises SharedError where they do not
    fit."""
    if run.config.run.init_from is not None:
        _begin_from(run, Path(run.config.run.init_from))
    return TrainState(0, 0, run.stream.start(run.timeline.at(0).seq_len))


def _begin_from(run: Assembly, given: Path) -> None:
    """Loads weights, expert biases and, where there are any, moments with their count of updates. Steps, tokens, data
    and random numbers begin anew, and a history of FP8 scales does."""
    readers = []
    with failing_together():
        checkpoints = list_checkpoints(given)
        folder = checkpoints[-1] if checkpoints else given
        if not folder.is_dir():
            raise UserError(f"run.init_from = {str(given)!r}: there is no such checkpoint, nor a run with one")
        readers.append(_verified(run, folder))
    reader = readers[0]
    has_moments = "train" in reader.manifest.state
    with failing_together():
        _check_same_model(run, reader, remedy="change one of them, or run.init_from")
        _check_same_tokens(run, reader)
        train = TrainState.from_json(reader.manifest.state["train"]) if has_moments else None
        for shard in run.optimizer.shards():
            for kind, tensor in shard.tensors.items():
                if kind == "param" or has_moments:
                    tensor.copy_(reader.range(f"{kind}/{shard.name}", shard.start, tensor.numel()))
        for name, buffer in _expert_biases(run).items():
            buffer.copy_(reader.range(f"buffer/{name}", 0, buffer.numel()))
    run.optimizer.refresh_weights(train.step - train.skipped if train is not None else 0)
    if run.place.is_first:
        run.folder.mkdir(parents=True, exist_ok=True)
        _tell(run, f"weights of {folder}, {'with their' if has_moments else 'without'} moments")


def _check_same_tokens(run: Assembly, reader: CheckpointReader) -> None:
    """Ids must mean what they meant, as far as the checkpoint says."""
    there, here = reader.manifest.state.get("tokenizer"), run.stream.datasets[0].tokenizer.sha256
    if there is not None and there["sha256"] != here:
        raise UserError(
            f"the tokenizer of [data] has sha256 {here[:12]}…, that of run.init_from, {reader.folder}, "
            f"{there['sha256'][:12]}…; prepare the data with the tokenizer that lies there"
        )


def open_saver(run: Assembly, averages: Averages | None = None) -> Saver:
    """What saves the checkpoints of a run, with averages if there are any."""
    config = run.config.checkpoint
    saver = Saver(
        run.folder,
        rank=run.place.rank,
        world_size=run.place.world_size,
        keep=config.keep,
        keep_every=config.keep_every,
        in_background=config.async_,
    )
    saver.prepare(_tensors_to_save(run, averages))
    return saver


def open_averages(run: Assembly, state: TrainState) -> Averages | None:
    """The averages of the weights that `checkpoint.ema` asks for, as the checkpoint of `state` has them, if it does."""
    decay = run.config.checkpoint.ema
    if not decay:
        return None
    readers, opened = [], []
    with failing_together():
        if (folder := step_folder(run.folder, state.step)).is_dir():
            readers.append(CheckpointReader(folder))
    saved = set(readers[0].keys("ema")) if readers else set()

    def load(key: str, master: Tensor) -> Tensor | None:
        name, _, start = key.rpartition("@")
        return readers[0].range(f"ema/{name}", int(start), master.numel()) if name in saved else None

    with failing_together():
        opened.append(Averages(decay, lambda: _owned_masters(run), load))
    return opened[0]


def save(run: Assembly, state: TrainState, saver: Saver | None = None, averages: Averages | None = None) -> None:
    """Saves a checkpoint of `state`, every rank its own part, and removes those that are not kept. A `saver` counts and
    tells what fails; without one, it is waited for and raised as SharedError."""
    keeper = saver or open_saver(run, averages)
    keeper.save(state.step, lambda: _snapshot(run, state, averages))
    if saver is None:
        keeper.finish()


def resume(run: Assembly) -> TrainState | None:
    """Loads the newest good checkpoint of the run, verified before anything is changed; None if there is none yet.

    Damaged ones are set aside, with a line in the log. Raises SharedError if all were damaged, or fit another run.
    """
    with failing_together():
        if run.place.is_first:
            put_back_replaced(run.folder)
    for name in _agreed_names(run):
        folder, readers = run.folder / "checkpoints" / name, []
        with failing_together():
            try:
                readers.append(_verified(run, folder))
                damage = ""
            except DamagedError as error:
                damage = str(error)
        found = [said for said in gather_texts(damage) if said]
        if not found:
            return _load(run, readers[0])
        with failing_together():
            if run.place.is_first:
                _tell(run, f"{found[0].partition(';')[0]}; it is now {set_aside(folder).name}")
    with failing_together():
        if run.place.is_first and (aside := list_damaged(run.folder)):
            raise UserError(
                f"no checkpoint of {run.folder} is good; set aside in {aside[0].parent} are "
                f"{', '.join(path.name for path in aside)}: put a good copy in their place, or begin again under "
                "another run.name"
            )
    return None


def _agreed_names(run: Assembly) -> list[str]:
    """The checkpoints of the run, newest first. Others might see an older state of a shared file system."""
    with failing_together():
        names = [path.name for path in list_checkpoints(run.folder, whole=False)] if run.place.is_first else []
    agreed: list[str] = json.loads(gather_texts(json.dumps(names[::-1]))[0])
    return agreed


def _verified(run: Assembly, folder: Path) -> CheckpointReader:
    reader = CheckpointReader(folder)
    reader.verify(run.place.rank, run.place.world_size)
    return reader


def _load(run: Assembly, reader: CheckpointReader) -> TrainState:
    with failing_together():
        _check_same_run(run, reader)
        state = TrainState.from_json(reader.manifest.state["train"])
        _load_tensors(run, reader, updates=state.step - state.skipped)
    return state


def _tell(run: Assembly, line: str) -> None:
    """A line for whoever watches and for the log, before there is a recorder."""
    print(line, file=sys.stderr, flush=True)
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        log.write(line + "\n")


def _owned_masters(run: Assembly) -> dict[str, Tensor]:
    return {f"{shard.name}@{shard.start}": shard.tensors["param"] for shard in run.optimizer.shards() if shard.owned}


def _snapshot(run: Assembly, state: TrainState, averages: Averages | None) -> Snapshot:
    return Snapshot(
        step=state.step,
        tensors=_tensors_to_save(run, averages),
        shapes={shard.name: shard.shape for shard in run.optimizer.shards() if shard.owned},
        state={
            "step": state.step,
            "train": state.to_json(),
            "data": run.stream.fingerprint,
            "tokenizer": asdict(run.stream.datasets[0].tokenizer),
            "context_length": state.position.seq_len,
        },
        texts={
            "config.toml": dump_config(run.config).encode(),
            run.tokenizer_file.name: run.tokenizer_file.read_bytes(),
        },
    )


def _tensors_to_save(run: Assembly, averages: Averages | None) -> dict[str, Tensor]:
    ema = averages.tensors() if averages else {}
    return {**tensors_to_save(run), **{f"ema/{key}": tensor for key, tensor in ema.items()}}


def tensors_to_save(run: Assembly) -> dict[str, Tensor]:
    """This rank's part of what a checkpoint holds, live, as ranges by `kind/name@start`."""
    tensors = {
        f"{kind}/{shard.name}@{shard.start}": tensor
        for shard in run.optimizer.shards()
        if shard.owned
        for kind, tensor in shard.tensors.items()
    }
    for name, generator_state in _random_states(run).items():
        tensors[f"rng/{name}@0"] = generator_state
    if any(ranks[0] == run.place.rank for ranks in run.mesh.shape.replicas()):
        for name, buffer in _expert_biases(run).items():
            tensors[f"buffer/{name}@0"] = buffer
    for history in _fp8_histories(run):
        if history.owned:
            tensors[f"fp8/{history.name}@{history.start}"] = history.tensor.flatten()
    return tensors


def _load_tensors(run: Assembly, reader: CheckpointReader, *, updates: int) -> None:
    for shard in run.optimizer.shards():
        for kind, tensor in shard.tensors.items():
            tensor.copy_(reader.range(f"{kind}/{shard.name}", shard.start, tensor.numel()))
    run.optimizer.refresh_weights(updates)
    for name, buffer in _expert_biases(run).items():
        buffer.copy_(reader.range(f"buffer/{name}", 0, buffer.numel()))
    for history in _fp8_histories(run):
        # A run may have begun without.
        if history.name in reader.keys("fp8"):
            saved = reader.range(f"fp8/{history.name}", history.start, history.tensor.numel())
            history.tensor.copy_(saved.view_as(history.tensor))
            history.quantizer.has_history = True
    for name in _random_states(run):
        generator_state = reader.tensor(f"rng/{name}")
        if generator_state is not None:
            _set_random_state(name, generator_state)


def _expert_biases(run: Assembly) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in run.model.named_buffers() if name.endswith(BIAS_NAME)}


class _History(NamedTuple):
    """The history of a product's delayed scales, [experts or 1, kinds, steps]: this rank's part of it begins at `start`
    of the whole flattened. Of equal parts on several ranks, one is `owned`."""

    name: str
    quantizer: Quantizer
    tensor: Tensor
    start: int
    owned: bool


def _fp8_histories(run: Assembly) -> Iterator[_History]:
    shape, rank = run.mesh.shape, run.place.rank
    for name, quantizer in quantizers(run.model).items():
        if quantizer.config.recipe == "delayed":
            partition = shape.expert_replicas() if quantizer.of_experts else shape.replicas()
            start, _ = global_place(name, tuple(quantizer.amax_history.shape), run.mesh)
            owned = any(min(ranks) == rank for ranks in partition)
            yield _History(f"{name}.{AMAX_HISTORY}", quantizer, quantizer.amax_history, start, owned)


def _random_states(run: Assembly) -> dict[str, Tensor]:
    """The states of this rank's generators, by a name that holds the rank."""
    states = {f"cpu.{run.place.rank}": torch.get_rng_state()}
    if run.place.device.type == "cuda":
        states[f"cuda.{run.place.rank}"] = torch.cuda.get_rng_state()
    return states


def _set_random_state(name: str, state: Tensor) -> None:
    if name.startswith("cuda"):
        torch.cuda.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def _check_same_run(run: Assembly, reader: CheckpointReader) -> None:
    """A run goes on only with the model and the order of data that it began with."""
    _check_same_model(run, reader, remedy="put it back, or choose another run.name")
    if "train" not in reader.manifest.state:
        raise UserError(
            f"checkpoint {reader.folder} holds weights only and cannot be trained on; choose another run.name"
        )
    if reader.manifest.state.get("data") != run.stream.fingerprint:
        raise UserError(
            f"[data] or run.seed changed since checkpoint {reader.folder}, so the order of samples would too; "
            "put them back, or choose another run.name"
        )


def _check_same_model(run: Assembly, reader: CheckpointReader, *, remedy: str) -> None:
    try:
        there = tomllib.loads(reader.text("config.toml"))["model"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise DamagedError(f"checkpoint {reader.folder} is damaged: config.toml: {error}; use another") from None
    here = tomllib.loads(dump_config(run.config))["model"]
    for key in sorted((there.keys() | here.keys()) - _MAY_CHANGE):
        if there.get(key) != here.get(key):
            raise UserError(
                f"model.{key} = {here.get(key)} does not fit checkpoint {reader.folder}, whose run has "
                f"{there.get(key)}; {remedy}"
            )
