"""From a family's row to the modules of one mlx-lm model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mlx import nn

from layerscope.errors import ModelError
from layerscope.models.backends.mlx.families import Family


@dataclass(frozen=True, eq=False)
class Named:
    """A module and its dotted name in the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Block:
    """The parts of one block; `attention_out` and `mlp_out` end their branches.

    Attributes:
        query, key, out: projections of attention; None where there is none of that kind.
        pre, up, post: projections of the MLP, see `Family`; `up` is `pre` where they are fused.
        router: gives the experts' logits; a mixture of experts has no `pre`, `up` and `post` here.
        rope: rotates queries, then keys; None without rotary positions.
        window: how many keys a query sees, itself included; None for all.
    """

    whole: Named
    input_norm: Named | None
    attention: Named
    attention_out: Named
    mlp_norm: Named | None
    mlp: Named
    mlp_out: Named
    query: Named | None
    key: Named | None
    out: Named | None
    pre: Named | None
    up: Named | None
    post: Named | None
    router: Named | None
    rope: Named | None
    window: int | None


@dataclass(frozen=True, eq=False)
class Structure:
    """The parts of one model and the constants its configuration adds to them."""

    family: Family
    embedding: Named
    position_embedding: Named | None
    blocks: tuple[Block, ...]
    final_norm: Named
    head: Named | None
    """None where the embedding unembeds."""
    parallel: bool
    embedding_scale: float
    branch_scale: float
    logit_scale: float
    softcap: float | None


def bind(model: nn.Module, family: Family, config: Any, windows: Sequence[int | None]) -> Structure:
    """Look up the modules and constants that a row names.

    Args:
        model: the model of mlx-lm.
        family: its row.
        config: its configuration, as transformers reads it.
        windows: by block, how many keys a query sees.

    Raises:
        ModelError: a module is missing.
    """
    blocks = find(model, family.blocks)
    if not isinstance(blocks, list) or len(blocks) != len(windows):
        raise ModelError(_missing(model, family.blocks, family))
    softcap = getattr(config, family.softcap, None) if family.softcap else None
    parallel = family.parallel
    head = find(model, family.head)
    return Structure(
        family=family,
        embedding=_part(model, family.embedding, family),
        position_embedding=(
            None
            if family.position_embedding is None
            else _part(model, family.position_embedding, family)
        ),
        blocks=tuple(
            _block(model, f"{family.blocks}.{index}", family, window)
            for index, window in enumerate(windows)
        ),
        final_norm=_part(model, family.final_norm, family),
        head=Named(family.head, head) if isinstance(head, nn.Module) else None,
        parallel=parallel if isinstance(parallel, bool) else bool(getattr(config, parallel)),
        embedding_scale=_embedding_scale(config, family),
        branch_scale=_constant(config, family.branch_scale),
        logit_scale=_constant(config, family.logit_scale) / _constant(config, family.logit_divisor),
        softcap=None if softcap is None else float(softcap),
    )


def linear_shape(module: Any) -> tuple[int, int]:
    """Return how many numbers a linear module or embedding gives and reads, quantised or not."""
    rows, columns = module.weight.shape[-2:]
    bits = getattr(module, "bits", None)
    return int(rows), int(columns * 32 // bits if bits else columns)


def _block(model: nn.Module, path: str, family: Family, window: int | None) -> Block:
    def part(name: str | None) -> Named | None:
        return None if name is None else _part(model, f"{path}.{name}", family)

    def within(sublayer: Named, name: str | None) -> Named | None:
        found = None if name is None else find(sublayer.module, name)
        return Named(f"{sublayer.name}.{name}", found) if isinstance(found, nn.Module) else None

    attention = _part(model, f"{path}.{family.attention}", family)
    mlp = _part(model, f"{path}.{family.mlp}", family)
    router = within(mlp, family.router)
    if router is not None and not isinstance(router.module, nn.Linear | nn.QuantizedLinear):
        router = None  # it gives more than logits
    pre = None if router else within(mlp, family.pre)
    return Block(
        whole=_part(model, path, family),
        input_norm=part(family.input_norm),
        attention=attention,
        attention_out=part(family.attention_out) or attention,
        mlp_norm=part(family.mlp_norm),
        mlp=mlp,
        mlp_out=part(family.mlp_out) or mlp,
        query=within(attention, family.query),
        key=within(attention, family.key),
        out=within(attention, family.out),
        pre=pre,
        up=pre if family.fused else None if router else within(mlp, family.up),
        post=None if router else within(mlp, family.post),
        router=router,
        rope=within(attention, "rope"),
        window=window,
    )


def _embedding_scale(config: Any, family: Family) -> float:
    if family.embedding_scale != "sqrt(d_model)":
        return _constant(config, family.embedding_scale)
    scale = torch.tensor(float(config.hidden_size) ** 0.5, dtype=torch.float64)
    return float(scale.bfloat16() if family.rounds_scale else scale)


def _constant(config: Any, name: str | None) -> float:
    value = getattr(config, name, None) if name else None
    return 1.0 if value is None else float(value)


def _part(model: nn.Module, path: str, family: Family) -> Named:
    found = find(model, path)
    if not isinstance(found, nn.Module):
        raise ModelError(_missing(model, path, family))
    return Named(path, found)


def find(module: Any, path: str) -> Any:
    """Return what a dotted path leads to, lists by index; None where it leads nowhere."""
    for name in path.split("."):
        if isinstance(module, list):
            module = module[int(name)] if name.isdigit() and int(name) < len(module) else None
        else:
            module = module.get(name) if isinstance(module, dict) else None
    return module


def _missing(model: nn.Module, path: str, family: Family) -> str:
    return (
        f"mlx-lm's {type(model).__module__.rpartition('.')[2]} has no '{path}', which the family "
        f"'{family.name}' needs; this model is not one layerscope can read"
    )
