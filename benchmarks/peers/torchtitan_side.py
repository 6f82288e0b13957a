"""torchtitan's side of step_speed.py: its DeepSeek-V3 model without its trainer and without FSDP, on one GPU."""

from importlib.metadata import version

import torch
from timing import BIAS_UPDATE_SPEED, MasterAdamW, Request, count, device, inputs_and_labels, run
from torch import Tensor
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs

from data.loader import Batch
from model.config import ModelConfig
from pretrain.config import Config


class TorchtitanSide:
    """Blocks are compiled whole: what torchtitan leaves out of compilation, it does for the sake of FSDP's hooks."""

    def __init__(self, config: Config, request: Request) -> None:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = DeepSeekV3Model(_translate(config.model, config.train.seq_len))
        model.to_empty(device=device())
        with torch.no_grad():
            model.init_weights(buffer_device=device())
        self._model = model.train()
        self._layers = [layer.moe for layer in model.layers.values() if layer.moe_enabled]
        self._optimizer = MasterAdamW(model)
        self._loss = cross_entropy_loss
        if device().type == "cuda":
            torch._dynamo.config.capture_scalar_outputs = True
            torch._dynamo.config.automatic_dynamic_shapes = False
            for layer in model.layers.values():
                layer.compile(fullgraph=True)
            self._loss = torch.compile(cross_entropy_loss)
        self.num_parameters = count(model.parameters())
        self.versions = {"torchtitan": version("torchtitan")}
        self.notes = (
            "compiled blocks and loss, torch._grouped_mm, SDPA on cuDNN, bf16 weights and gradients, fp32 masters and "
            "moments in torch's fused AdamW, no FSDP, no recomputation, bias balancing"
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
        load = torch.stack([layer.tokens_per_expert for layer in self._layers])
        change = BIAS_UPDATE_SPEED * torch.sign(load.mean(-1, keepdim=True) - load)
        change -= change.mean(-1, keepdim=True)
        for layer, change_of_layer in zip(self._layers, change, strict=True):
            layer.expert_bias.add_(change_of_layer)
            layer.tokens_per_expert.zero_()


def _translate(model: ModelConfig, seq_len: int) -> DeepSeekV3ModelArgs:
    args = DeepSeekV3ModelArgs(
        max_seq_len=seq_len,
        original_seq_len=seq_len,
        vocab_size=model.vocab_size,
        dim=model.hidden_size,
        inter_dim=model.intermediate_size,
        moe_inter_dim=model.moe_intermediate_size,
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        n_heads=model.num_attention_heads,
        norm_eps=model.rms_norm_eps,
        moe_args=MoEArgs(
            num_experts=model.n_routed_experts,
            num_shared_experts=model.n_shared_experts,
            top_k=model.num_experts_per_tok,
            score_func=model.scoring_func,
            route_norm=True,
            route_scale=model.routed_scaling_factor,
            score_before_experts=False,
            use_grouped_mm=device().type == "cuda",
            load_balance_coeff=BIAS_UPDATE_SPEED,
        ),
        q_lora_rank=model.q_lora_rank or 0,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        attn_type="sdpa",
        rope_theta=model.rope_theta,
    )
    args.moe_impl = "standard"
    return args


if __name__ == "__main__":
    run(TorchtitanSide)
