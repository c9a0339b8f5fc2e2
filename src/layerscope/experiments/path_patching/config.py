"""What a path patching run does: who speaks, who listens, and how much it may take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from layerscope.errors import ConfigError, LayerscopeError, SiteError
from layerscope.experiments.patching.gather import AnsweredBy
from layerscope.interventions.patching import DEFAULT_BUDGET, Direction, metric_of, site_of
from layerscope.interventions.patching.paths import Input, Receiver, Sender, senders_of
from layerscope.models import LanguageModel, Site
from layerscope.products import Products

SENDERS = "embed, 3.5 (a head), attn.3, mlp.3, heads, attns, mlps, all"
RECEIVERS = (
    "logits, 3.5.q (a head's queries; also k, v), 3.q (of all heads), attn.3, mlp.3, q, k, v, "
    "attns, mlps, all"
)
_SITES: dict[Input, str] = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "attn": "attn_out"}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Settings of a path patching run.

    Attributes:
        senders: what writes to the stream, by name: see `senders_named`.
        receivers: what reads it: see `receivers_named`.
        positions: the sender's change at "all" positions, at the "last", or at "each" by itself.
        metrics: names of `METRICS`; the first is the one that is ranked and drawn.
        direction: "denoise" lets the clean run speak in the corrupt one, "noise" the other way
            about.
        answered, keep_wrong: as in patching.
        verify: edges of a pair that are computed a second time, by two full passes each.
        control: also measure the strongest edges with another pair's values.
        budget_bytes: what a batch of edges may take.
        max_seconds, max_bytes: refuse a run that is predicted to take more.
    """

    senders: tuple[str, ...] = ("all",)
    receivers: tuple[str, ...] = ("logits",)
    positions: Literal["all", "last", "each"] = "all"
    metrics: tuple[str, ...] = ("logit_diff",)
    direction: Direction = "denoise"
    answered: AnsweredBy = "foil"
    keep_wrong: bool = False
    verify: int = 1
    control: bool = True
    products: Products = "default"
    budget_bytes: int = DEFAULT_BUDGET
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.senders or not self.receivers or not self.metrics:
            raise ConfigError("a path needs at least one sender, one receiver and one metric")
        for name in self.metrics:
            metric_of(name)
        if self.positions not in ("all", "last", "each"):
            raise ConfigError(f"positions={self.positions!r}; use 'all', 'last' or 'each'")
        if self.direction not in ("denoise", "noise"):
            raise ConfigError(f"direction={self.direction!r}; use 'denoise' or 'noise'")
        if self.answered not in ("foil", "top1"):
            raise ConfigError(f"answered={self.answered!r}; use 'foil' or 'top1'")
        if self.verify < 0 or self.budget_bytes <= 0:
            raise ConfigError("verify must not be negative, and budget_bytes must be positive")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


def senders_named(model: LanguageModel, names: Sequence[str]) -> list[Sender]:
    """Return senders by name: ``embed``, ``3.5`` (layer.head), ``attn.3``, ``mlp.3``, or groups.

    Groups are ``heads``, ``attns``, ``mlps``, and ``all``: the embedding, every head, every MLP.

    Raises:
        SiteError: a name is not understood, or beyond the model. CapabilityError: the model does
            not have it; says why.
    """
    every = senders_of(model)
    groups = {
        "all": every,
        "heads": [one for one in every if one.part == "head"],
        "mlps": [one for one in every if one.part == "mlp"],
        "attns": [Sender("attn", layer) for layer in range(model.n_layers)],
        "embed": [Sender("embed")],
    }

    def one(name: str) -> list[Sender]:
        found = re.fullmatch(r"(attn|mlp)\.(\d+)", name)
        if found:
            layer = _layer(model, found[2], name)
            return [Sender("attn" if found[1] == "attn" else "mlp", layer)]
        found = re.fullmatch(r"(\d+)\.(\d+)", name)
        if not found:
            raise SiteError(f"unknown sender '{name}'; use {SENDERS}")
        layer = _layer(model, found[1], name)
        site_of(model, Site("attn.z", layer))
        return [Sender("head", layer, _head(model.n_heads, found[2], name))]

    return _all_named(names, groups, one)


def receivers_named(model: LanguageModel, names: Sequence[str]) -> list[Receiver]:
    """Return receivers by name: ``logits``, ``3.5.q`` (layer.head), ``3.q`` (all heads), ``mlp.3``.

    Also ``attn.3``, and groups: ``q``, ``k``, ``v`` (every head's; keys and values by key-value
    head), ``attns``, ``mlps``, and ``all``: the logits, every q, k and v, every MLP.

    Raises:
        SiteError: a name is not understood, or beyond the model. CapabilityError: the model does
            not have it; says why.
    """
    groups: dict[str, list[Receiver]] = {
        "logits": [Receiver("logits")],
        "mlps": [Receiver("mlp", layer) for layer in range(model.n_layers)],
        "attns": [Receiver("attn", layer) for layer in range(model.n_layers)],
    }
    for kind in ("q", "k", "v"):
        groups[kind] = _of_heads(model, kind)
    groups["all"] = [*groups["logits"], *groups["q"], *groups["k"], *groups["v"], *groups["mlps"]]

    def one(name: str) -> list[Receiver]:
        found = re.fullmatch(r"(attn|mlp)\.(\d+)", name) or re.fullmatch(r"(\d+)\.(attn|mlp)", name)
        if found:
            number, part = (found[2], found[1]) if found[2].isdigit() else (found[1], found[2])
            return [Receiver("attn" if part == "attn" else "mlp", _layer(model, number, name))]
        found = re.fullmatch(r"(\d+)(?:\.(\d+))?\.([qkv])", name)
        if not found:
            raise SiteError(f"unknown receiver '{name}'; use {RECEIVERS}")
        layer = _layer(model, found[1], name)
        kind: Input = "q" if found[3] == "q" else "k" if found[3] == "k" else "v"
        site_of(model, Site(_SITES[kind], layer))
        count = model.n_heads if kind == "q" else model.n_kv_heads
        head = None if found[2] is None else _head(count, found[2], name)
        return [Receiver(kind, layer, head)]

    found = _all_named(names, groups, one)
    for kind in ("q", "k", "v"):  # a group that the model has nowhere says why
        if kind in names and not groups[kind]:
            site_of(model, Site(_SITES[kind], 0))
    return found


def _of_heads(model: LanguageModel, kind: Input) -> list[Receiver]:
    count = model.n_heads if kind == "q" else model.n_kv_heads
    found: list[Receiver] = []
    for layer in range(model.n_layers):
        try:
            site_of(model, Site(_SITES[kind], layer))
        except LayerscopeError:
            continue  # a block without attention, or one that does not show it
        found += [Receiver(kind, layer, head) for head in range(count)]
    return found


def _all_named(
    names: Sequence[str], groups: dict[str, list[T]], one: Callable[[str], list[T]]
) -> list[T]:
    found: dict[T, None] = {}
    for name in names:
        found.update(dict.fromkeys(groups[name] if name in groups else one(name)))
    return list(found)


def _layer(model: LanguageModel, text: str, name: str) -> int:
    if int(text) >= model.n_layers:
        raise SiteError(f"'{name}': the model has layers 0 to {model.n_layers - 1}")
    return int(text)


def _head(count: int, text: str, name: str) -> int:
    if int(text) >= count:
        raise SiteError(f"'{name}': a layer has heads 0 to {count - 1} there")
    return int(text)
