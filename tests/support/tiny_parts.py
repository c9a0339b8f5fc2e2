"""What tiny configurations share: sizes, layer patterns, experts, latent attention, scales."""

from __future__ import annotations

from typing import Any

VOCAB = 384

Row = dict[str, Any]

# What every family shares; each row adds or overrides, and None takes a field away.
BASE: Row = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MHA: Row = {"num_key_value_heads": None}  # no grouped queries in these configurations
EVERY_HEAD: Row = {"num_key_value_heads": 4}
FOUR: Row = {"num_hidden_layers": 4}
SLIDING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2
FULL = ["full_attention"] * 3
ONE_DENSE = ["dense", "sparse", "sparse"]
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

# Mixtures of experts: four of them, two per token, under the three names in use.
EXPERTS: Row = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS: Row = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED: Row = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}
# Latent attention: queries and keys are wider than values.
LATENT: Row = {
    **EVERY_HEAD,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 8,
}
DELTA: Row = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2: Row = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
GRANITE: Row = {
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.3,
}


def row(model_type: str, *shared: Row, **fields: Any) -> Row:
    """Return the fields of one configuration; later ones win."""
    made: Row = {"model_type": model_type}
    for part in shared:
        made |= part
    return made | fields
