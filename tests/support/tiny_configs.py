"""Tiny configurations of causal language models, one row per class or layout; data only.

What makes a family special is switched on and small enough to act in a nine-token prompt: windows,
caps, norms of queries and keys, biases, sinks, multipliers, partial rotary embeddings, shared keys.
"""

from __future__ import annotations

from support.tiny_dense import DENSE
from support.tiny_parts import FOUR, GRANITE, MHA, SLIDING, Row, row
from support.tiny_sparse import SPARSE

EVERYTHING: dict[str, Row] = {**DENSE, **SPARSE}

# Configurations of the lists of dense and sparse models that have rows of their own.
LISTED = (
    *("ministral", "ministral3", "mixtral", "smollm3", "starcoder2", "nemotron", "glm"),
    *("qwen2_moe", "qwen3_moe", "olmo", "olmo3", "olmoe", "gpt_oss", "phimoe", "persimmon"),
    *("glm4", "exaone4", "cohere2", "stablelm_parallel", "nanochat", "minicpm3", "hyperclovax"),
    *("gpt_neo", "gpt_bigcode", "gpt_bigcode_heads", "codegen", "opt", "bloom", "biogpt", "xglm"),
    *("falcon", "falcon_grouped", "falcon_alibi", "mpt", "dbrx", "ctrl", "afmoe"),
    *("granitemoe", "granitemoeshared", "bitnet"),
)
# Configurations that are found from the structure of the model: sequential, parallel, post-norm.
FOUND = ("helium", "apertus", "cohere2_moe", "flex_olmo", "vaultgemma", "deepseek_v3")

# Listed, too, but recurrent or cut into chunks: nothing to continue from, and padding that counts.
HYBRID = (
    *("llama4", "granitemoehybrid", "granitemoehybrid_attention", "qwen3_next", "qwen3_5", "lfm2"),
    *("lfm2_moe", "jamba", "bamba", "recurrent_gemma"),
)

# Families that the table describes.
FAMILIES: dict[str, Row] = {
    "llama": row("llama"),
    "llama_biased": row("llama", attention_bias=True, mlp_bias=True),
    "llama_tied": row("llama", tie_word_embeddings=True),
    "mistral": row("mistral", sliding_window=4, head_dim=8),
    "qwen2": row("qwen2"),
    "qwen3": row("qwen3", head_dim=16, tie_word_embeddings=True),
    "gemma": row("gemma", head_dim=8, tie_word_embeddings=True),
    "gemma2": row(
        "gemma2",
        FOUR,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
    ),
    "gemma3": row(
        "gemma3_text",
        FOUR,
        head_dim=8,
        sliding_window=4,
        layer_types=SLIDING,
        query_pre_attn_scalar=16,
        tie_word_embeddings=True,
    ),
    "gpt2": row("gpt2", MHA, n_inner=48, tie_word_embeddings=True),
    "gpt2_untied": row("gpt2", MHA, n_inner=48),
    "gpt_neox": row("gpt_neox", MHA, rotary_pct=0.5),
    "gpt_neox_sequential": row("gpt_neox", MHA, use_parallel_residual=False),
    "phi3": row("phi3"),
    "olmo2": row("olmo2"),
    "stablelm": row("stablelm", use_qkv_bias=True),
    "granite": row("granite", GRANITE),
    "cohere": row("cohere", logit_scale=0.25, tie_word_embeddings=True),
    "phi": row("phi"),
    "gptj": row("gptj", MHA, n_inner=48, rotary_dim=4),  # blocks return tuples
    **{name: EVERYTHING[name] for name in LISTED},
}

# Families that no table row describes: they must be resolved from their structure.
UNLISTED: dict[str, Row] = {name: EVERYTHING[name] for name in FOUND}

# Everything else that builds; whether layerscope reads it yet is another question.
CANDIDATES: dict[str, Row] = {
    name: fields for name, fields in EVERYTHING.items() if name not in (*LISTED, *FOUND)
}
