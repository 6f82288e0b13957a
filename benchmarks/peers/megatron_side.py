"""Megatron-Core's side of step_speed.py, on Transformer Engine, on one GPU."""

import os
from importlib.metadata import version
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from timing import (
    BETAS,
    BIAS_UPDATE_SPEED,
    CLIP,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Request,
    count,
    device,
    inputs_and_labels,
    run,
)
from torch import Tensor
from torch import distributed as dist

from data.loader import Batch
from model.config import ModelConfig
from pretrain.config import Config


class Attention(MLASelfAttention):
    """Without the norm of queries, which is tied to that of latent keys and values even if there is no q_lora_rank."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        resolved: dict[str, Any] = super()._resolve_qk_norm_config(submodules)
        return resolved | {"linear_q_proj": submodules.linear_q_proj}


class MegatronSide:
    """Settings: `fp8`, whether linear layers and experts run in its blockwise FP8; `distributed_optimizer`, whether
    the optimizer is the distributed one, whose Adam reads bf16 gradients and keeps masters as remainders of bf16."""

    def __init__(self, config: Config, request: Request) -> None:
        on_gpu = device().type == "cuda"
        fp8, distributed = request.settings["fp8"], request.settings["distributed_optimizer"]
        dist.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1, store=dist.HashStore())
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        if on_gpu:
            model_parallel_cuda_manual_seed(0)
            _tune_fewer(config.model.num_attention_heads)
        megatron = _translate(config.model, fp8=fp8, on_gpu=on_gpu)
        spec = get_gpt_decoder_block_spec(megatron, use_transformer_engine=on_gpu)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.module = Attention
        model = GPTModel(
            megatron,
            spec,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.train.seq_len,
            position_embedding_type="rope",
        )
        model = model.to(device()).bfloat16()
        self.num_parameters = count(model.parameters())
        for layer in model.decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router._maintain_float32_expert_bias()
        self._megatron = megatron
        data_parallel = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        self._model = DistributedDataParallel(megatron, data_parallel, model).train()
        self._optimizer = get_megatron_optimizer(
            _optimizer_config(distributed), [self._model], use_gloo_process_groups=False
        )
        self.versions = {"megatron-core": version("megatron-core"), "transformer-engine": _te_version()}
        self.notes = (
            f"grouped GEMM, permute, router, RoPE, SwiGLU and cross-entropy fused, TE attention on cuDNN, "
            f"{'FP8 blockwise (E4M3)' if fp8 else 'bf16'}, bf16 gradients, fp32 masters and moments in TE's FusedAdam"
            f"{' under the distributed optimizer' if distributed else ''}, bias balancing"
        )

    def step(self, batch: Batch) -> float | Tensor:
        """One step."""
        inputs, labels = inputs_and_labels(batch)
        positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss: Tensor = self._model(inputs, positions, None, labels=labels).float().mean()
        loss.backward()
        finalize_model_grads([self._model])
        self._optimizer.step()
        return loss.detach()


def _translate(model: ModelConfig, *, fp8: bool, on_gpu: bool) -> MLATransformerConfig:
    num_moe = model.num_hidden_layers - model.first_k_dense_replace
    fused: dict[str, Any] = {}
    if on_gpu:
        fused = {
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            "moe_router_fusion": True,
            # Fused RoPE wants YaRN, which at a factor of 1 is plain RoPE.
            "rope_type": "yarn",
            "apply_rope_fusion": True,
            "bias_activation_fusion": True,
            "cross_entropy_loss_fusion": True,
        }
    if fp8:
        fused |= {"fp8": "e4m3", "fp8_recipe": "blockwise", "moe_router_padding_for_quantization": True}
    return MLATransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.intermediate_size,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        rotary_base=model.rope_theta,
        rotary_scaling_factor=1.0,
        num_moe_experts=model.n_routed_experts,
        moe_ffn_hidden_size=model.moe_intermediate_size,
        moe_shared_expert_intermediate_size=model.n_shared_experts * model.moe_intermediate_size,
        moe_layer_freq=[0] * model.first_k_dense_replace + [1] * num_moe,
        moe_router_topk=model.num_experts_per_tok,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_router_score_function="sigmoid",
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=BIAS_UPDATE_SPEED,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.initializer_range,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=not on_gpu,
        **({"rope_type": "rope"} | fused),
    )


def _tune_fewer(num_heads: int) -> None:
    """Its RoPE kernels are compiled and tried with 1 to 128 heads a program; more than there are win nothing."""
    from megatron.core.fusions import fused_mla_yarn_rope_apply
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(fused_mla_yarn_rope_apply).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = [config for config in kernel.configs if config.kwargs["BLOCK_H"] <= num_heads]


def _optimizer_config(distributed: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=distributed,
        use_precision_aware_optimizer=distributed,
        **({"main_grads_dtype": torch.bfloat16} if distributed else {}),
    )


def _te_version() -> str:
    try:
        import transformer_engine
    except ImportError:
        return "none"
    return str(transformer_engine.__version__)


if __name__ == "__main__":
    os.environ.setdefault("NVTE_FUSED_ATTN", "1")
    run(MegatronSide)
