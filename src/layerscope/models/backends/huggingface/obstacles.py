"""Why some models cannot be read, said in words beside the number that an identity gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Obstacle:
    """Why models of a type cannot be read: what an identity then shows in numbers.

    Attributes:
        model_types: values of ``config.model_type``.
        reason: goes on from "it ...".
        field, value: a configuration field that must have this value for the reason to hold.
    """

    model_types: tuple[str, ...]
    reason: str
    field: str | None = None
    value: Any = True


_NO_ATTENTION = "has no attention; layerscope reads transformers with attention blocks"
OBSTACLES: tuple[Obstacle, ...] = (
    Obstacle(("mamba", "mamba2", "falcon_mamba", "rwkv"), _NO_ATTENTION),
    Obstacle(
        ("gemma3n_text",),
        "passes four residual streams side by side (AltUp) and mixes them in every block",
    ),
    Obstacle(
        ("deepseek_v4",), "passes several residual streams side by side and mixes them per block"
    ),
    Obstacle(
        ("gemma4_text", "gemma4_unified_text"),
        "multiplies the whole stream by a learned number at the end of every block",
    ),
    Obstacle(("beam",), "shrinks the stream before it adds a branch to it"),
    Obstacle(("doge",), "multiplies the stream by learned vectors before it adds a branch to it"),
    Obstacle(("minimax",), "adds its branches to the normed stream, not to the stream"),
    Obstacle(("openai-gpt",), "norms the stream itself after every sublayer"),
    Obstacle(
        ("opt",), "norms the stream itself after every sublayer", "do_layer_norm_before", False
    ),
    Obstacle(
        ("bloom",),
        "adds its branches to the normed stream, not to the stream",
        "apply_residual_connection_post_layernorm",
    ),
    Obstacle(("falcon_h1",), "adds a state-space branch of its own scale beside attention"),
    Obstacle(("nemotron_h",), "has blocks of one sublayer each, not of attention and MLP"),
    Obstacle(("zamba", "zamba2"), "sends one shared transformer block into its state-space blocks"),
    Obstacle(("longcat_flash",), "has two attentions and two MLPs in a block"),
    Obstacle(("hrm_text",), "runs its blocks several times in a pass"),
    Obstacle(("cpmant",), "puts tokens of its own before the prompt"),
    Obstacle(
        ("modernbert-decoder",), "has further layers between its final norm and its unembedding"
    ),
)


def obstacle(config: Any) -> str | None:
    """Return why models of this configuration cannot be read, where that is known."""
    for known in OBSTACLES:
        if config.model_type in known.model_types and (
            known.field is None or getattr(config, known.field, None) == known.value
        ):
            return known.reason
    return None
