"""How long a step will take on given hardware, and so the run: work by `pretrain.planning.work` at the rates of
`pretrain.planning.hardware`, put in order by the schedule.

A pass lasts as long as its arithmetic and what it moves, one after another, and as its ways to experts and back, unless
it is overlapped with another pass. Of such a pair, the arithmetic c goes on at the share s of its speed while the
all-to-alls e of both are under way:

    c + (1 - s) e, or e if that is longer

Stages wait for one another as the simulated schedule says. After the last pass gradients are reduced, AdamW runs and
weights are gathered, one after another. Left out: launching kernels, skewed experts, reading data, saving, failures.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from model.config import ModelConfig
from model.counts import training_flops_per_token
from model.fp8 import Fp8Config
from parallel.optimizer import OptimizerConfig
from parallel.schedule import (
    FOLDED,
    Action,
    Kind,
    Overlapped,
    Schedule,
    ScheduleName,
    Step,
    actions_of,
    make_schedule,
    num_stages,
)
from parallel.simulate import simulate
from parallel.stages import part_of_rank, split_layers
from pretrain.planning.activations import Activations
from pretrain.planning.hardware import Hardware
from pretrain.planning.memory import ParameterSizes, parameter_sizes
from pretrain.planning.work import Passes, StageWork, Work

_FP32, _BF16 = 4, 2
Seconds = dict[str, float]
Traffic = dict[tuple[str, str], float]


@dataclass(frozen=True)
class StepPrediction:
    """A step of `tokens` tokens over all ranks. `parts` are the seconds of the rank that works longest by what it does:
    together they are the step; `bubble` is the share of the time of all passes that ranks wait, on the mean."""

    tokens: int
    parts: Mapping[str, float]
    bubble: float

    @property
    def seconds(self) -> float:
        """Of the step."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class _StageCosts:
    """Seconds of passes by kind and stage: `busy` in any case, `exchange` hidden where another pass is beside it, when
    arithmetic goes on at the share `overlapped`; and of a transfer to a neighbour."""

    busy: Mapping[tuple[Kind, int], float]
    exchange: Mapping[tuple[Kind, int], float]
    overlapped: float
    send: float

    def of_step(self, step: Step) -> float:
        """Duration of a step."""
        busy, exchange = self.needs(step)
        if isinstance(step, Overlapped):
            return max(busy + (1 - self.overlapped) * exchange, exchange)
        return busy + exchange

    def needs(self, step: Step) -> tuple[float, float]:
        """Its `busy` and `exchange`."""
        keys = [(action.kind, action.stage) for action in actions_of(step)]
        return sum(map(self.busy.__getitem__, keys)), sum(map(self.exchange.__getitem__, keys))


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts steps of a layout whose micro-batches are those of `sizes`. Where `fp8` has a recipe, routed experts are
    in FP8 if the hardware has an efficiency for it."""

    sizes: Activations
    optimizer: OptimizerConfig
    world_size: int
    fp8: Fp8Config
    hardware: Hardware

    @property
    def _model(self) -> ModelConfig:
        return self.sizes.model

    def step(self, num_micro_batches: int) -> StepPrediction:
        """One of so many micro-batches in each pipeline."""
        parallel = self.sizes.parallel
        most = 2 * num_stages(parallel.schedule, parallel.pp)
        if num_micro_batches <= most + 2:
            parts, waiting = self._passes(num_micro_batches)
        else:
            # From some number on, each further micro-batch adds the same.
            (few, wait), (more, longer_wait) = self._passes(most), self._passes(most + 2)
            count = (num_micro_batches - most) / 2
            parts = {name: few[name] + count * (more[name] - few[name]) for name in few}
            waiting = wait + count * (longer_wait - wait)
        bubble = waiting / sum(parts.values())
        return StepPrediction(self.tokens(num_micro_batches), {**parts, **self._end}, bubble)

    def tokens(self, num_micro_batches: int) -> int:
        """Of a step."""
        return num_micro_batches * self.sizes.micro_batch_size * self.sizes.seq_len * self._data_ranks

    def whole_seconds(self) -> tuple[float, float]:
        """What both passes of one micro-batch through all layers take: arithmetic and the like, and ways to experts."""
        passes = self._work.stage(range(self._model.num_hidden_layers), is_last=True)
        both = _by_kind(passes)[Kind.FORWARD] + _by_kind(passes)[Kind.BACKWARD]
        return sum(self._durations(both).values()), self._sending(both, ("dispatch", "combine"))

    def least_seconds(self, num_micro_batches: int) -> float:
        """What a step takes at least: the time that its busiest rank works, if all that can be hidden is."""
        parallel, last = self.sizes.parallel, len(self._stages) - 1
        passes = [
            [sum(costs[kind, stage] for kind in (Kind.FORWARD, Kind.BACKWARD)) for stage in range(last + 1)]
            for costs in (self._costs.busy, self._costs.exchange)
        ]
        longest = 0.0
        for rank in range(parallel.pp):
            stages = (rank, last - rank) if parallel.schedule in (*FOLDED, "dualpipe") else (rank,)
            share = num_micro_batches / 2 if parallel.schedule == "dualpipe" else num_micro_batches
            busy, exchange = (share * sum(seconds[stage] for stage in stages) for seconds in passes)
            exposed = 1 - self.hardware.efficiency.overlapped if "dualpipe" in parallel.schedule else 1.0
            longest = max(longest, busy + exposed * exchange, exchange)
        return longest + sum(self._end.values())

    def mfu(self, step: StepPrediction) -> float:
        """Share of the bf16 peak that the FLOPs of training are, without those of recomputation."""
        flops = step.tokens * training_flops_per_token(self._model, self.sizes.seq_len) / self.world_size
        return flops / step.seconds / (1e12 * self.hardware.bf16_tflops)

    def traffic(self, num_micro_batches: int) -> Traffic:
        """Bytes that a rank sends in a step by purpose and link, on the mean over ranks."""
        sent: Counter[tuple[str, str]] = Counter()
        passes = num_micro_batches / self.sizes.parallel.pp
        for stage in self._stages:
            for work in (stage.forward, stage.input_grad, stage.weight_grad):
                for key, size in work.sent.items():
                    sent[key] += passes * size  # type: ignore[assignment]
        boundaries = 2 * (len(self._stages) - 1) - (2 * self._turns)
        if boundaries:
            sent["pipeline", self._pipeline_link] += passes * boundaries * self._state_bytes  # type: ignore[assignment]
        for purpose, links in self._collectives(num_micro_batches).items():
            for link, size in links.items():
                sent[purpose, link] += size  # type: ignore[assignment]
        return {key: float(size) for key, size in sent.items() if size}

    def _passes(self, num_micro_batches: int) -> tuple[Seconds, float]:
        """Parts of the time of all passes on the rank that works longest, and how long ranks wait on the mean."""
        parallel = self.sizes.parallel
        schedule = _schedule(parallel.schedule, parallel.pp, num_micro_batches)
        timeline = simulate(schedule, self._costs)
        rank = min(range(schedule.num_ranks), key=timeline.idle)
        parts: Seconds = dict.fromkeys(self._kinds, 0.0)
        for (kind, stage), count in _count_actions(schedule.steps[rank]).items():
            for name, seconds in self._seconds[kind, stage].items():
                parts[name] = parts.get(name, 0.0) + count * seconds
        needed = sum(parts.values())
        parts["exposed all-to-all"] = timeline.makespan - timeline.idle(rank) - needed
        parts["waiting"] = timeline.idle(rank)
        return parts, sum(timeline.bubbles) / schedule.num_ranks

    @property
    def _kinds(self) -> tuple[str, ...]:
        return (*self.hardware.flops, "memory", "context")

    @cached_property
    def _work(self) -> StageWork:
        return StageWork(sizes=self.sizes, fp8=self.fp8, fp8_experts="grouped fp8" in self.hardware.flops)

    @cached_property
    def _stages(self) -> tuple[Passes, ...]:
        parallel, work = self.sizes.parallel, self._work
        layers = split_layers(self._model, num_stages(parallel.schedule, parallel.pp))
        return tuple(work.stage(inside, is_last=stage == len(layers) - 1) for stage, inside in enumerate(layers))

    @cached_property
    def _seconds(self) -> dict[tuple[Kind, int], Seconds]:
        """Of each pass by what it does, ways to experts left out."""
        return {
            (kind, stage): self._durations(work)
            for stage, passes in enumerate(self._stages)
            for kind, work in _by_kind(passes).items()
        }

    def _durations(self, work: Work) -> Seconds:
        seconds = {name: flops / self.hardware.flops[name] for name, flops in work.flops.items() if flops}
        seconds["memory"] = work.moved / self.hardware.memory_rate
        seconds["context"] = self._sending(work, ("context",))
        return seconds

    def _sending(self, work: Work, purposes: tuple[str, ...]) -> float:
        """Seconds in which a pass sends for some purposes."""
        times = [
            sum(size / rate for (purpose, over), size in work.sent.items() if over == link and purpose in purposes)
            for link, rate in self.hardware.links.items()
        ]
        return max(times) if self.hardware.forwards else sum(times)

    @cached_property
    def _costs(self) -> _StageCosts:
        ways = {
            (kind, stage): self._sending(work, ("dispatch", "combine"))
            for stage, passes in enumerate(self._stages)
            for kind, work in _by_kind(passes).items()
        }
        busy = {key: sum(seconds.values()) for key, seconds in self._seconds.items()}
        send = self._state_bytes / self.hardware.links[self._pipeline_link]
        return _StageCosts(busy, ways, self.hardware.efficiency.overlapped, send)

    @property
    def _state_bytes(self) -> float:
        """Of what one stage gives to the next."""
        return float(self.sizes.tokens * self.sizes.num_bytes * self._model.hidden_size)

    @property
    def _pipeline_link(self) -> str:
        return "node" if self.world_size <= self.hardware.gpus_per_node else "network"

    @property
    def _turns(self) -> bool:
        """Whether two stages that follow one another are on one rank."""
        return self.sizes.parallel.schedule in FOLDED

    @property
    def _data_ranks(self) -> int:
        return self.sizes.parallel.mesh_shape(self.world_size).dp

    @cached_property
    def _parameters(self) -> ParameterSizes:
        """Of the rank that has most."""
        return max(self._all_parameters, key=lambda sizes: sizes.all)

    @cached_property
    def _all_parameters(self) -> tuple[ParameterSizes, ...]:
        parallel = self.sizes.parallel
        shape = parallel.mesh_shape(self.world_size)
        schedule = _schedule(parallel.schedule, parallel.pp, 2 * parallel.pp)
        places = (part_of_rank(self._model, shape, schedule, place * shape.batch_ranks) for place in range(parallel.pp))
        return tuple(parameter_sizes(self._model, part) for part in places)

    @cached_property
    def _groups(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How many ranks, and how many of them on a node, share what is not experts', and what is."""
        replicas = self.sizes.parallel.mesh_shape(self.world_size).replicas()[0]
        groups = replicas, replicas[:: self.sizes.parallel.ep]
        size = self.hardware.gpus_per_node
        (dense, dense_here), (experts, experts_here) = (
            (len(ranks), max(Counter(rank // size for rank in ranks).values())) for ranks in groups
        )
        return (dense, dense_here), (experts, experts_here)

    def _ring(self, bytes_of: tuple[float, float]) -> dict[str, float]:
        """Bytes a rank sends by link when so many, of all but experts and of experts, go once round the ranks that
        share them: a ring in which every rank of a node has a part of what leaves it."""
        links = {"node": 0.0, "network": 0.0}
        for size, (members, here) in zip(bytes_of, self._groups, strict=True):
            nodes = -(-members // here)
            links["node"] += size * (here - 1) / here
            links["network"] += size * (nodes - 1) / nodes / here
        return links

    def _collectives(self, num_micro_batches: int) -> dict[str, dict[str, float]]:
        """Bytes a rank sends for gradients and weights, by link."""
        sizes, stage = self._parameters, self.sizes.parallel.zero_stage
        counts = (float(sizes.matrices + sizes.vectors), float(sizes.experts))
        if not sizes.experts and self.sizes.parallel.ep == 1:
            counts = (float(sizes.all), 0.0)

        def around(width: float, times: float) -> dict[str, float]:
            return {link: times * size for link, size in self._ring((width * counts[0], width * counts[1])).items()}

        width = self.sizes.num_bytes
        if stage <= 1:
            reduction, gather = around(_FP32, 2), around(width, 1 if stage else 0)
        else:
            reduction = around(width, num_micro_batches)
            gather = around(width, 1 if stage == 2 else 2 * num_micro_batches)
        return {"gradient reduction": reduction, "weight gather": gather}

    @cached_property
    def _end(self) -> Seconds:
        """Of what follows the passes."""
        links = self.hardware.links
        times = {
            purpose: max(size / links[link] for link, size in sent.items())
            for purpose, sent in self._collectives(1).items()
        }
        return {
            "gradient reduction": times["gradient reduction"],
            "optimizer": self._optimizer_bytes / self.hardware.optimizer_rate,
            "weight gather": times["weight gather"],
        }

    @property
    def _optimizer_bytes(self) -> float:
        """AdamW reads the gradient, reads and writes master and moments, and writes the weight; before, the norm reads
        the gradients."""
        sizes, moments = self._parameters, _FP32 if self.optimizer.moments == "fp32" else _BF16
        dense, experts = (members for members, _ in self._groups)
        share = (sizes.all - sizes.experts) / dense + sizes.experts / experts
        if self.sizes.parallel.zero_stage == 0:
            share = float(sizes.all)
        return share * (2 * _FP32 + 2 * _FP32 + 4 * moments + self.sizes.num_bytes)


@cache
def _schedule(name: ScheduleName, num_ranks: int, num_micro_batches: int) -> Schedule:
    return make_schedule(name, num_ranks=num_ranks, num_micro_batches=num_micro_batches)


def _by_kind(passes: Passes) -> dict[Kind, Work]:
    return {
        Kind.FORWARD: passes.forward,
        Kind.BACKWARD: passes.input_grad + passes.weight_grad,
        Kind.INPUT_GRAD: passes.input_grad,
        Kind.WEIGHT_GRAD: passes.weight_grad,
    }


def _count_actions(steps: tuple[Step, ...]) -> Counter[tuple[Kind, int]]:
    actions: list[Action] = [action for step in steps for action in actions_of(step)]
    return Counter((action.kind, action.stage) for action in actions)
