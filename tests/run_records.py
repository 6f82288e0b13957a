"""Folders of runs that nobody trained: metrics, events, pipeline and configuration with every key a run writes, and
with faults that are planted on request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from support import PROJECT

from parallel.schedule import Overlapped, actions_of, make_schedule
from parallel.simulate import Costs, simulate
from pretrain.config import Config, dump_config, load_config

PARTS = ("embedding", "attention", "dense_mlps", "routed_experts", "shared_experts", "gates", "norms", "head", "mtp")
PHASES = {
    "data": 0.002, "forward": 0.28, "backward": 0.5, "all_to_all": 0.05, "pipeline": 0.06, "optimizer": 0.08,
    "other": 0.02,
}  # fmt: skip
START = 1_700_000_000.0


@dataclass(frozen=True)
class Faults:
    """What goes wrong. `dead` is a layer, an expert, and the step after which it gets nothing; `slow` a rank, how much
    longer it computes, and from which step on; `spikes` sizes by step; `events` are appended as they are."""

    dead: tuple[tuple[str, int, int], ...] = ()
    slow: tuple[int, float, int] | None = None
    spikes: Mapping[int, float] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    failed_saves: tuple[int, ...] = ()
    resumed: tuple[int, ...] = ()
    violation: float = 0.2
    memory: float = 55.0
    underflow: float = 0.004
    received: float = 1.2
    data: float = 0.002
    slowed_from: int | None = None
    events: tuple[Mapping[str, Any], ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How large a run is, and how often it records."""

    num_steps: int = 300
    world_size: int = 8
    load_every: int = 10
    parts_every: int = 25
    config: str = "tiny.toml"
    overrides: tuple[str, ...] = (
        "parallel.pp=2",
        "parallel.ep=2",
        'parallel.schedule="dualpipev"',
        "train.batch_size=32",
    )
    total_tokens: float = 1_200_000
    seed: int = 0

    def load(self) -> Config:
        """The configuration."""
        return load_config(PROJECT / "configs" / self.config, ["train.micro_batch_size=1", *self.overrides])


BIG = Recipe(
    num_steps=5000, world_size=2048, parts_every=100, config="dsv3_671b.toml", overrides=(), total_tokens=14.75e12
)


