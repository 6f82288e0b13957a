"""The `[parallel]` table: how the ranks of a run are used."""

from dataclasses import dataclass
from typing import Literal

from parallel.mesh import MeshShape
from parallel.schedule import ScheduleName


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """`pp` ranks divide the layers, `ep` the experts, `cp` the positions of a sequence; data parallelism takes what is
    left of the world size. `schedule` orders the pipeline's work, `zero_stage` says what of optimizer, gradients and
    weights is divided over data ranks, `optimizer_offload` keeps masters and moments in the CPU's memory. No more than
    `max_expert_rows` rows (0: any number) reach a rank's experts at once; `fp8_dispatch` sends them in FP8;
    `copy_engines` take them to the GPUs of a node in NCCL's place, if these reach one another. `fp8_swiglu` keeps the
    inputs of SwiGLU in FP8 until the backward pass. What `recompute` lists is computed again there instead of kept:
    "norms", the up-projections of attention ("mla_up"), the activations of MLPs and experts ("swiglu"), the copies of
    tokens that experts get ("expert_rows"), or whole layers ("block"). Routed experts in bf16 on a GPU keep none of the
    two in any case."""

    pp: int = 1
    ep: int = 1
    cp: int = 1
    schedule: ScheduleName = "1f1b"
    zero_stage: Literal[0, 1, 2, 3] = 1
    optimizer_offload: bool = False
    max_expert_rows: int = 0
    fp8_dispatch: bool = False
    copy_engines: bool = True
    fp8_swiglu: bool = False
    recompute: tuple[Literal["norms", "mla_up", "swiglu", "expert_rows", "block"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("pp", "ep", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.max_expert_rows < 0:
            raise ValueError(f"max_expert_rows = {self.max_expert_rows} must not be negative; 0 sets no bound")
        if 0 < self.max_expert_rows <= self.ep:
            raise ValueError(
                f"max_expert_rows = {self.max_expert_rows} must be above ep = {self.ep}, as each of these ranks may "
                "send a row in a round; raise it, or set it to 0 for no bound"
            )
        for name in ("max_expert_rows", "fp8_dispatch"):
            if getattr(self, name) and self.ep == 1:
                value = str(getattr(self, name)).lower()
                raise ValueError(f"{name} = {value} has no effect with ep = 1, where no row is sent; remove it")
        if self.max_expert_rows and self.ep % self.cp and self.schedule in ("dualpipe", "dualpipev"):
            raise ValueError(
                f'max_expert_rows = {self.max_expert_rows} with schedule = "{self.schedule}" needs ep = {self.ep} '
                f"to be a multiple of cp = {self.cp}, so that all ranks of a context group take as many rounds; set "
                "it to 0, or change one of the others"
            )
        if self.zero_stage == 3 and self.max_expert_rows:
            raise ValueError(
                f"max_expert_rows = {self.max_expert_rows} needs zero_stage below 3: expert groups may take different "
                "numbers of rounds, but would gather the experts' weights in each; set it to 0, or lower zero_stage"
            )
        if self.zero_stage == 0 and self.optimizer_offload:
            raise ValueError("optimizer_offload = true needs zero_stage = 1, 2 or 3, not 0: DeepSpeed does it")
        if self.zero_stage > 1 and self.pp > 1:
            raise ValueError(
                f"zero_stage = {self.zero_stage} needs pp = 1, not {self.pp}: with a pipeline, gradients and weights "
                "are needed whole until the step ends; use zero_stage = 1"
            )

    def mesh_shape(self, world_size: int, *, node_size: int = 0) -> MeshShape:
        """The mesh of so many ranks. Raises ValueError where they do not divide."""
        return MeshShape(
            world_size=world_size,
            pp=self.pp,
            ep=self.ep,
            cp=self.cp,
            bidirectional=self.schedule == "dualpipe",
            node_size=node_size,
        )
