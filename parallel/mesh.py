"""Who works with whom: the ranks of a run laid out over pipeline, data, context and expert axes.

    rank = pp_rank · batch_ranks + batch_rank          batch_ranks = dp · cp
    batch_rank = dp_rank · cp + cp_rank                ep_rank = batch_rank mod ep

Every pipeline rank computes its layers on `batch_ranks` ranks, which see different sequences (dp) or different parts of
the same ones (cp). Experts are spread over `ep` neighbours among them, so an expert group lies on one node if it can.

`MeshShape` is arithmetic on numbers and checks what must divide; `Mesh` holds the process groups of one rank. In
bidirectional DualPipe ranks r and pp − 1 − r hold the same stages; they are replicas of each other in every respect, so
whoever sums gradients over `replicas` sums that pair too.
"""

from dataclasses import dataclass

from torch import distributed as dist

from parallel.launch import COLLECTIVE_TIMEOUT

Partition = list[tuple[int, ...]]
_KEYS = {"world_size": "world size", "pp": "parallel.pp", "ep": "parallel.ep", "cp": "parallel.cp"}


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Sizes of the axes. `node_size` is how many ranks share a node (0: all of them). Raises ValueError where they do
    not divide."""

    world_size: int
    pp: int = 1
    ep: int = 1
    cp: int = 1
    bidirectional: bool = False
    node_size: int = 0

    def __post_init__(self) -> None:
        for name in ("world_size", "pp", "ep", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_KEYS[name]} = {getattr(self, name)} must be at least 1")
        if self.world_size % (self.pp * self.cp):
            raise ValueError(
                f"{self.world_size} ranks cannot be divided into parallel.pp × parallel.cp = {self.pp} × {self.cp} = "
                f"{self.pp * self.cp}; use a multiple of it, or lower one of them"
            )
        if self.batch_ranks % self.ep:
            raise ValueError(
                f"parallel.ep = {self.ep} must divide the dp × cp = {self.dp} × {self.cp} = {self.batch_ranks} ranks "
                f"that {self.world_size} ranks with parallel.pp = {self.pp} have for each part of the layers; use "
                f"{_nearest_divisors(self.batch_ranks, self.ep)}"
            )
        if self.bidirectional and self.pp % 2:
            raise ValueError(
                f'parallel.pp = {self.pp} must be even for parallel.schedule = "dualpipe", where ranks hold the stages '
                'in pairs; change it, or use "dualpipev"'
            )

    @property
    def batch_ranks(self) -> int:
        """Ranks that share one part of the layers and divide the tokens."""
        return self.world_size // self.pp

    @property
    def dp(self) -> int:
        """Ranks that see different sequences."""
        return self.batch_ranks // self.cp

    def pp_rank(self, rank: int) -> int:
        """Place along the pipeline."""
        return rank // self.batch_ranks

    def dp_rank(self, rank: int) -> int:
        """Which share of the sequences a rank sees."""
        return rank % self.batch_ranks // self.cp

    def cp_rank(self, rank: int) -> int:
        """Which part of its sequences a rank sees."""
        return rank % self.cp

    def ep_rank(self, rank: int) -> int:
        """Which part of the experts a rank holds."""
        return rank % self.batch_ranks % self.ep

    def pipelines(self) -> Partition:
        """Ranks that pass micro-batches on, in the order of the pipeline."""
        return [tuple(range(first, self.world_size, self.batch_ranks)) for first in range(self.batch_ranks)]

    def contexts(self) -> Partition:
        """Ranks that share sequences, in the order of positions."""
        return _runs(tuple(range(self.world_size)), self.cp)

    def experts(self) -> Partition:
        """Ranks that together hold all experts of their layers, in the order of experts."""
        return _runs(tuple(range(self.world_size)), self.ep)

    def replicas(self) -> Partition:
        """Ranks with the same layers: they hold equal copies of everything but experts."""
        stages = _runs(tuple(range(self.world_size)), self.batch_ranks)
        if not self.bidirectional:
            return stages
        return [one + other for one, other in zip(stages[: self.pp // 2], reversed(stages), strict=False)]

    def expert_replicas(self) -> Partition:
        """Ranks with the same experts."""
        return [ranks[first :: self.ep] for ranks in self.replicas() for first in range(self.ep)]

    def models(self) -> Partition:
        """Ranks that hold the whole model together, each part of it once."""
        if not self.bidirectional:
            return self.pipelines()
        half = self.pp // 2
        return [ranks[:half] for ranks in self.pipelines()] + [ranks[half:] for ranks in self.pipelines()]

    def ends(self) -> Partition:
        """First and last rank of each pipeline; the ranks between are alone."""
        if self.pp == 1:
            return [(rank,) for rank in range(self.world_size)]
        outer = [(ranks[0], ranks[-1]) for ranks in self.pipelines()]
        return outer + [(rank,) for ranks in self.pipelines() for rank in ranks[1:-1]]

    def expert_nodes(self) -> Partition:
        """The parts of expert groups that lie on one node."""
        return [part for ranks in self.experts() for part in _runs(ranks, self._expert_ranks_per_node)]

    def expert_node_peers(self) -> Partition:
        """Ranks with the same place on the nodes of an expert group, one a node."""
        size = self._expert_ranks_per_node
        return [ranks[place::size] for ranks in self.experts() for place in range(size)]

    @property
    def _expert_ranks_per_node(self) -> int:
        """Expert ranks on one node; all of them where groups and nodes do not fall together."""
        divides = self.node_size and self.ep % self.node_size == 0
        return self.node_size if divides else self.ep


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The process groups of `rank`, each named after the partition of `MeshShape` that it is a part of. Pipelines have
    two, one for each direction of sending, because a backend sends in order within a group."""

    shape: MeshShape
    rank: int
    pipeline: dist.ProcessGroup
    pipeline_back: dist.ProcessGroup
    context: dist.ProcessGroup
    expert: dist.ProcessGroup
    replicas: dist.ProcessGroup
    expert_replicas: dist.ProcessGroup
    model: dist.ProcessGroup
    ends: dist.ProcessGroup
    expert_node: dist.ProcessGroup
    expert_node_peers: dist.ProcessGroup


def make_mesh(shape: MeshShape) -> Mesh:
    """Forms all groups. Every process must call it, with the same shape, after processes have been joined."""
    partitions = {
        "pipeline": shape.pipelines(),
        "pipeline_back": shape.pipelines(),
        "context": shape.contexts(),
        "expert": shape.experts(),
        "replicas": shape.replicas(),
        "expert_replicas": shape.expert_replicas(),
        "model": shape.models(),
        "ends": shape.ends(),
        "expert_node": shape.expert_nodes(),
        "expert_node_peers": shape.expert_node_peers(),
    }
    groups = {}
    for name, partition in partitions.items():
        groups[name], _ = dist.new_subgroups_by_enumeration(
            [list(ranks) for ranks in partition], timeout=COLLECTIVE_TIMEOUT
        )
    return Mesh(shape=shape, rank=dist.get_rank(), **groups)


def _runs(ranks: tuple[int, ...], size: int) -> Partition:
    """Neighbours, `size` at a time."""
    return [ranks[first : first + size] for first in range(0, len(ranks), size)]


def _nearest_divisors(number: int, wanted: int) -> str:
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    below = [size for size in divisors if size < wanted][-1:]
    above = [size for size in divisors if size > wanted][:1]
    return " or ".join(map(str, below + above))
