"""Where in a model one can read or write: one grammar, parsed once.

Sites of the whole model: ``embed``, ``final_norm``, ``logits``. Sites of layer l (blocks count from
0): ``resid_pre.l``, ``resid_mid.l``, ``resid_post.l``, ``attn_in.l``, ``attn_out.l``, ``mlp_in.l``,
``mlp_out.l``. ``*_in`` is what the sublayer's module reads, ``*_out`` what it adds to the residual
stream.

Inside attention: ``attn.l.q_pre|k_pre`` (what the projections give, bias included),
``attn.l.q|k|v`` (what the attention kernel reads: after q/k norms and the rotary embedding),
``attn.l.scores|pattern`` (before and after the softmax), ``attn.l.z`` (what the output projection
reads) and ``attn.l.out`` (what it gives). Per query head the same under ``attn.l.head.h``, without
``q_pre`` and ``k_pre``; where several query heads share keys and values, ``attn.l.kv_head.g.k|v``.

Inside the MLP: ``mlp.l.pre`` (what the activation function reads; the gate of a gated MLP, also
written ``mlp.l.gate``), ``mlp.l.up`` (the other factor of a gated MLP), ``mlp.l.post`` (the
neurons: what the down projection reads). In a mixture of experts: ``mlp.l.router`` (their logits)
and ``mlp.l.experts`` (the numbers of those chosen).

A pattern may use ``*`` and ``?`` in a name, ``*`` or a half-open range ``2:5`` for layers and
heads, and negative numbers, which count from the end: ``resid_post.*``, ``resid_*.3``,
``mlp_out.-2:``. TransformerLens names (``blocks.3.hook_resid_post``) are understood too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from layerscope.errors import SiteError, nearest

GLOBAL_KINDS = ("embed", "final_norm", "logits")
LAYER_KINDS = (
    "resid_pre",
    "attn_in",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_out",
    "resid_post",
)
INNER_KINDS = (
    "attn.q_pre",
    "attn.k_pre",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "attn.out",
    "mlp.router",
    "mlp.experts",
    "mlp.pre",
    "mlp.up",
    "mlp.post",
)
HEAD_KINDS = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "attn.out",
)
KV_HEAD_KINDS = ("attn.k", "attn.v")

_TEMPLATES = (
    *GLOBAL_KINDS,
    *(f"{kind}.0" for kind in LAYER_KINDS),
    *(kind.replace(".", ".0.") for kind in INNER_KINDS),
    *(kind.replace(".", ".0.head.0.") for kind in HEAD_KINDS),
    *(kind.replace(".", ".0.kv_head.0.") for kind in KV_HEAD_KINDS),
)

# Other words for a leaf of an inner site.
_SYNONYMS = {"mlp.gate": "mlp.pre"}

_TRANSFORMER_LENS_GLOBAL = {
    "hook_embed": "embed",
    "ln_final": "final_norm",
    "ln_final.hook_normalized": "final_norm",
}
_TRANSFORMER_LENS_LAYER = {
    "hook_resid_pre": "resid_pre.{}",
    "hook_resid_mid": "resid_mid.{}",
    "hook_resid_post": "resid_post.{}",
    "hook_attn_out": "attn_out.{}",
    "hook_mlp_out": "mlp_out.{}",
    "ln1.hook_normalized": "attn_in.{}",
    "ln2.hook_normalized": "mlp_in.{}",
    # TransformerLens' hook_q and hook_k lie before the rotary embedding.
    "attn.hook_q": "attn.{}.q_pre",
    "attn.hook_k": "attn.{}.k_pre",
    "attn.hook_rot_q": "attn.{}.q",
    "attn.hook_rot_k": "attn.{}.k",
    "attn.hook_v": "attn.{}.v",
    "attn.hook_attn_scores": "attn.{}.scores",
    "attn.hook_pattern": "attn.{}.pattern",
    "attn.hook_z": "attn.{}.z",
    "mlp.hook_pre": "mlp.{}.pre",
    "mlp.hook_pre_linear": "mlp.{}.up",
    "mlp.hook_post": "mlp.{}.post",
}


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model.

    Attributes:
        kind: ``"resid_post"``, ``"attn.z"``, ...: the name without its numbers.
        layer: block, counted from 0 (negative: from the last; see `resolve`), or None.
        head: query head of a per-head site, or None.
        kv_head: key-value head of a site of one key-value head, or None.
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    kv_head: int | None = None

    def __str__(self) -> str:
        """Return the name; `Site.parse` reads it back."""
        if self.layer is None:
            return self.kind
        group, _, leaf = self.kind.partition(".")
        if not leaf:
            return f"{group}.{self.layer}"
        head = "" if self.head is None else f"head.{self.head}."
        if self.kv_head is not None:
            head = f"kv_head.{self.kv_head}."
        return f"{group}.{self.layer}.{head}{leaf}"

    @property
    def pos_axis(self) -> int:
        """Axis of the token positions in a value of this site.

        1, except that ``scores`` and ``pattern`` of a layer are [batch, head, query pos, key pos].
        """
        return 2 if self.kind in ("attn.scores", "attn.pattern") and self.head is None else 1

    @property
    def whole(self) -> Site:
        """The site of all heads that a per-head site is part of; itself otherwise."""
        return replace(self, head=None, kv_head=None)

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read the name of one site.

        Raises:
            SiteError: the name is unknown, or is a pattern of several sites.
        """
        if isinstance(name, Site):
            return name
        pattern = _parse(name)
        layer, head, kv_head = pattern.layer, pattern.head, pattern.kv_head
        kind, *others = pattern.kinds
        numbers = (layer, head, kv_head)
        if others or any(isinstance(number, slice) for number in numbers):
            raise SiteError(f"'{name}' names several sites; give exactly one here")
        return cls(kind, *(number for number in numbers if not isinstance(number, slice)))

    def resolve(
        self, n_layers: int, n_heads: int | None = None, n_kv_heads: int | None = None
    ) -> Site:
        """Return the site with its layer and heads counted from 0.

        Raises:
            SiteError: the model has no such layer or head.
        """
        layer = None if self.layer is None else _index(self.layer, n_layers, "layer", str(self))
        head = self.head
        if head is not None and n_heads is not None:
            head = _index(head, n_heads, "head", str(self))
        kv_head = self.kv_head
        if kv_head is not None and n_kv_heads is not None:
            kv_head = _index(kv_head, n_kv_heads, "kv_head", str(self))
        return replace(self, layer=layer, head=head, kv_head=kv_head)


