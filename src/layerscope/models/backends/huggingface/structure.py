"""From a family's row, or from the module tree alone, to the modules of one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.families import Family, family_of

_ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
_OUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense")
_FUSED_NAMES = ("gate_up_proj",)
_GATE_NAMES = ("gate_proj", "w1")
_UP_NAMES = ("up_proj", "w3")
_PRE_NAMES = ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h")
_POST_NAMES = ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2")
_ROUTER_NAMES = ("gate", "router")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class Named:
    """A module and its dotted name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Inner:
    """The projections inside a block's sublayers; None where there is none of that kind.

    Attributes:
        query, key, out: projections of attention.
        pre, up, post: projections of the MLP, see `Family`; `up` is `pre` where they are fused.
        router: what chooses experts; a mixture of experts has no `pre`, `up` and `post` here.
        router_items: which items of its output are the logits and the chosen experts.
    """

    query: Named | None
    key: Named | None
    out: Named | None
    pre: Named | None
    up: Named | None
    post: Named | None
    router: Named | None
    router_items: tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class Block:
    """The parts of one block; `attention_out` and `mlp_out` end their branches."""

    whole: Named
    input_norm: Named | None
    attention: Named
    attention_out: Named
    mlp_norm: Named | None
    mlp: Named
    mlp_out: Named
    inner: Inner


@dataclass(frozen=True, eq=False)
class Structure:
    """The parts of one model and the constants its configuration adds to them."""

    family: str
    base: nn.Module
    embedding: Named
    position_embedding: Named | None
    blocks: tuple[Block, ...]
    final_norm: Named
    head: Named
    parallel: bool
    embedding_scale: float
    branch_scale: float
    logit_scale: float
    softcap: float | None


def structures(model: PreTrainedModel) -> Iterator[Structure]:
    """Yield the structure a model may have: the listed one, or guesses to be verified in turn.

    Raises:
        ModelError: the model has no parts that could be those of a causal language model.
    """
    _require_causal(model)
    family = family_of(model.config.model_type)
    if family is not None:
        yield bind(model, family)
        return
    for guess in _guesses(model):
        yield bind(model, guess)


def is_listed(model: PreTrainedModel) -> bool:
    """Return True when the family table describes this model."""
    return family_of(model.config.model_type) is not None


def bind(model: PreTrainedModel, family: Family) -> Structure:
    """Look up the modules and constants that a row names.

    Raises:
        ModelError: a module is missing.
    """
    config = model.config.get_text_config()
    parallel = family.parallel
    blocks = _module(model, family.blocks, family)
    return Structure(
        family=family.name,
        base=_module(model, family.blocks.rpartition(".")[0], family),
        embedding=Named(family.embedding, _module(model, family.embedding, family)),
        position_embedding=_optional(model, "", family.position_embedding, family),
        blocks=tuple(
            _block(model, f"{family.blocks}.{name}", family) for name, _ in blocks.named_children()
        ),
        final_norm=Named(family.final_norm, _module(model, family.final_norm, family)),
        head=Named(family.head, _module(model, family.head, family)),
        parallel=parallel if isinstance(parallel, bool) else bool(getattr(config, parallel)),
        embedding_scale=_embedding_scale(config, family),
        branch_scale=_constant(config, family.branch_scale),
        logit_scale=_constant(config, family.logit_scale) / _constant(config, family.logit_divisor),
        softcap=getattr(config, family.softcap, None) if family.softcap else None,
    )


def _block(model: nn.Module, path: str, family: Family) -> Block:
    def part(name: str) -> Named:
        return Named(f"{path}.{name}", _module(model, f"{path}.{name}", family))

    attention, mlp = part(family.attention), part(family.mlp)
    return Block(
        whole=Named(path, _module(model, path, family)),
        input_norm=_optional(model, path, family.input_norm, family),
        attention=attention,
        attention_out=part(family.attention_out or family.attention),
        mlp_norm=_optional(model, path, family.mlp_norm, family),
        mlp=mlp,
        mlp_out=part(family.mlp_out or family.mlp),
        inner=_inner(model, path, family, attention, mlp),
    )


