"""What mlx-lm must be told about a Hugging Face configuration, and what it cannot be told.

mlx-lm reads config.json by the names that were in use when its code was written, and silently
takes a default for what it does not find. transformers has since moved some of them (the rotary
base, most of all), so its own reading of the file is translated back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from layerscope.errors import ModelError
from layerscope.models.backends.mlx.families import Family

_SLIDING, _FULL = "sliding_attention", "full_attention"
_ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")

TRANSLATED = (
    "rope_theta",
    "rope_scaling",
    "rope_local_base_freq",
    "rotary_emb_base",
    "rotary_pct",
    "partial_rotary_factor",
    "sliding_window_pattern",
    "n_ctx",
)
"""Fields that transformers' reading of config.json decides, whatever stands in the file."""

_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "relu": "relu",
}


def overrides(config: Any, args: Collection[str]) -> dict[str, Any]:
    """Return fields of config.json as mlx-lm knows them, from transformers' reading of it.

    Args:
        config: that reading.
        args: the fields that mlx-lm's code of the family takes.

    Raises:
        ModelError: the layers alternate in a way that mlx-lm cannot express.
    """
    found: dict[str, Any] = {}
    rope = getattr(config, "rope_parameters", None) or {}
    if _FULL in rope:
        found |= _rotary(rope[_FULL])
        if _SLIDING in rope:
            found["rope_local_base_freq"] = rope[_SLIDING].get("rope_theta")
            if rope[_SLIDING].get("rope_type", "default") != "default":
                raise ModelError(
                    "mlx-lm scales no rotary embedding of layers with a window, and this model "
                    "does; use the 'huggingface' backend"
                )
    elif rope:
        found |= _rotary(rope)
    if config.model_type == "gpt2":
        found["n_ctx"] = config.n_positions
    if "sliding_window_pattern" in args and getattr(config, "layer_types", None):
        found["sliding_window_pattern"] = _pattern(config.layer_types)
    for name in args:
        if name not in found and name not in _ROTARY:
            found[name] = getattr(config, name, None)
    return {name: value for name, value in found.items() if value is not None}


def windows(config: Any, n_layers: int) -> list[int | None]:
    """Return how many keys a query sees in each block, itself included; None for all.

    Raises:
        ModelError: a block attends in a way that is neither full nor a window.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [_SLIDING if window else _FULL] * n_layers
    others = sorted(set(kinds) - {_SLIDING, _FULL})
    if others:
        raise ModelError(
            f"blocks of kind {', '.join(others)} are not read on the mlx backend; use 'huggingface'"
        )
    return [window if kind == _SLIDING else None for kind in kinds]


def differences(config: Any, family: Family, args: Any) -> list[str]:
    """Return what mlx-lm's code computes otherwise than the configuration says, in words.

    Raises:
        ModelError: it would compute another model.
    """
    for name, harmless in (
        ("scale_attn_by_inverse_layer_idx", False),
        ("scale_attn_weights", True),
        ("use_bidirectional_attention", False),
        ("clip_qkv", None),
    ):
        value = getattr(config, name, harmless)
        if value != harmless and value is not None:
            raise ModelError(_ignored(name, value))
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if value != getattr(args, name, None):
            raise ModelError(_ignored(name, value))
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", 1.0)
    known = getattr(args, "partial_rotary_factor", getattr(args, "rotary_pct", 1.0))
    if partial != known:
        raise ModelError(_ignored("partial_rotary_factor", partial))
    found: list[str] = []
    given = _activation(config)
    wanted = _NAMES.get(given or "", given)
    if family.activation is None:
        found.append(
            f"the family '{family.name}' is not in the table: its identities were proved, and "
            "nobody compared it with Hugging Face's"
        )
    elif wanted is not None and wanted != family.activation:
        if not {wanted, family.activation} <= {"gelu", "gelu_tanh"}:
            raise ModelError(_ignored("hidden_act", given))
        found.append(
            f"mlx-lm computes {family.activation} where the configuration says {given}: neurons "
            "differ from Hugging Face's by up to 5e-4"
        )
    scale = float(config.hidden_size) ** 0.5
    off = abs(float(torch.tensor(scale).bfloat16()) / scale - 1) if family.rounds_scale else 0.0
    if off > 1e-6:
        found.append(
            f"mlx-lm rounds the embedding's scale to bfloat16, {off:.1e} from what Hugging Face "
            "takes in float32"
        )
    return found


def _rotary(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    scaling = None
    if kind != "default":
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        scaling["type"] = kind
    return {
        "rope_theta": rope.get("rope_theta"),
        "rotary_emb_base": rope.get("rope_theta"),
        "rotary_pct": rope.get("partial_rotary_factor"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_scaling": scaling,
    }


def _pattern(kinds: Sequence[str]) -> int:
    """Return p where every p-th layer sees all and no other does."""
    for period in range(1, len(kinds) + 2):
        repeated = [_SLIDING if (i + 1) % period else _FULL for i in range(len(kinds))]
        if repeated == list(kinds):
            return period
    raise ModelError(
        "mlx-lm gives every p-th block full attention, and this model's blocks alternate "
        "otherwise; use the 'huggingface' backend"
    )


def _activation(config: Any) -> str | None:
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return value
    return None


def _ignored(name: str, value: object) -> str:
    return (
        f"mlx-lm takes no notice of {name}={value} in this model's config.json, so it would "
        "compute another model; use the 'huggingface' backend"
    )