def expand(
    names: str | Site | Iterable[str | Site],
    *,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    available: Callable[[Site], bool] | None = None,
) -> tuple[Site, ...]:
    """Return the sites that names and patterns stand for, each once, in the order asked.

    A pattern of several kinds or layers (``resid_*``, ``attn.*.pattern``) stands for those that are
    `available`, if any is; a site named outright is returned whether available or not, so that the
    caller can say why it is missing.

    Raises:
        SiteError: a name is unknown, or its layer or head does not exist.
    """
    wanted: dict[Site, None] = {}
    for name in [names] if isinstance(names, str | Site) else names:
        pattern = _parse(str(name))
        sites = [
            Site(kind, layer, head, kv_head)
            for kind in pattern.kinds
            for layer in _indices(pattern.layer, n_layers, "layer", str(name))
            for head in _indices(pattern.head, n_heads, "head", str(name))
            for kv_head in _indices(pattern.kv_head, n_kv_heads or n_heads, "kv_head", str(name))
        ]
        several = len(pattern.kinds) > 1 or isinstance(pattern.layer, slice)
        if several and available is not None:
            sites = [site for site in sites if available(site)] or sites
        wanted.update(dict.fromkeys(sites))
    return tuple(wanted)


@dataclass(frozen=True)
class _Pattern:
    """A parsed name: its kinds and, for each number, one index, a slice, or None."""

    kinds: tuple[str, ...]
    layer: int | slice | None = None
    head: int | slice | None = None
    kv_head: int | slice | None = None


