"""The sizes of a Hugging Face model from its config.json and the headers of its files alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from layerscope.models.backends.huggingface.quantised import Scheme, missing, scheme_of
from layerscope.models.backends.huggingface.weights import Entry
from layerscope.models.memory.sizes import KvLayer, Sizes

_EXPERT = re.compile(r"\.experts\.")
_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")


def read_sizes(
    name: str, config: PreTrainedConfig, entries: Mapping[str, Entry], *, custom_code: bool = False
) -> Sizes:
    """Return the sizes of a model.

    Parameters are counted on an empty model built from the configuration (no memory is taken), so a
    tied unembedding counts once whatever the files repeat; the headers say in which dtype they are
    stored and, of a quantised model, how many bytes. A model with code of its own is counted by its
    headers.

    Args:
        name: how the model is called in messages.
        config: its configuration.
        entries: headers of its weight files; empty when there are none.
        custom_code: it cannot be built without running its own code, which is not done here.
    """
    text: Any = config.get_text_config()
    stored: dict[str, int] = {}
    for entry in entries.values():
        stored[entry.kind] = stored.get(entry.kind, 0) + entry.numel
    scheme = scheme_of(config)
    shape: dict[str, Any] = {
        "stored": stored,
        "scheme": None if scheme is None else scheme.name,
        "packed_bytes": sum(entry.bytes for entry in entries.values()) or None if scheme else None,
        "unpacked_on": _unpacked_on(scheme),
        "n_layers": getattr(text, "num_hidden_layers", None),
        "d_model": getattr(text, "hidden_size", None),
        "d_vocab": getattr(text, "vocab_size", None),
        "d_mlp": _mlp_width(text),
        "n_heads": getattr(text, "num_attention_heads", None),
        "n_ctx": getattr(text, "max_position_embeddings", None),
        "kv": _cache_layers(config, text),
    }
    model = None if custom_code else _empty(config)
    if model is None:
        count = sum(entry.numel for entry in entries.values())
        notes = ("counted by the headers of its files alone: it cannot be built empty",)
        return Sizes(name, "files", count, count, notes=notes, **shape)
    origin = "files" if entries else "configuration"
    return Sizes(
        name, origin, **_count(model, text), eager=_is_eager(model), **shape,
        notes=_notes(model, entries, quantised=scheme is not None),
    )  # fmt: skip


def _unpacked_on(scheme: Scheme | None) -> tuple[str, ...]:
    """Return where transformers turns quantised weights back into the dtype asked for."""
    if scheme is None or not scheme.unpacked_on_cpu:
        return ()
    return ("cpu", "mps", "cuda") if missing(scheme.kernels) else ("cpu", "mps")


def _empty(config: PreTrainedConfig) -> Any:
    """Return the model without memory or weights; None when transformers cannot build it."""
    plain: Any = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(plain)
    # Whatever a constructor raises, the headers still count.
    except Exception:
        return None


def _count(model: Any, text: Any) -> dict[str, Any]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    total = experts = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        experts += parameter.numel() if _EXPERT.search(name) else 0
    n_experts, per_token = _first(text, _N_EXPERTS), _first(text, _PER_TOKEN)
    if not experts or not n_experts or not per_token:
        experts = n_experts = per_token = 0
    idle = experts - experts * per_token // n_experts if n_experts else 0
    packable = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    return {
        "parameters": total,
        "active": total - idle,
        "embedding": embedding.weight.numel(),
        "unembedding": None if head is None else head.weight.numel(),
        "tied": head is not None and head.weight is embedding.weight,
        "experts": experts,
        "n_experts": n_experts,
        "experts_per_token": per_token,
        "linear": packable,
    }


def _notes(model: Any, entries: Mapping[str, Entry], *, quantised: bool) -> tuple[str, ...]:
    """Say when the files hold other things than the model that config.json describes."""
    if not entries or quantised:
        return ()
    wanted = sum(tensor.numel() for tensor in model.state_dict(keep_vars=True).values())
    there = sum(entry.numel for entry in entries.values())
    unique = sum(parameter.numel() for parameter in model.parameters())
    if unique <= there <= max(wanted, unique):
        return ()
    word = "fewer" if there < unique else "more"
    return (f"the files hold {abs(there - unique):,} values {word} than config.json describes",)


def _cache_layers(config: PreTrainedConfig, text: Any) -> tuple[KvLayer, ...]:
    """Return what each layer caches, by the cache that transformers would make for it."""
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        layers = []
    n_layers = getattr(text, "num_hidden_layers", 0) or 0
    if not layers:
        return (KvLayer(_kv_values(text, full=True)),) * n_layers
    found: list[KvLayer] = []
    for layer in layers:
        if not hasattr(layer, "keys"):  # a state of fixed size, not keys and values
            found.append(KvLayer(0))
            continue
        window = getattr(layer, "sliding_window", None)
        found.append(KvLayer(_kv_values(text, full=window is None), window))
    return tuple(found)


def _kv_values(text: Any, *, full: bool) -> int:
    """Return keys and values of one token in one layer."""
    heads = getattr(text, "num_attention_heads", None)
    width = getattr(text, "hidden_size", None)
    if not heads or not width:
        return 0
    if getattr(text, "kv_lora_rank", None):  # latent attention; transformers caches it expanded
        key = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return int(heads) * (key + int(text.v_head_dim))
    groups = getattr(text, "num_key_value_heads", None)
    if groups is None and getattr(text, "multi_query", False):
        groups = 1
    head = getattr(text, "head_dim", None) or width // heads
    if full:  # families whose full layers have sizes of their own beside the sliding ones
        head = getattr(text, "global_head_dim", None) or head
        groups = getattr(text, "num_global_key_value_heads", None) or groups
    return 2 * int(groups or heads) * int(head)


def _mlp_width(text: Any) -> int | None:
    width = _first(text, _WIDTHS) or 4 * int(getattr(text, "hidden_size", 0) or 0)
    experts = _first(text, ("moe_intermediate_size", "intermediate_size"))
    per_token = _first(text, _PER_TOKEN)
    if per_token and _first(text, _N_EXPERTS):
        return max(width, experts * per_token)
    return width or None


def _first(text: Any, names: tuple[str, ...]) -> int:
    """Return the first of several names that a configuration gives a number; 0 when none does."""
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value and isinstance(value[0], int):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _is_eager(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "_attn_implementation", None) == "eager"
