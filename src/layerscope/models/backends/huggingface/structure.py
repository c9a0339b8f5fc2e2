"""From a family's row, or from the module tree alone, to the modules of one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscope.errors import ModelError
from layerscope.models.backends.huggingface.families import Family, family_of
from layerscope.models.backends.huggingface.obstacles import obstacle

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
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
    """What lies inside a block's sublayers; None where there is none of that kind.

    The names are those of `Family`.

    Attributes:
        up: is `pre` where they are fused.
        router: what chooses experts; a mixture of experts has no `pre`, `up` and `post` here.
    """

    query: Named | None
    key: Named | None
    value: Named | None
    qkv: Named | None
    pattern: Named | None
    out: Named | None
    pre: Named | None
    up: Named | None
    post: Named | None
    activation: Named | None
    router: Named | None
    experts: Named | None


@dataclass(frozen=True, eq=False)
class Block:
    """The parts of one block; `attention_out` and `mlp_out` end their branches.

    Attributes:
        attends: False where something else stands in the place of attention.
        mlp_beside: a second MLP whose output is added to that of `mlp_out`.
    """

    whole: Named
    input_norm: Named | None
    attention: Named
    attends: bool
    attention_out: Named
    mlp_norm: Named | None
    mlp: Named
    mlp_beside: Named | None
    mlp_out: Named
    inner: Inner


@dataclass(frozen=True, eq=False)
class Structure:
    """The parts of one model and the constants its configuration adds to them.

    Attributes:
        row: the row that was bound, for what it says about the insides of sublayers.
        positions: learned or fixed vectors that are added to the embedding, by position.
    """

    row: Family
    base: nn.Module
    embedding: Named
    positions: Positions | None
    embedding_norm: Named | None
    blocks: tuple[Block, ...]
    final_norm: Named
    head: Named
    parallel: bool
    embedding_scale: float
    branch_scale: float
    logit_scale: float
    softcap: float | None

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.row.name


@dataclass(frozen=True, eq=False)
class Positions:
    """Position vectors: rows of a tensor that `owner` keeps, the first of them for padding.

    Attributes:
        offset: the row of position 0.
    """

    owner: nn.Module
    attribute: str
    offset: int

    @property
    def table(self) -> Tensor:
        """[position, d_model]."""
        return getattr(self.owner, self.attribute)


def structures(model: PreTrainedModel) -> Iterator[Structure]:
    """Yield the structure a model may have: the listed one, or guesses to be verified in turn.

    Raises:
        ModelError: the model has no parts that could be those of a causal language model.
    """
    _require_causal(model)
    family = family_of(model.config.model_type)
    try:
        for guess in _guesses(model) if family is None else (family,):
            yield bind(model, guess)
    except ModelError as error:
        known = why_unreadable(model)
        if known is None:
            raise
        raise ModelError(
            f"{type(model).__name__} is not a model that layerscope can read: it {known}"
        ) from error


def why_unreadable(model: PreTrainedModel) -> str | None:
    """Return why models of this kind cannot be read, where that is known; goes on from "it"."""
    return obstacle(model.config)


def is_listed(model: PreTrainedModel) -> bool:
    """Return True when the family table describes this model."""
    return family_of(model.config.model_type) is not None and why_unreadable(model) is None


def bind(model: PreTrainedModel, family: Family) -> Structure:
    """Look up the modules and constants that a row names.

    Raises:
        ModelError: a module is missing.
    """
    config = model.config.get_text_config()
    blocks = _module(model, family.blocks, family)
    parallel = family.parallel
    if isinstance(parallel, str):
        parallel = any(getattr(config, flag, False) for flag in parallel.split("|"))
    if parallel:
        family = replace(family, mlp_norm=None)
    bound = tuple(
        _block(model, f"{family.blocks}.{name}", family) for name, _ in blocks.named_children()
    )
    return Structure(
        row=family,
        base=_module(model, family.blocks.rpartition(".")[0], family),
        embedding=Named(family.embedding, _module(model, family.embedding, family)),
        positions=_positions(model, family),
        embedding_norm=_optional(model, "", family.embedding_norm, family),
        blocks=bound,
        final_norm=Named(family.final_norm, _module(model, family.final_norm, family)),
        head=Named(family.head, _module(model, family.head, family)),
        parallel=parallel,
        embedding_scale=_embedding_scale(config, family),
        branch_scale=_constant((config, bound[0].whole.module), family.branch_scale),
        logit_scale=_constant((config,), family.logit_scale)
        / _constant((config,), family.logit_divisor),
        softcap=getattr(config, family.softcap, None) if family.softcap else None,
    )


def _block(model: nn.Module, path: str, family: Family) -> Block:
    def part(name: str) -> Named:
        return _named(model, path, name, family)

    attends = _first(model, path, family.attention) is not None
    attention = part(family.attention if attends or not family.mixer else family.mixer)
    mlp = part(family.mlp)
    beside = family.mlp_beside and _first(model, path, family.mlp_beside)
    return Block(
        whole=Named(path, _module(model, path, family)),
        input_norm=_optional(model, path, family.input_norm, family),
        attention=attention,
        attends=attends,
        attention_out=part(family.attention_out) if family.attention_out else attention,
        mlp_norm=_optional(model, path, family.mlp_norm, family),
        mlp=mlp,
        mlp_beside=part(beside) if beside and not mlp.name.endswith(f".{beside}") else None,
        mlp_out=part(family.mlp_out) if family.mlp_out else mlp,
        inner=_inner(model, path, family, attention, mlp),
    )


def _inner(model: nn.Module, path: str, family: Family, attention: Named, mlp: Named) -> Inner:
    def part(given: str | None, sublayer: Named, *usual: str) -> Named | None:
        if given is not None:
            name = _first(model, path, given)
            return None if name is None else _named(model, path, name, family)
        children = dict(sublayer.module.named_children())
        name = next((name for name in usual if name in children), None)
        return None if name is None else Named(f"{sublayer.name}.{name}", children[name])

    mixture = family.router is not None or hasattr(mlp.module, "experts")
    up = pre = post = None
    if not mixture:
        pre = part(family.pre, mlp, *_FUSED_NAMES)
        fused = family.fused or (family.pre is None and pre is not None)
        pre = pre or part(None, mlp, *_GATE_NAMES)
        up = pre if fused else part(family.up, mlp, *_UP_NAMES) if pre else None
        pre = pre or part(None, mlp, *_PRE_NAMES)
        post = part(family.post, mlp, *_POST_NAMES)
    return Inner(
        query=part(family.query, attention, "q_proj", "q_b_proj"),
        key=part(family.key, attention, "k_proj"),
        value=part(family.value, attention, "v_proj"),
        qkv=part(family.qkv, attention),
        pattern=part(family.pattern, attention),
        out=part(family.out, attention, *_OUT_NAMES),
        pre=pre,
        up=up,
        post=post,
        activation=part(family.activation, mlp, *_ACTIVATION_NAMES),
        router=part(family.router, mlp, *_ROUTER_NAMES) if mixture else None,
        experts=part(family.experts, mlp) if mixture else None,
    )


def _positions(model: nn.Module, family: Family) -> Positions | None:
    path = family.position_embedding
    if path is None:
        return None
    owner, _, attribute = path.rpartition(".")
    held: nn.Module = model.get_submodule(owner)
    if isinstance(getattr(held, attribute, None), Tensor):
        return Positions(held, attribute, 0)
    held = _module(model, path, family)
    name = "weight" if hasattr(held, "weight") else "weights"
    return Positions(held, name, int(getattr(held, "offset", 0)))


def _first(model: nn.Module, prefix: str, names: str) -> str | None:
    """Return the first of the alternatives "a|b" that exists, or None."""
    for name in names.split("|"):
        try:
            model.get_submodule(f"{prefix}.{name}" if prefix else name)
        except AttributeError:
            continue
        return name
    return None


def _named(model: nn.Module, prefix: str, names: str, family: Family) -> Named:
    name = _first(model, prefix, names) or names
    path = f"{prefix}.{name}" if prefix else name
    return Named(path, _module(model, path, family))


def _optional(model: nn.Module, prefix: str, name: str | None, family: Family) -> Named | None:
    return None if name is None else _named(model, prefix, name, family)


def _module(model: nn.Module, path: str, family: Family) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} has no module '{path}', which the family "
            f"'{family.name}' needs; this model is not one layerscope can read"
        ) from error


def _embedding_scale(config: Any, family: Family) -> float:
    name, _, condition = (family.embedding_scale or "").partition(" if ")
    if condition and not getattr(config, condition):
        return 1.0
    if name.startswith("sqrt(d_model)"):
        scale = float(config.hidden_size) ** 0.5
        # RecurrentGemma keeps it in bfloat16, whatever its own dtype.
        rounded = name.endswith(" in bfloat16")
        return float(torch.tensor(scale, dtype=torch.bfloat16)) if rounded else scale
    return _constant((config,), name)


def _constant(holders: tuple[Any, ...], name: str | None) -> float:
    values = (getattr(holder, name, None) for holder in holders if name)
    return float(next((value for value in values if value is not None), 1.0))


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
    if hasattr(children[mlp], "experts"):
        # A router of unknown ways: the rest may be as usual.
        for layout in _layouts(norms):
            yield Family(**shared, **layout, router_items=(None, None))


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
