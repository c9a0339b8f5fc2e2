"""The families of causal language models that Hugging Face implements, one row each.

A row names modules and configuration fields; what it claims is proved by the identities whenever a
model is loaded. Rows give only what differs from the Llama layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts.

    Paths of the model are dotted names from the ``...ForCausalLM`` module, paths of a block are
    relative to it. "a|b" is the first of the two that exists.

    Attributes:
        name: the family.
        model_types: values of ``config.model_type`` that it covers.
        embedding, blocks, final_norm, head: modules of the model.
        position_embedding: absolute positions that are added to the token embedding.
        embedding_norm: norm between the embedding and block 0.
        input_norm: norm of a block that reads the residual stream before attention; None where
            attention reads the stream itself.
        attention, mlp: the sublayers of a block.
        mixer: what stands in the place of attention in blocks without any.
        attention_out, mlp_out: the last module of each branch before it is added to the stream
            (a norm, in post-norm families); None where the sublayer is the last.
        mlp_norm: norm that reads the stream between attention and MLP; None where the MLP does.
        mlp_beside: a second MLP that reads what the first reads, and is added to it.
        parallel: True where attention and MLP read the same residual, or the name of the
            configuration field that says so ("a|b": one of them does).
        embedding_scale: configuration field, or "sqrt(d_model)"; " if " and a field that turns it
            on may follow.
        branch_scale: what multiplies both branches before they are added: a configuration field, or
            an attribute of the blocks.
        logit_scale, logit_divisor, softcap: configuration fields of the head's transforms.
        query, key, value, out: attention's projections, relative to the block; found by their usual
            names where not given.
        qkv: the one projection that gives queries, keys and values.
        qkv_groups: the equal parts of its output that hold some of each; "kv_heads": as many as
            there are key-value heads.
        qkv_order: their order within a part.
        pattern: in attention with code of its own, the dropout module that passes the pattern on.
        pre, up, post: the MLP's projections: the one whose output the activation function reads,
            the other factor of a gated MLP, and the one that reads the neurons.
        fused: True where `pre` gives gate and up side by side.
        activation: the activation function.
        router: the module that chooses experts.
        router_items: which items of its output are the logits and the chosen experts; None where
            there is no such item.
        experts: the module whose second argument are the chosen experts, where no item is.
        largest: True where the chosen experts are those with the largest logits.
        read_apart: the ``*_in`` sites that several modules read; they live where a norm gives them.
        overwritten: kinds of sites whose tensors the model writes into later.
        continues: False where a pass cannot go on from stored keys and values.
        left_padding: False where padding on the left changes the numbers.
        stream: axis and index of the residual stream that runs through all blocks, where a block
            passes on several.
    """

    name: str
    model_types: tuple[str, ...]
    embedding: str = "model.embed_tokens"
    position_embedding: str | None = None
    embedding_norm: str | None = None
    blocks: str = "model.layers"
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    mixer: str | None = None
    attention_out: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_beside: str | None = None
    mlp_out: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    parallel: bool | str = False
    embedding_scale: str | None = None
    branch_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    out: str | None = None
    qkv: str | None = None
    qkv_groups: int | str = 1
    qkv_order: str = "qkv"
    pattern: str | None = None
    pre: str | None = None
    up: str | None = None
    post: str | None = None
    fused: bool = False
    activation: str | None = None
    router: str | None = None
    router_items: tuple[int | None, int | None] = (0, 2)
    experts: str | None = None
    largest: bool = False
    read_apart: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    continues: bool = True
    left_padding: bool = True
    stream: tuple[int, int] | None = None


# Layouts that several families share.
_LLAMA = Family("llama", ("llama", "internlm3", "iquestcoder"))
_GPT2 = Family(
    "gpt2",
    ("gpt2",),
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    blocks="transformer.h",
    input_norm="ln_1",
    attention="attn",
    mlp_norm="ln_2",
    final_norm="transformer.ln_f",
    qkv="attn.c_attn",
)
_GEMMA = Family("gemma", ("gemma",), embedding_scale="sqrt(d_model)")
_GEMMA2 = replace(
    _GEMMA,
    name="gemma2",
    model_types=("gemma2",),
    attention_out="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    softcap="final_logit_softcapping",
)
_OLMO2 = Family(
    "olmo2",
    ("olmo2",),
    input_norm=None,
    attention_out="post_attention_layernorm",
    mlp_norm=None,
    mlp_out="post_feedforward_layernorm",
)
_COHERE = Family("cohere", ("cohere",), parallel=True, logit_scale="logit_scale")
_GRANITE = Family(
    "granite",
    ("granite", "granite_swa"),
    embedding_scale="embedding_multiplier",
    branch_scale="residual_multiplier",
    logit_divisor="logits_scaling",
)
_NEOX = Family(
    "gpt_neox",
    ("gpt_neox",),
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    attention="attention",
    final_norm="gpt_neox.final_layer_norm",
    parallel="use_parallel_residual",
    qkv="attention.query_key_value",
    qkv_groups="kv_heads",
)
# The MLP lies bare in the block.
_FAIRSEQ = Family(
    "opt",
    ("opt",),
    embedding="model.decoder.embed_tokens",
    position_embedding="model.decoder.embed_positions",
    blocks="model.decoder.layers",
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    mlp="fc1",
    mlp_out="fc2",
    final_norm="model.decoder.final_layer_norm",
    pre="fc1",
    post="fc2",
    activation="activation_fn",
)
_GLM4 = Family(
    "glm4",
    ("glm4",),
    attention_out="post_self_attn_layernorm",
    mlp_out="post_mlp_layernorm",
)


