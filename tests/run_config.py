"""A small configuration to make mistakes in."""

RUN = """
[run]
name = "example"

[model]
vocab_size = 96
hidden_size = 32
num_hidden_layers = 3
num_attention_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
intermediate_size = 48
moe_intermediate_size = 16
n_routed_experts = 8
num_experts_per_tok = 2
n_group = 4
topk_group = 2

[data]
datasets = [{ path = "somewhere" }]

[train]
seq_len = 64
micro_batch_size = 2
batch_size = 8
steps = 100

[timeline]
learning_rate = 1e-3
"""
