"""The families of causal language models that mlx-lm implements, one row each.

A row names modules of the mlx-lm model and constants of its code. What it claims is proved by the
identities whenever a model is loaded. Rows give only what differs from the Llama layout.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts in mlx-lm.

    Paths of the model are dotted names, paths of a block are relative to it.

    Attributes:
        name: the family.
        model_types: values of ``model_type`` in config.json that it covers.
        embedding, blocks, final_norm, head: modules of the model; without a head, the embedding
            unembeds.
        position_embedding: learned absolute positions that are added to the token embedding.
        input_norm: norm of a block that reads the residual stream before attention; None where
            attention reads the stream itself.
        attention, mlp: the sublayers of a block.
        attention_out, mlp_out: the last module of each branch before it is added to the stream
            (a norm, in post-norm families); None where the sublayer is the last.
        mlp_norm: norm that reads the stream between attention and MLP; None where the MLP does.
        parallel: True where attention and MLP read the same residual, or the name of the
            configuration field that says so.
        embedding_scale: configuration field, None, or "sqrt(d_model)"; ``embed`` is after the last.
        rounds_scale: True where the code rounds that scale to bfloat16 whatever the model's dtype.
        branch_scale: configuration field that multiplies both branches before they are added.
        logit_scale, logit_divisor, softcap: configuration fields of the head's transforms.
        query, key, out: attention's projections, relative to it.
        pre, up, post: the MLP's projections, relative to it: the one whose output the activation
            function reads, the other factor of a gated MLP, and the one that reads the neurons.
        fused: True where `pre` gives gate and up side by side.
        router: the module that gives the experts' logits, relative to the MLP.
        activation: the activation function in mlx-lm's code, by torch's name of it; None where
            nobody has looked.
        own_attention: True where attention computes its scores itself (Gemma 2), grouped by
            key-value head.
    """

    name: str
    model_types: tuple[str, ...]
    embedding: str = "model.embed_tokens"
    position_embedding: str | None = None
    blocks: str = "model.layers"
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    attention_out: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_out: str | None = None
    final_norm: str = "model.norm"
    head: str = "lm_head"
    parallel: bool | str = False
    embedding_scale: str | None = None
    rounds_scale: bool = False
    branch_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    out: str = "o_proj"
    pre: str = "gate_proj"
    up: str | None = "up_proj"
    post: str = "down_proj"
    fused: bool = False
    router: str = "gate"
    activation: str | None = "silu"
    own_attention: bool = False


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("phi3", ("phi3",), pre="gate_up_proj", up=None, fused=True),
    Family("gemma", ("gemma",), embedding_scale="sqrt(d_model)", activation="gelu"),
    Family(
        "gemma2",
        ("gemma2",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        embedding_scale="sqrt(d_model)",
        softcap="final_logit_softcapping",
        activation="gelu_tanh",
        own_attention=True,
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        embedding_scale="sqrt(d_model)",
        rounds_scale=True,
        activation="gelu_tanh",
    ),
    Family(
        "olmo2",
        ("olmo2",),
        input_norm=None,
        attention_out="post_attention_layernorm",
        mlp_norm=None,
        mlp_out="post_feedforward_layernorm",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        embedding="model.wte",
        position_embedding="model.wpe",
        blocks="model.h",
        input_norm="ln_1",
        attention="attn",
        mlp_norm="ln_2",
        final_norm="model.ln_f",
        out="c_proj",
        pre="c_fc",
        up=None,
        post="c_proj",
        activation="gelu_tanh",
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        embedding="model.embed_in",
        blocks="model.h",
        attention="attention",
        final_norm="model.final_layer_norm",
        head="model.embed_out",
        parallel="use_parallel_residual",
        out="dense",
        pre="dense_h_to_4h",
        up=None,
        post="dense_4h_to_h",
        activation="gelu_tanh",
    ),
    Family("mixtral", ("mixtral",), mlp="block_sparse_moe"),
    Family("qwen3_moe", ("qwen3_moe",)),
)


def family_of(model_type: str) -> Family | None:
    """Return the row of a model type, or None when it is not listed."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
