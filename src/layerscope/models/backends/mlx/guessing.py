"""Rows for families of mlx-lm that no row describes, to be told apart by the identities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx import nn

from layerscope.errors import ModelError
from layerscope.models.backends.mlx.families import Family
from layerscope.models.backends.mlx.structure import find

_BLOCKS = ("model.layers", "model.h", "transformer.h", "transformer.layers")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "tok_embeddings")
_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_norm", "final_layer_norm")
_ATTENTIONS = ("self_attn", "attn", "attention")
_MLPS = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_OUTS = ("o_proj", "dense", "c_proj", "out_proj", "wo")
_ROUTERS = ("gate", "router")
# Gate, up and down projection; the single one and down; gate and up side by side.
_NEURONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", None, "down_proj"),
    ("up_proj", None, "down_proj"),
    ("c_fc", None, "c_proj"),
    ("fc1", None, "fc2"),
    ("fc_in", None, "fc_out"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
)
# Input norm, attention's end, the MLP's norm, the MLP's end; all norms of a block are named.
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("ln_1", None, "ln_2", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("input_layernorm", None, None, None),
    ("ln_1", None, None, None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ),
)


def guesses(model: nn.Module, model_type: str) -> Iterator[Family]:
    """Yield the rows that may describe a model, likeliest first.

    Raises:
        ModelError: its tree has no blocks with attention, MLP and norms of known names.
    """
    path = next((path for path in _BLOCKS if isinstance(find(model, path), list)), None)
    if path is None:
        raise ModelError(_unlike(model_type, "list of blocks"))
    block, base = find(model, f"{path}.0"), path.rpartition(".")[0]
    attention = _one_of(block, _ATTENTIONS, model_type)
    mlp = _one_of(block, _MLPS, model_type)
    within = {name for name, part in find(block, mlp).items() if isinstance(part, nn.Module)}
    pre, up, post = next(
        (names for names in _NEURONS if {*names} - {None} <= within), ("pre", None, "post")
    )
    shared: dict[str, Any] = {
        "name": f"structure:{model_type}",
        "model_types": (model_type,),
        "embedding": f"{base}.{_one_of(find(model, base), _EMBEDDINGS, model_type)}",
        "blocks": path,
        "attention": attention,
        "mlp": mlp,
        "final_norm": f"{base}.{_one_of(find(model, base), _FINAL_NORMS, model_type)}",
        "embedding_scale": "embedding_multiplier",
        "branch_scale": "residual_multiplier",
        "logit_scale": "logit_scale",
        "logit_divisor": "logits_scaling",
        "softcap": "final_logit_softcapping",
        "out": _one_of(find(block, attention), _OUTS, model_type),
        "pre": pre,
        "up": up,
        "post": post,
        "fused": pre == "gate_up_proj",
        "router": next((name for name in _ROUTERS if name in within), "router"),
        "activation": None,
    }
    norms = {name for name in block if "norm" in name or name.startswith("ln_")}
    for names in _NORMS:
        if norms != {*names} - {None}:
            continue
        input_norm, attention_out, mlp_norm, mlp_out = names
        layout: dict[str, Any] = {
            "input_norm": input_norm,
            "attention_out": attention_out,
            "mlp_norm": mlp_norm,
            "mlp_out": mlp_out,
        }
        if mlp_norm is not None or input_norm is None:
            yield Family(**shared, **layout)
        if attention_out is None:
            yield Family(**shared, **layout, parallel=True)


def _one_of(module: Any, names: Sequence[str], model_type: str) -> str:
    name = next((name for name in names if isinstance(module.get(name), nn.Module)), None)
    if name is None:
        raise ModelError(_unlike(model_type, names[0]))
    return name


def _unlike(model_type: str, what: str) -> str:
    return (
        f"model type '{model_type}' is not in the mlx backend's family table, and mlx-lm's module "
        f"tree has no {what} that layerscope recognises; use the 'huggingface' backend"
    )