def write_synthetic_run(folder: Path, recipe: Recipe = Recipe(), faults: Faults = Faults()) -> Path:
    """Writes the folder of a run, and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe.load()
    config = replace(config, run=replace(config.run, name=folder.name, dir=str(folder.parent)))
    (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for line in _lines(config, recipe, faults):
            file.write(json.dumps(line) + "\n")
    events = "".join(json.dumps(event) + "\n" for event in _events(recipe, faults))
    (folder / "events.jsonl").write_text(events, encoding="utf-8")
    if config.parallel.pp > 1:
        (folder / "pipeline.json").write_text(json.dumps(measured_pipeline(config, recipe)), encoding="utf-8")
    origin = {
        "file": f"configs/{recipe.config}",
        "overrides": list(recipe.overrides),
        "device": "NVIDIA H100 80GB HBM3",
        "device_memory_gib": 79.6,
    }
    (folder / "origin.json").write_text(json.dumps(origin), encoding="utf-8")
    return folder


def _lines(config: Config, recipe: Recipe, faults: Faults) -> Any:
    random = np.random.default_rng(recipe.seed)
    model, layers = config.model, [str(layer) for layer in config.model.moe_layers]
    affinity = {layer: random.normal(0, 0.05, model.n_routed_experts) for layer in layers}
    per_step = recipe.total_tokens / recipe.num_steps
    for step in range(1, recipe.num_steps + 1):
        tokens = round(per_step * step)
        values = config.full_timeline.at(tokens)
        loss = 1.8 + 8 * step**-0.5 + random.normal(0, 0.02) + faults.spikes.get(step, 0.0)
        seconds = (2.0 if faults.slowed_from and step >= faults.slowed_from else 1.0) * (1 + 0.02 * random.random())
        line: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": loss + 0.3 * (loss + 0.4),
            "lm_loss": loss,
            "mtp_loss": loss + 0.4,
            "balance_loss": 1e-4,
            "lr": values.learning_rate,
            "bias_update_speed": values.bias_update_speed,
            "mtp_weight": values.mtp_weight,
            "batch_size": values.batch_size,
            "world_size": recipe.world_size,
            "seq_len": values.seq_len,
            "grad_norm": 0.5 + 3 / step + 0.05 * random.random(),
            "step_time_s": seconds,
            "tokens_per_s": per_step / seconds,
            "tflops_per_gpu": 400.0 / seconds,
            "mfu": 0.4 / seconds,
            "max_memory_gib": faults.memory * (1 - 0.2 / step),
            "load_max_violation": faults.violation * (1 + 0.1 * random.random()),
            "dead_experts": sum(step > since for _, _, since in faults.dead),
            "data_position": step * values.batch_size,
            "skipped": sum(skipped <= step for skipped in faults.skipped),
            "spikes": len([spike for spike in faults.spikes if spike <= step]),
            "checkpoint_failed": sum(failed <= step for failed in faults.failed_saves),
            "time": START + step,
            "phases": _phases(random, seconds, faults),
        }
        if step % 50 == 0:
            line["val_loss"] = 1.85 + 8 * step**-0.5
        if step % recipe.load_every == 0:
            line |= _experts(config, recipe, faults, step, affinity, random)
        if step % recipe.parts_every == 0:
            line |= _rare(config, recipe, faults, step, random)
        yield line | faults.changes


def _phases(random: np.random.Generator, seconds: float, faults: Faults) -> dict[str, float]:
    noise = 1 + 0.05 * random.random(len(PHASES))
    phases = {name: share * seconds * float(n) for (name, share), n in zip(PHASES.items(), noise, strict=True)}
    return phases | {"data": faults.data * seconds, "save": 0.0}


def _experts(
    config: Config, recipe: Recipe, faults: Faults, step: int, affinity: dict[str, Any], random: np.random.Generator
) -> dict[str, Any]:
    num_experts, progress = config.model.n_routed_experts, step / recipe.num_steps
    loads, moe = {}, {}
    for layer, preference in affinity.items():
        expected = 2000 * np.exp(preference * (1 - 0.8 * progress) + random.normal(0, 0.03, num_experts))
        counts = random.poisson(expected)
        for _, expert, _ in (dead for dead in faults.dead if dead[0] == layer and step > dead[2]):
            counts[expert] = 0
        share = counts[counts > 0] / counts.sum()
        loads[layer] = counts.tolist()
        moe[layer] = {
            "max_violation": float(counts.max() / counts.mean() - 1) if faults.violation < 1 else faults.violation,
            "dead_experts": int((counts == 0).sum()),
            "entropy": float(-(share * np.log(share)).sum() / np.log(num_experts)),
            "bias_min": -0.05 - 0.1 * progress,
            "bias_max": 0.05 + 0.1 * progress,
        }
    received = {"max": 1000.0 * faults.received, "mean": 1000.0}
    return {"expert_load": loads, "moe": moe, "received_rows": received, "rounds_max": 1}


def _rare(config: Config, recipe: Recipe, faults: Faults, step: int, random: np.random.Generator) -> dict[str, Any]:
    parts = {
        name: {
            "grad_norm": 0.1 * (place + 1) * (1 + 0.1 * random.random()),
            "weight_norm": 30.0 * (place + 1),
            "update_ratio": 1e-3 / (place + 1),
            "grad_amax": 1e-3 * (place + 1),
            "weight_amax": 0.5 + 0.1 * place,
        }
        for place, name in enumerate(PARTS)
    }
    # The last stage has the head, which is no fault of its ranks.
    stage = np.arange(recipe.world_size) * config.parallel.pp // recipe.world_size
    busy = (0.8 + 0.04 * (stage == config.parallel.pp - 1)) * (1 + 0.01 * random.random(recipe.world_size))
    if faults.slow and step >= faults.slow[2]:
        busy[faults.slow[0]] *= faults.slow[1]
    fp8 = {f"fp8_amax_{kind}": 3.0 for kind in ("activation", "weight", "gradient")}
    fp8 |= {f"fp8_underflow_{kind}": 0.001 for kind in ("activation", "weight")}
    fp8 |= {"fp8_underflow_gradient": faults.underflow}
    fp8 |= {f"fp8_overflow_{kind}": 0.0 for kind in ("activation", "weight", "gradient")}
    return {"parts": parts, "ranks": {"busy_s": busy.tolist()}, **fp8}


def _events(recipe: Recipe, faults: Faults) -> list[Mapping[str, Any]]:
    def event(step: int, kind: str, text: str) -> dict[str, Any]:
        return {"time": START + step, "step": step, "kind": kind, "text": text}

    events: list[Mapping[str, Any]] = [event(0, "start", "started: 8 processes on cuda")]
    saves = range(100, recipe.num_steps + 1, 100)
    events += [
        event(step, "save", f"saved step {step:,} in 1.2 s") for step in saves if step not in faults.failed_saves
    ]
    events += [event(step, "skip", f"step {step:,}: loss or gradient not finite, left out") for step in faults.skipped]
    events += [event(step, "spike", f"step {step:,}: spike: loss: applied nevertheless") for step in faults.spikes]
    events += [event(step, "save_failed", f"step {step} not saved: no space left") for step in faults.failed_saves]
    events += [event(step, "resume", f"resumed after step {step:,}") for step in faults.resumed]
    events.append(event(recipe.num_steps, "finish", "finished"))
    return [*sorted(events, key=lambda found: found["step"]), *faults.events]


def measured_pipeline(config: Config, recipe: Recipe) -> dict[str, Any]:
    """RUN/pipeline.json as a run would write it: the schedule carried out a little slower on every rank."""
    parallel = config.parallel
    last = config.full_timeline.at(round(recipe.total_tokens))
    shape = parallel.mesh_shape(recipe.world_size)
    number = last.batch_size // (shape.dp * config.train.micro_batch_size)
    schedule = make_schedule(parallel.schedule, num_ranks=parallel.pp, num_micro_batches=number)
    timeline = simulate(schedule, Costs(forward=0.010, backward=0.021, weight=0.010, overlapped=0.028, send=0.002))
    rows = []
    for spans in timeline.spans:
        row = []
        for span in spans:
            row += [
                [action.kind.value, action.stage, action.micro_batch, float(span.start), float(span.end)]
                for action in actions_of(span.step)
            ]
        rows.append(row)
    assert not parallel.schedule.startswith("dualpipe") or any(
        isinstance(span.step, Overlapped) for spans in timeline.spans for span in spans
    )
    return {
        "step": 2,
        "schedule": parallel.schedule,
        "num_ranks": parallel.pp,
        "num_micro_batches": number,
        "spans": rows,
    }