def _inner(model: nn.Module, path: str, family: Family, attention: Named, mlp: Named) -> Inner:
    def part(given: str | None, sublayer: Named, usual: tuple[str, ...]) -> Named | None:
        if given is not None:
            return _optional(model, path, given, family)
        children = dict(sublayer.module.named_children())
        name = next((name for name in usual if name in children), None)
        return None if name is None else Named(f"{sublayer.name}.{name}", children[name])

    experts = family.router is not None or hasattr(mlp.module, "experts")
    up = pre = post = None
    fused = family.fused
    if not experts:
        pre = part(family.pre, mlp, _FUSED_NAMES)
        fused = fused or (family.pre is None and pre is not None)
        pre = pre or part(None, mlp, _GATE_NAMES)
        up = pre if fused else part(family.up, mlp, _UP_NAMES) if pre else None
        pre = pre or part(None, mlp, _PRE_NAMES)
        post = part(family.post, mlp, _POST_NAMES)
    return Inner(
        query=part(family.query, attention, ("q_proj",)),
        key=part(family.key, attention, ("k_proj",)),
        out=part(family.out, attention, _OUT_NAMES),
        pre=pre,
        up=up,
        post=post,
        router=part(family.router, mlp, _ROUTER_NAMES) if experts else None,
        router_items=family.router_items,
    )


def _optional(model: nn.Module, prefix: str, name: str | None, family: Family) -> Named | None:
    if name is None:
        return None
    path = f"{prefix}.{name}" if prefix else name
    return Named(path, _module(model, path, family))


def _module(model: nn.Module, path: str, family: Family) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module '{path}', which the family "
            f"'{family.name}' needs; this model is not one layerscope can read"
        ) from error


def _embedding_scale(config: Any, family: Family) -> float:
    if family.embedding_scale == "sqrt(d_model)":
        return float(config.hidden_size) ** 0.5
    return _constant(config, family.embedding_scale)


def _constant(config: Any, name: str | None) -> float:
    value = getattr(config, name, None) if name else None
    return 1.0 if value is None else float(value)


def _require_causal(model: PreTrainedModel) -> None:
    config = model.config
    kind = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{kind} is an encoder-decoder; layerscope reads decoder-only causal language models"
        )
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{kind} has no language-model head; load it as a causal language model "
            "(AutoModelForCausalLM)"
        )


def _guesses(model: PreTrainedModel) -> Iterator[Family]:
    """Yield rows for a model that no row describes, likeliest first.

    The identities tell them apart: the intermediate residual of a parallel block, say, is not where
    a sequential row looks for it.
    """
    config = model.config.get_text_config()
    names = {module: name for name, module in model.named_modules()}
    blocks = _find_blocks(model, config)
    path, block = names[blocks], next(iter(blocks.children()))
    children = dict(block.named_children())
    norms = [name for name, child in children.items() if "norm" in type(child).__name__.lower()]
    attention = next((name for name in _ATTENTION_NAMES if name in children), None)
    mlp = next((name for name in _MLP_NAMES if name in children), None)
    base = model.get_submodule(path.rpartition(".")[0])
    finals = [child for child in base.children() if "norm" in type(child).__name__.lower()]
    if attention is None or mlp is None or not finals:
        raise ModelError(
            f"{type(model).__name__} (model type '{config.model_type}') is not in the family table "
            "and its blocks have no attention, MLP and norms that layerscope recognises"
        )
    embedding = model.get_input_embeddings()
    shared: dict[str, Any] = {
        "name": f"structure:{config.model_type}",
        "model_types": (config.model_type,),
        "embedding": names[embedding],
        "blocks": path,
        "attention": attention,
        "mlp": mlp,
        "final_norm": names[finals[-1]],
        "head": names[model.get_output_embeddings()],
        # Embeddings that scale themselves do so by sqrt(d_model), like Gemma's.
        "embedding_scale": (
            "sqrt(d_model)" if hasattr(embedding, "embed_scale") else "embedding_multiplier"
        ),
        "branch_scale": "residual_multiplier",
        "logit_scale": "logit_scale",
        "logit_divisor": "logits_scaling",
        "softcap": "final_logit_softcapping",
    }
    for layout in _layouts(norms):
        yield Family(**shared, **layout)


def _find_blocks(model: PreTrainedModel, config: Any) -> nn.ModuleList:
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no list of {count} blocks; layerscope cannot find its "
            "layers"
        )
    return lists[0]


def _layouts(norms: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the ways in which blocks arrange their norms, in the order of registration."""
    if len(norms) == 4:
        yield {
            "input_norm": norms[0],
            "attention_out": norms[1],
            "mlp_norm": norms[2],
            "mlp_out": norms[3],
        }
    if len(norms) == 2:
        yield {"input_norm": norms[0], "mlp_norm": norms[1]}
        yield {
            "input_norm": None,
            "attention_out": norms[0],
            "mlp_norm": None,
            "mlp_out": norms[1],
        }
    if norms:
        yield {"input_norm": norms[0], "mlp_norm": None, "parallel": True}
