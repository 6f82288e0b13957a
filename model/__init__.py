"""The network as plain single-process torch: no ranks, process groups, environment or DeepSpeed.

Shapes are written with these letters throughout:

    B sequences   S positions   T = B·S tokens   D hidden_size   H num_attention_heads
    C kv_lora_rank   P qk_rope_head_dim   E routed experts   K num_experts_per_tok   I intermediate size
"""
