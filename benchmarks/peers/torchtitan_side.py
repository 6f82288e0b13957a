"""torchtitan's side of step_speed.py: its DeepSeek-V3 model without its trainer and without FSDP, on one GPU."""

from importlib.metadata import version

import older_torch  # noqa: F401
import torch
import torchtitan.models.common.token_dispatcher as dispatchers
from timing import BIAS_UPDATE_SPEED, MasterAdamW, Request, count, device, inputs_and_labels, run
from torch import Tensor
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models import deepseek_v3
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention

from data.loader import Batch
from model.config import ModelConfig
from pretrain.config import Config


class TorchtitanSide:
    """Settings: `compiled`, whether blocks, each whole, and the loss go through torch.compile."""

    def __init__(self, config: Config, request: Request) -> None:
        # Its own scatter is deterministic, which torch does by sorting one index for each number.
        dispatchers.deterministic_scatter_add = _scatter_add
        torch.manual_seed(0)
        with torch.device("meta"):
            model = _translate(config.model, config.train.seq_len).build()
        model.to_empty(device=device())
        with torch.no_grad():
            model.init_states(buffer_device=device())
        self._model = model.train()
        self._layers = [layer.moe for layer in model.layers.values() if layer.moe_enabled]
        self._optimizer = MasterAdamW(model)
        self._loss = cross_entropy_loss
        if request.settings["compiled"]:
            torch._dynamo.config.capture_scalar_outputs = True
            torch._dynamo.config.automatic_dynamic_shapes = False
            for layer in model.layers.values():
                layer.compile(fullgraph=True)
            self._loss = torch.compile(cross_entropy_loss)
        self.num_parameters = count(model.parameters())
        self.versions = {"torchtitan": version("torchtitan")}
        self.notes = (
            f"{'compiled blocks and loss' if request.settings['compiled'] else 'eager'}, torch._grouped_mm, atomic "
            "instead of deterministic scatter, SDPA on cuDNN, bf16 weights and gradients, fp32 masters and moments in "
            "torch's fused AdamW, no FSDP, no recomputation, bias balancing"
        )

    def step(self, batch: Batch) -> float | Tensor:
        """One step, with the update of the experts' bias."""
        inputs, labels = inputs_and_labels(batch)
        loss: Tensor = self._loss(self._model(inputs), labels) / labels.numel()
        loss.backward()
        self._optimizer.step()
        self._update_bias()
        return loss.detach()

    @torch.no_grad()
    def _update_bias(self) -> None:
        """As the hook of torchtitan's optimizers does on one rank."""
        load = torch.stack([layer.tokens_per_expert_E for layer in self._layers])
        change = BIAS_UPDATE_SPEED * torch.sign(load.mean(-1, keepdim=True) - load)
        change -= change.mean(-1, keepdim=True)
        for layer, change_of_layer in zip(self._layers, change, strict=True):
            layer.expert_bias_E.add_(change_of_layer)
            layer.tokens_per_expert_E.zero_()


def _scatter_add(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    return out.scatter_add(0, index, src)


def _translate(model: ModelConfig, seq_len: int) -> deepseek_v3.DeepSeekV3Model.Config:
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank or 0,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=model.intermediate_size,
        moe_hidden_dim=model.moe_intermediate_size,
        num_experts=model.n_routed_experts,
        num_shared_experts=model.n_shared_experts,
        router_top_k=model.num_experts_per_tok,
        router_score_func=model.scoring_func,
        router_route_scale=model.routed_scaling_factor,
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=model.qk_rope_head_dim, max_seq_len=seq_len, theta=model.rope_theta),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        if layer.moe is not None:
            layer.moe.routed_experts.token_dispatcher = dispatchers.LocalTokenDispatcher.Config(
                num_experts=model.n_routed_experts, top_k=model.num_experts_per_tok
            )
    return deepseek_v3.DeepSeekV3Model.Config(
        vocab_size=model.vocab_size,
        dim=model.hidden_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=model.vocab_size,
            embedding_dim=model.hidden_size,
            param_init=deepseek_v3._EMBEDDING_INIT,
        ),
        norm=RMSNorm.Config(normalized_shape=model.hidden_size, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=model.hidden_size,
            out_features=model.vocab_size,
            param_init=deepseek_v3._output_linear_init(model.hidden_size),
        ),
        layers=layers,
    )


if __name__ == "__main__":
    run(TorchtitanSide)
