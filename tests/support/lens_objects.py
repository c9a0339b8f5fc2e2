"""Tiny models as TransformerLens objects with the weights of the Hugging Face ones."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import layerscope
from layerscope.models import LanguageModel
from support.tiny_models import tiny, tiny_tokenizer

pytest.importorskip("transformer_lens", reason="needs the extra transformer-lens")

BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"
FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "gpt_neox")
OBJECTS = [(kind, family) for kind in (BRIDGE, HOOKED) for family in FAMILIES]

_FOLDED = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
}


@cache
def lens(kind: str, family: str) -> LanguageModel:
    """Return a tiny model behind the TransformerLens backend; shared, so leave it as it was."""
    return layerscope.load(wrapped(kind, tiny(family)), tokenizer=tiny_tokenizer())


def wrapped(kind: str, model: Any, **processing: bool) -> Any:
    """Return a TransformerLens object with a copy of a model's weights."""
    model = copy.deepcopy(model)
    return bridge(model) if kind == BRIDGE else hooked(model, **processing)


def bridge(model: Any) -> Any:
    """Put a bridge around a Hugging Face model, which it changes."""
    from transformer_lens.model_bridge import TransformerBridge

    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=_named_tokenizer(), device="cpu"
    )


def hooked(model: Any, *, folded: bool = False) -> Any:
    """Convert a Hugging Face model to a HookedTransformer, folded or with its weights as they are.

    The configuration is written here from the one of transformers, not looked up by name.
    """
    transformer_lens = _third()
    config = transformer_lens.HookedTransformerConfig(**_config(model))
    converters = transformer_lens.pretrained.weight_conversions
    convert = getattr(converters, f"convert_{_CONVERTERS[model.config.model_type]}_weights")
    made = transformer_lens.HookedTransformer(config)
    made.load_and_process_state_dict(
        convert(model, config), **(_FOLDED if folded else dict.fromkeys(_FOLDED, False))
    )
    return made


def skip_without(kind: str) -> None:
    """Skip the test when the installed TransformerLens does not have this class."""
    if kind == HOOKED:
        _third()


def _third() -> Any:
    import transformer_lens

    try:
        transformer_lens.HookedTransformer  # noqa: B018
    except (ImportError, AttributeError):
        pytest.skip("TransformerLens 4 has no HookedTransformer; install transformer-lens<4")
    import transformer_lens.pretrained.weight_conversions

    return transformer_lens


_CONVERTERS = {
    "llama": "llama",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gpt2": "gpt2",
    "gpt_neox": "neox",
}
_GATED = {
    "normalization_type": "RMS",
    "final_rms": True,
    "gated_mlp": True,
    "positional_embedding_type": "rotary",
    "rotary_adjacent_pairs": False,
}


def _config(model: Any) -> dict[str, Any]:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = {
        "d_model": config.hidden_size,
        "d_head": head,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "original_architecture": type(model).__name__,
        "device": "cpu",
        "dtype": torch.float32,
    }
    kind = config.model_type
    if kind == "gpt2":
        return {
            **shared,
            "d_mlp": config.n_inner,
            "act_fn": config.activation_function,
            "eps": config.layer_norm_epsilon,
            "normalization_type": "LN",
        }
    rotary = {
        "d_mlp": config.intermediate_size,
        "rotary_dim": head,
        "rotary_base": config.rope_parameters["rope_theta"],
    }
    if kind == "gpt_neox":
        return {
            **shared,
            **rotary,
            "rotary_dim": int(head * config.rope_parameters["partial_rotary_factor"]),
            "act_fn": config.hidden_act,
            "eps": config.layer_norm_eps,
            "normalization_type": "LN",
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "parallel_attn_mlp": config.use_parallel_residual,
        }
    gated = {
        **shared,
        **rotary,
        **_GATED,
        "n_key_value_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "use_qk_norm": kind == "qwen3",
    }
    if kind != "gemma2":
        return {**gated, "act_fn": config.hidden_act}
    return {
        **gated,
        "act_fn": config.hidden_activation,
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping,
        "output_logits_soft_cap": config.final_logit_softcapping,
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": [
            "local" if kind == "sliding_attention" else "global" for kind in config.layer_types
        ],
        "use_normalization_before_and_after": True,
    }


def _named_tokenizer() -> Any:
    """Return a tokenizer that a bridge does not try to load again by its name."""
    tokenizer = tiny_tokenizer()
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": "", "add_bos_token": True}
    return tokenizer
