"""transformers' side of step_speed.py: DeepseekV3ForCausalLM, eager or with compiled layers."""

import torch
import transformers
from timing import MasterAdamW, Request, count, device, inputs_and_labels, run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from data.loader import Batch
from model.config import ModelConfig
from pretrain.config import Config

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TransformersSide:
    """Settings: `compiled`, whether each decoder layer goes through torch.compile."""

    def __init__(self, config: Config, request: Request) -> None:
        compiled = request.settings["compiled"]
        torch.manual_seed(0)
        with torch.device(device()):
            model = DeepseekV3ForCausalLM(_translate(config.model, config.train.seq_len))
        self._model = model.train()
        self._optimizer = MasterAdamW(model)
        if compiled:
            torch._dynamo.config.automatic_dynamic_shapes = False
            for layer in model.model.layers:
                layer.compile()
        self.num_parameters = count(model.parameters())
        self.versions = {"transformers": transformers.__version__}
        self.notes = (
            f"{'compiled layers' if compiled else 'eager'}, grouped_mm experts, SDPA with cuDNN first, bf16 weights "
            "and gradients, fp32 masters and moments in torch's fused AdamW, no balancing"
        )

    def step(self, batch: Batch) -> float | Tensor:
        """One step."""
        inputs, labels = inputs_and_labels(batch)
        with sdpa_kernel(BACKENDS, set_priority=True):
            loss: Tensor = self._model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def _translate(model: ModelConfig, seq_len: int) -> DeepseekV3Config:
    config = DeepseekV3Config(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_attention_heads,
        n_shared_experts=model.n_shared_experts,
        n_routed_experts=model.n_routed_experts,
        routed_scaling_factor=model.routed_scaling_factor,
        kv_lora_rank=model.kv_lora_rank,
        q_lora_rank=model.q_lora_rank,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_nope_head_dim=model.qk_nope_head_dim,
        n_group=model.n_group,
        topk_group=model.topk_group,
        num_experts_per_tok=model.num_experts_per_tok,
        first_k_dense_replace=model.first_k_dense_replace,
        max_position_embeddings=seq_len,
        initializer_range=model.initializer_range,
        rms_norm_eps=model.rms_norm_eps,
    )
    config._attn_implementation = "sdpa"
    config._experts_implementation = "grouped_mm"
    return config


if __name__ == "__main__":
    run(TransformersSide)