def _like(family: Family, *names: str, **fields: Any) -> Family:
    """Return a row that differs in little: its name, its model types, some fields."""
    return replace(family, name=names[0], model_types=names[1:] or names, **fields)


FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    *(
        _like(_LLAMA, name)
        for name in (
            *("mistral", "ministral", "ministral3", "mixtral", "qwen2", "qwen3", "qwen2_moe"),
            *("qwen3_moe", "olmoe", "gpt_oss", "phimoe", "glm", "smollm3", "starcoder2"),
            "nemotron",
        )
    ),
    _like(
        _LLAMA,
        "llama4",
        "llama4_text",
        mlp="feed_forward",
        router_items=(1, None),
        largest=True,
        # Its chunks of attention are counted in columns, padding included.
        continues=False,
        left_padding=False,
    ),
    _like(_LLAMA, "olmo", overwritten=("attn.q_pre", "attn.k_pre")),
    _like(_LLAMA, "stablelm", parallel="use_parallel_residual"),
    _like(_LLAMA, "bitnet", post="mlp.ffn_sub_norm"),
    _like(_LLAMA, "phi", parallel=True, final_norm="model.final_layernorm"),
    _like(_LLAMA, "phi3", qkv="self_attn.qkv_proj"),
    _like(
        _LLAMA,
        "persimmon",
        final_norm="model.final_layernorm",
        qkv="self_attn.query_key_value",
        qkv_groups="kv_heads",
    ),
    _like(_LLAMA, "nanochat", embedding_norm="model.norm", softcap="final_logit_softcapping"),
    _like(
        _LLAMA,
        "minicpm3",
        embedding_scale="scale_emb",
        branch_scale="residual_scale",
        logit_divisor="logits_scaling",
    ),
    _GLM4,
    _like(_GLM4, "kolibri1"),
    _GEMMA,
    _GEMMA2,
    _like(_GEMMA2, "gemma3", "gemma3_text"),
    _OLMO2,
    _like(_OLMO2, "olmo3"),
    _like(_OLMO2, "exaone4"),
    _COHERE,
    _like(_COHERE, "cohere2"),
    _GRANITE,
    _like(_GRANITE, "granitemoe", mlp="block_sparse_moe"),
    _like(
        _GRANITE,
        "granitemoeshared",
        *("granitemoeshared", "granitemoe_swa"),
        mlp="block_sparse_moe",
        mlp_beside="shared_mlp",
        read_apart=("mlp_in",),
    ),
    _like(
        _GRANITE,
        "hyperclovax",
        logit_divisor=None,
        logit_scale="logits_scaling",
        attention_out="post_norm1",
        mlp_out="post_norm2",
    ),
    _GPT2,
    _like(_GPT2, "gpt_bigcode", qkv_groups="kv_heads"),
    _like(
        _GPT2,
        "gpt_neo",
        qkv=None,
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        out="attn.attention.out_proj",
        pattern="attn.attention.attn_dropout",
    ),
    _like(
        _GPT2, "gptj", position_embedding=None, parallel=True, qkv=None, pattern="attn.attn_dropout"
    ),
    _like(
        _GPT2,
        "codegen",
        position_embedding=None,
        parallel=True,
        qkv="attn.qkv_proj",
        qkv_groups=4,
        qkv_order="qvk",
        pattern="attn.attn_dropout",
    ),
    _NEOX,
    _like(
        _NEOX,
        "bloom",
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        blocks="transformer.h",
        attention="self_attention",
        attention_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        final_norm="transformer.ln_f",
        parallel=False,
        qkv="self_attention.query_key_value",
        pattern="self_attention.attention_dropout",
    ),
    _like(
        _NEOX,
        "falcon",
        embedding="transformer.word_embeddings",
        blocks="transformer.h",
        input_norm="input_layernorm|ln_attn",
        attention="self_attention",
        final_norm="transformer.ln_f",
        parallel="parallel_attn|new_decoder_architecture",
        qkv="self_attention.query_key_value",
        overwritten=("mlp_out",),
    ),
    Family(
        "mpt",
        ("mpt",),
        embedding="transformer.wte",
        blocks="transformer.blocks",
        input_norm="norm_1",
        attention="attn",
        mlp_norm="norm_2",
        mlp="ffn",
        mlp_out="ffn.down_proj",
        final_norm="transformer.norm_f",
        qkv="attn.Wqkv",
    ),
    Family(
        "dbrx",
        ("dbrx",),
        embedding="transformer.wte",
        blocks="transformer.blocks",
        input_norm="norm_attn_norm.norm_1",
        attention="norm_attn_norm.attn",
        mlp_norm="norm_attn_norm.norm_2",
        mlp="ffn",
        final_norm="transformer.norm_f",
        qkv="norm_attn_norm.attn.Wqkv",
        router_items=(0, None),
        experts="ffn.experts",
    ),
    _FAIRSEQ,
    _like(
        _FAIRSEQ,
        "biogpt",
        embedding="biogpt.embed_tokens",
        position_embedding="biogpt.embed_positions",
        blocks="biogpt.layers",
        final_norm="biogpt.layer_norm",
        head="output_projection",
        embedding_scale="sqrt(d_model) if scale_embedding",
    ),
    _like(
        _FAIRSEQ,
        "xglm",
        embedding="model.embed_tokens",
        position_embedding="model.embed_positions",
        blocks="model.layers",
        final_norm="model.layer_norm",
        embedding_scale="sqrt(d_model) if scale_embedding",
    ),
    Family(
        "ctrl",
        ("ctrl",),
        embedding="transformer.w",
        position_embedding="transformer.pos_encoding",
        blocks="transformer.h",
        input_norm="layernorm1",
        attention="multi_head_attention",
        mlp_norm="layernorm2",
        mlp="ffn",
        final_norm="transformer.layernorm",
        embedding_scale="sqrt(d_model)",
        query="multi_head_attention.Wq",
        key="multi_head_attention.Wk",
        pre="ffn.0",
        post="ffn.2",
        activation="ffn.1",
        read_apart=("attn_in",),
        overwritten=("embed",),
    ),
    Family(
        "jetmoe",
        ("jetmoe",),
        attention="self_attention",
        router="mlp.router",
        router_items=(4, None),
        largest=True,
    ),
    # Blocks of two kinds.
    _like(_LLAMA, "qwen3_next", mixer="linear_attn"),
    _like(_LLAMA, "qwen3_5", "qwen3_5_text", "qwen3_5_moe_text", mixer="linear_attn"),
    _like(
        _LLAMA,
        "lfm2",
        *("lfm2", "lfm2_moe"),
        mixer="conv",
        input_norm="operator_norm",
        mlp_norm="ffn_norm",
        mlp="feed_forward",
        final_norm="model.embedding_norm",
    ),
    _like(
        _LLAMA,
        "jamba",
        *("jamba", "bamba"),
        mixer="mamba",
        mlp_norm="pre_ff_layernorm",
        mlp="feed_forward",
        final_norm="model.final_layernorm",
    ),
    _like(
        _GRANITE,
        "granitemoehybrid",
        mixer="mamba",
        mlp="block_sparse_moe|shared_mlp",
        mlp_beside="shared_mlp",
        read_apart=("mlp_in",),
        pre="shared_mlp.input_linear",
        post="shared_mlp.output_linear",
        fused=True,
    ),
    _like(
        _LLAMA,
        "recurrent_gemma",
        embedding_scale="sqrt(d_model) in bfloat16",
        input_norm="temporal_pre_norm",
        attention="temporal_block",
        mlp_norm="channel_pre_norm",
        mlp="mlp_block",
        final_norm="model.final_norm",
        softcap="logits_soft_cap",
        left_padding=False,
    ),
    # Refused, with the number that an identity gives; see OBSTACLES.
    Family(
        "gemma3n",
        ("gemma3n_text",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        embedding_scale="sqrt(d_model)",
        softcap="final_logit_softcapping",
        stream=(0, 0),
    ),
    Family("deepseek_v4", ("deepseek_v4",), stream=(2, 0)),
    Family(
        "afmoe",
        ("afmoe",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_mlp_layernorm",
        mlp_out="post_mlp_layernorm",
        embedding_scale="sqrt(d_model) if mup_enabled",
    ),
)


def family_of(model_type: str) -> Family | None:
    """Return the row of a model type, or None when it is not listed."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