def _parse(name: str) -> _Pattern:
    text = _from_transformer_lens(name.strip())
    parts = text.split(".")
    numbers: dict[str, str] = {}
    kinds: tuple[str, ...] = ()
    if len(parts) == 1:
        kinds = _matching(text, GLOBAL_KINDS)
    elif len(parts) == 2:
        kinds, numbers = _matching(parts[0], LAYER_KINDS), {"layer": parts[1]}
    elif len(parts) == 3:
        kinds, numbers = _matching(f"{parts[0]}.{parts[2]}", INNER_KINDS), {"layer": parts[1]}
    elif len(parts) == 5 and parts[2] in ("head", "kv_head"):
        known = HEAD_KINDS if parts[2] == "head" else KV_HEAD_KINDS
        kinds = _matching(f"{parts[0]}.{parts[4]}", known)
        numbers = {"layer": parts[1], parts[2]: parts[3]}
    indices = {what: _number(number) for what, number in numbers.items()}
    if not kinds or None in indices.values():
        raise SiteError(_unknown(name, text))
    return _Pattern(kinds, **indices)


def _from_transformer_lens(text: str) -> str:
    if text in _TRANSFORMER_LENS_GLOBAL:
        return _TRANSFORMER_LENS_GLOBAL[text]
    match = re.fullmatch(r"blocks\.([^.]+)\.(.+)", text)
    if match and match[2] in _TRANSFORMER_LENS_LAYER:
        return _TRANSFORMER_LENS_LAYER[match[2]].format(match[1])
    return text


def _matching(pattern: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
    pattern = _SYNONYMS.get(pattern, pattern)
    return tuple(kind for kind in kinds if fnmatchcase(kind, pattern))


def _number(text: str) -> int | slice | None:
    """Read ``3``, ``-1``, ``*`` or ``2:5``; None when it is none of these."""
    if text == "*":
        return slice(None)
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    match = re.fullmatch(r"(-?\d*):(-?\d*)", text)
    if not match or "-" in match.groups():
        return None
    return slice(*(int(bound) if bound else None for bound in match.groups()))


def _unknown(name: str, text: str) -> str:
    if text in LAYER_KINDS:
        return f"site '{name}' needs a layer: {text}.0 for the first block, {text}.* for all"
    if text.startswith("blocks."):
        layer = text.split(".")[1]
        known = [f"blocks.{layer}.{leaf}" for leaf in _TRANSFORMER_LENS_LAYER]
        return f"unknown site '{name}'{nearest(text, known)}"
    # Compare with templates at layer 0, and answer with the layer that was asked for.
    number = re.search(r"\.(-?\d+|\*)", text)
    template = re.sub(r"\.(-?\d+|\*)", ".0", text)
    known = [
        t.replace(".0", f".{number[1]}", 1) if number else t.replace(".0", ".<layer>", 1)
        for t in _TEMPLATES
    ]
    by_template = dict(zip(_TEMPLATES, known, strict=True))
    hint = nearest(template, _TEMPLATES)
    for plain, shown in by_template.items():
        hint = hint.replace(f"'{plain}'", f"'{shown}'")
    return f"unknown site '{name}'{hint or '; see LanguageModel.sites() for all of them'}"


def _indices(
    number: int | slice | None, length: int, what: str, name: str
) -> Iterable[int] | tuple[None]:
    if number is None:
        return (None,)
    if isinstance(number, int):
        return (_index(number, length, what, name),)
    chosen = range(length)[number]
    if not chosen:
        raise SiteError(f"'{name}' names no {what}: this model has {what}s 0 to {length - 1}")
    return chosen


def _index(number: int, length: int, what: str, name: str) -> int:
    if not -length <= number < length:
        raise SiteError(
            f"{what} {number} of '{name}' does not exist: this model has {what}s 0 to "
            f"{length - 1} (or {-length} to -1 from the end)"
        )
    return number % length
