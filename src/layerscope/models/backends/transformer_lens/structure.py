"""The parts of a `HookedTransformer` or `TransformerBridge`, and what its configuration adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from layerscope.errors import CapabilityError, ModelError
from layerscope.models.backends.base import ModelInfo
from layerscope.models.backends.huggingface import structure as huggingface
from layerscope.models.backends.huggingface.cache import supports_cache
from layerscope.models.backends.huggingface.families import family_of
from layerscope.models.backends.huggingface.hooks import Carrier
from layerscope.models.backends.huggingface.structure import Named
from layerscope.readout.unembedding import Unembedding

HOOKED, BRIDGE = "HookedTransformer", "TransformerBridge"

Layout: TypeAlias = Literal["plain", "heads", "flat heads", "kernel heads", "scores", "pattern"]
"""How a tensor holds heads: [batch, pos, head, d], [batch, pos, head * d], [batch, head, pos, d],
or [batch, head, query, key]; plain where there are none."""

# Hook points of a block that both kinds of objects have.
_BLOCK_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "attn.q_pre": "attn.hook_q",
    "attn.k_pre": "attn.hook_k",
    "attn.q": "attn.hook_rot_q",
    "attn.k": "attn.hook_rot_k",
    "attn.v": "attn.hook_v",
    "attn.scores": "attn.hook_attn_scores",
    "attn.pattern": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "mlp.pre": "mlp.hook_pre",
    "mlp.up": "mlp.hook_pre_linear",
    "mlp.post": "mlp.hook_post",
}
_HEADS = ("attn.q_pre", "attn.k_pre", "attn.q", "attn.k", "attn.v", "attn.z")
_AFTER_ROTARY = ("attn.q", "attn.k")
# TransformerLens builds blocks of these architectures without norms on what they read.
_POST_NORM = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


@dataclass(frozen=True, eq=False)
class LensStructure:
    """One object and where its sites live.

    Attributes:
        model: the object itself.
        kind: ``HookedTransformer`` or ``TransformerBridge``.
        info: its sizes.
        blocks: the modules whose input and output are the residual stream.
        input_norms: by block; None where the block reads the stream itself.
        unembed: the module whose input is unembedded.
        weight: the token embedding.
        carriers: by kind of site, what carries it in each block; ``embed`` once.
        layouts: by kind of site; plain where it is missing.
        embedding: what block 0 reads for ids and positions, from the weights alone.
        head: the output head.
        out_weight, out_bias: of a block's output projection, by head; None where it is packed.
        activation: of a block's MLP, and what a gated one adds to the neurons.
        takes_cache: whether it keeps nothing of the past but keys and values.
    """

    model: Any
    kind: str
    info: ModelInfo
    blocks: tuple[nn.Module, ...]
    input_norms: tuple[Named | None, ...]
    final_norm: Named
    unembed: nn.Module
    weight: Callable[[], Tensor]
    carriers: Mapping[str, tuple[Carrier | None, ...]]
    layouts: Mapping[str, Layout]
    embedding: Callable[[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]], Tensor]
    head: Callable[[], Unembedding]
    out_weight: Callable[[int], Float[Tensor, "head d d_model"] | None]
    out_bias: Callable[[int], Tensor | None]
    activation: Callable[[int], tuple[Callable[[Tensor], Tensor] | None, Tensor | None]]
    takes_cache: bool


def kind_of(source: object) -> str | None:
    """Return which of the two an object is, without importing TransformerLens; None for others."""
    for parent in type(source).__mro__:
        ours = parent.__module__.partition(".")[0] == "transformer_lens"
        if ours and parent.__name__ in (HOOKED, BRIDGE):
            return parent.__name__
    return None


def structure_of(model: Any) -> LensStructure:
    """Return the parts of a `HookedTransformer` or `TransformerBridge`.

    Raises:
        ModelError: it lacks a part that a causal language model has.
        CapabilityError: it adds positions in a way that is not understood.
    """
    return _hooked(model) if kind_of(model) == HOOKED else _bridged(model)


def _hooked(model: Any) -> LensStructure:
    config = model.cfg
    if config.attn_only:
        raise ModelError(
            "this HookedTransformer has attention alone (attn_only); layerscope reads models whose "
            "blocks have an MLP"
        )
    if config.positional_embedding_type == "shortformer":
        raise CapabilityError(
            "this HookedTransformer adds positions to queries and keys alone (shortformer); "
            "layerscope reads models whose positions are in the residual stream or rotary"
        )
    blocks = tuple(model.blocks)
    post_norm = config.original_architecture in _POST_NORM
    normalised = config.normalization_type is not None
    hooks = _hook_points(model, len(blocks))
    hooks["attn_in"] = tuple(Carrier(block.attn, "query") for block in blocks)
    hooks["attn.out"] = tuple(Carrier(block.attn, "output") for block in blocks)
    hooks["mlp_in"] = tuple(Carrier(block.mlp, "input") for block in blocks)
    rotary = config.positional_embedding_type == "rotary"
    if not rotary and not config.use_qk_norm:
        hooks["attn.q"], hooks["attn.k"] = hooks["attn.q_pre"], hooks["attn.k_pre"]

    def embedding(ids: Tensor, position_ids: Tensor) -> Tensor:
        expected = model.embed(ids.to(model.W_E.device)).detach()
        if config.positional_embedding_type == "standard":
            expected = expected + model.W_pos.detach()[position_ids.to(model.W_pos.device)]
        return expected

    def head() -> Unembedding:
        cap = float(config.output_logits_soft_cap)
        return Unembedding(model.W_U.T, model.b_U, softcap=cap if cap > 0 else None)

    def activation(layer: int) -> tuple[Callable[[Tensor], Tensor] | None, Tensor | None]:
        mlp = blocks[layer].mlp
        return getattr(mlp, "act_fn", None), mlp.b_in if hasattr(mlp, "W_gate") else None

    grouped = config.n_key_value_heads and not config.ungroup_grouped_query_attention
    return LensStructure(
        model=model,
        kind=HOOKED,
        info=ModelInfo(
            family=_family_name(config.original_architecture),
            n_layers=len(blocks),
            d_model=int(config.d_model),
            d_vocab=int(model.W_U.shape[1]),
            n_embeddings=int(model.W_E.shape[0]),
            n_heads=int(config.n_heads),
            n_kv_heads=int(config.n_key_value_heads if grouped else config.n_heads),
            n_ctx=int(config.n_ctx),
            architecture="post_norm" if post_norm or not normalised else "pre_norm",
        ),
        blocks=blocks,
        input_norms=tuple(
            None if post_norm or not normalised else Named(f"blocks.{layer}.ln1", block.ln1)
            for layer, block in enumerate(blocks)
        ),
        final_norm=Named("ln_final", model.ln_final if normalised else nn.Identity()),
        unembed=model.unembed,
        weight=lambda: model.W_E,
        carriers=hooks,
        layouts={
            **dict.fromkeys(_HEADS, "heads"),
            "attn.scores": "scores",
            "attn.pattern": "pattern",
        },
        embedding=embedding,
        head=head,
        out_weight=lambda layer: _floating(blocks[layer].attn.W_O),
        out_bias=lambda layer: blocks[layer].attn.b_O,
        activation=activation,
        # With keys and values given out to every head, its forward takes no cache.
        takes_cache=bool(grouped) or not config.n_key_value_heads,
    )


def _bridged(model: Any) -> LensStructure:
    inner = model.original_model
    if not isinstance(inner, PreTrainedModel) or "blocks" not in model._modules:
        raise ModelError(
            f"this TransformerBridge runs a {type(inner).__name__}; layerscope reads bridges of "
            "Hugging Face causal language models"
        )
    # A bridge keeps the Hugging Face tree and puts its own modules into it, so the tree's names
    # and the configuration mean what they mean there.
    parts = next(huggingface.structures(inner))
    config = model.cfg
    blocks = tuple(model.blocks)
    hooks = _hook_points(model, len(blocks))
    points = model.hook_dict
    for kind, name in (("attn_in", "attn.hook_in"), ("attn.out", "attn.hook_out")):
        hooks[kind] = _points(points, name, len(blocks))
    hooks["mlp_in"] = _points(points, "mlp.hook_in", len(blocks))
    # Its hook_resid_mid changes what the norm reads, not the stream that goes on beside it.
    hooks["resid_mid"] = tuple(
        None if known is None else Carrier(_reader(block), "input", shared=True)
        for known, block in zip(hooks["resid_mid"], blocks, strict=True)
    )
    rotary = config.positional_embedding_type == "rotary"
    if not rotary and "q_norm" not in blocks[0].attn._modules:
        hooks["attn.q"], hooks["attn.k"] = hooks["attn.q_pre"], hooks["attn.k_pre"]

    def embedding(ids: Tensor, position_ids: Tensor) -> Tensor:
        weight = model.W_E.detach()
        expected = weight[ids.to(weight.device)]
        expected = expected * weight.new_tensor(parts.embedding_scale)
        if "pos_embed" in model._modules:
            positions = _wrapped(model.pos_embed).weight.detach()
            expected = expected + positions[position_ids.to(positions.device)]
        return expected

    def head() -> Unembedding:
        output = _wrapped(model.unembed)
        bias = getattr(output, "bias", None)
        return Unembedding(output.weight, bias, parts.logit_scale, parts.softcap)

    def activation(layer: int) -> tuple[Callable[[Tensor], Tensor] | None, Tensor | None]:
        mlp = _wrapped(blocks[layer].mlp)
        return next((f for f in (getattr(mlp, n, None) for n in _ACTIVATIONS) if f), None), None

    heads: Layout = "flat heads"
    return LensStructure(
        model=model,
        kind=BRIDGE,
        info=ModelInfo(
            family=parts.family,
            n_layers=len(blocks),
            d_model=int(config.d_model),
            d_vocab=int(_wrapped(model.unembed).weight.shape[0]),
            n_embeddings=int(model.W_E.shape[0]),
            n_heads=int(config.n_heads),
            n_kv_heads=int(getattr(config, "n_key_value_heads", None) or config.n_heads),
            n_ctx=int(config.n_ctx),
            architecture="pre_norm" if parts.blocks[0].input_norm else "post_norm",
        ),
        blocks=blocks,
        input_norms=tuple(block.input_norm for block in parts.blocks),
        final_norm=parts.final_norm,
        unembed=model.unembed,
        weight=lambda: model.W_E,
        carriers=hooks,
        layouts={
            **dict.fromkeys(_HEADS, heads),
            **(dict.fromkeys(_AFTER_ROTARY, "kernel heads") if rotary else {}),
            "attn.scores": "scores",
            "attn.pattern": "pattern",
        },
        embedding=embedding,
        head=head,
        out_weight=lambda layer: _by_head(_wrapped(blocks[layer].attn.o), int(config.n_heads)),
        out_bias=lambda layer: getattr(_wrapped(blocks[layer].attn.o), "bias", None),
        activation=activation,
        takes_cache=supports_cache(inner),
    )


_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def _hook_points(model: Any, n_layers: int) -> dict[str, tuple[Carrier | None, ...]]:
    points: Mapping[str, nn.Module] = model.hook_dict
    found = {kind: _points(points, name, n_layers) for kind, name in _BLOCK_HOOKS.items()}
    return {**found, "embed": (Carrier(points["hook_embed"], "output"),)}


def _points(
    points: Mapping[str, nn.Module], name: str, n_layers: int
) -> tuple[Carrier | None, ...]:
    modules = [points.get(f"blocks.{layer}.{name}") for layer in range(n_layers)]
    return tuple(None if module is None else Carrier(module, "output") for module in modules)


def _reader(block: Any) -> nn.Module:
    """Return the module of a bridge's block that reads the stream between attention and MLP."""
    return block._modules.get("ln2") or block.mlp


def _wrapped(component: Any) -> Any:
    return component.original_component


def _by_head(projection: Any, n_heads: int) -> Float[Tensor, "head d d_model"] | None:
    """Return the weight of an output projection, cut into heads; None where it is packed."""
    weight = _floating(projection.weight)
    if weight is None or not isinstance(projection, nn.Linear | Conv1D):
        return None
    rows = weight.T if isinstance(projection, nn.Linear) else weight
    return rows.unflatten(0, (n_heads, -1))


def _floating(weight: Any) -> Tensor | None:
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    return weight if plain else None


def _family_name(architecture: str | None) -> str:
    """Return the family of a Hugging Face architecture, as the Hugging Face backend names it."""
    types = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    kind = types.get(architecture or "")
    if kind is None:
        return "hooked_transformer"
    family = family_of(kind)
    return f"structure:{kind}" if family is None else family.name
