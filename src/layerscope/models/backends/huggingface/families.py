"""The families of causal language models that Hugging Face implements, one row each.

A row names modules and configuration fields; what it claims is proved by the identities whenever a
model is loaded. Rows give only what differs from the Llama layout.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts.

    Paths of the model are dotted names from the ``...ForCausalLM`` module, paths of a block are
    relative to it.

    Attributes:
        name: the family.
        model_types: values of ``config.model_type`` that it covers.
        embedding, blocks, final_norm, head: modules of the model.
        position_embedding: learned absolute positions that are added to the token embedding.
        input_norm: norm of a block that reads the residual stream before attention; None where
            attention reads the stream itself.
        attention, mlp: the sublayers of a block.
        attention_out, mlp_out: the last module of each branch before it is added to the stream
            (a norm, in post-norm families); None where the sublayer is the last.
        mlp_norm: norm that reads the stream between attention and MLP; None where the MLP does.
        parallel: True where attention and MLP read the same residual, or the name of the
            configuration field that says so.
        embedding_scale: configuration field, or "sqrt(d_model)".
        branch_scale: configuration field that multiplies both branches before they are added.
        logit_scale, logit_divisor, softcap: configuration fields of the head's transforms.
        query, key, out: attention's projections, relative to the block; found by their usual names
            where not given.
        pre, up, post: the MLP's projections: the one whose output the activation function reads,
            the other factor of a gated MLP, and the one that reads the neurons.
        fused: True where `pre` gives gate and up side by side.
        router: the module that chooses experts.
        router_items: which items of its output are the logits and the chosen experts; None where
            there is no such item.
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
    branch_scale: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    softcap: str | None = None
    query: str | None = None
    key: str | None = None
    out: str | None = None
    pre: str | None = None
    up: str | None = None
    post: str | None = None
    fused: bool = False
    router: str | None = None
    router_items: tuple[int | None, int | None] = (0, 2)


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("phi3", ("phi3",)),
    Family("gemma", ("gemma",), embedding_scale="sqrt(d_model)"),
    Family(
        "gemma2",
        ("gemma2",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        embedding_scale="sqrt(d_model)",
        softcap="final_logit_softcapping",
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        attention_out="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
        embedding_scale="sqrt(d_model)",
        softcap="final_logit_softcapping",
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
        embedding="transformer.wte",
        position_embedding="transformer.wpe",
        blocks="transformer.h",
        input_norm="ln_1",
        attention="attn",
        mlp_norm="ln_2",
        final_norm="transformer.ln_f",
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        embedding="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        attention="attention",
        final_norm="gpt_neox.final_layer_norm",
        parallel="use_parallel_residual",
    ),
)


def family_of(model_type: str) -> Family | None:
    """Return the row of a model type, or None when it is not listed."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
