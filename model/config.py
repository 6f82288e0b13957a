"""The architecture, in the names of DeepSeek-V3's published config.json: the `[model]` table of a configuration."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) on the decoupled rotary part, for the long-context stages only.

    `factor` is s, the ratio of the new length to `original_max_position_embeddings`; `beta_slow` and `beta_fast` are
    α and β, the numbers of rotations between which frequencies go from interpolated to kept. The softmax scale is
    multiplied by (0.1 · mscale_all_dim · ln s + 1)².
    """

    factor: float
    original_max_position_embeddings: int
    type: Literal["yarn"] = "yarn"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor = {self.factor} must be at least 1; the report uses 40")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings = {self.original_max_position_embeddings} must be the "
                "sequence length before extension; the report uses 4096"
            )
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"rope_scaling.beta_slow = {self.beta_slow} must be above 0 and below "
                f"rope_scaling.beta_fast = {self.beta_fast}; the report uses 1 and 32"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of a DeepSeek-V3-style model. Raises ValueError where two of them do not fit together.

    The first `first_k_dense_replace` layers have a dense MLP of `intermediate_size`; the others have `n_routed_experts`
    experts of `moe_intermediate_size`, of which each token takes `num_experts_per_tok` out of its `topk_group` best of
    `n_group` groups, and `n_shared_experts` that every token takes. `num_nextn_predict_layers` is the depth of
    multi-token prediction. `aux_loss_alpha` weighs the sequence-wise balance loss.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    first_k_dense_replace: int = 0
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    initializer_range: float = 0.006
    aux_loss_alpha: float = 1e-4

    def __post_init__(self) -> None:
        self._check_ranges()
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: rotary dimensions come in pairs"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {self.first_k_dense_replace} must not exceed "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts = {self.n_routed_experts} must be a multiple of n_group = {self.n_group}"
            )
        if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_group = {self.n_group} leaves fewer than 2 of {self.n_routed_experts} experts to a group, "
                "but a group is scored by its two best; lower n_group"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} must not exceed n_group = {self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} must not exceed the {reachable} experts of "
                f"topk_group = {self.topk_group} groups; raise topk_group or lower num_experts_per_tok"
            )

    def _check_ranges(self) -> None:
        may_be_zero = {"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers", "aux_loss_alpha"}
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not (0 < value < math.inf or (value == 0 and name in may_be_zero)):
                rule = "0 or more" if name in may_be_zero else "above 0"
                raise ValueError(f"{name} = {value} must be {rule} and finite")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta = {self.rope_theta} must be above 1; the report uses 10000")

    @property
    def qk_head_dim(self) -> int:
        """Size of a query or key head: the part without position and the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_layers(self) -> int:
        """All blocks: the main ones, then one for each depth of multi-token prediction."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts, those of multi-token prediction included."""
        return tuple(range(self.first_k_dense_replace, self.num_layers))
