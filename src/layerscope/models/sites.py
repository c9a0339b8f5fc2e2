"""Where in a model one can read or write: one grammar, parsed once.

Sites of the whole model: ``embed``, ``final_norm``, ``logits``. Sites of layer l (blocks count from
0): ``resid_pre.l``, ``resid_mid.l``, ``resid_post.l``, ``attn_in.l``, ``attn_out.l``, ``mlp_in.l``,
``mlp_out.l``. Inside the sublayers: ``attn.l.q|k|v|scores|pattern|z``, ``mlp.l.pre|post``, and per
query head ``attn.l.head.h.q|k|v|pattern|z|out``. ``*_in`` is what the sublayer's module reads,
``*_out`` what it adds to the residual stream.

A pattern may use ``*`` and ``?`` in a name, ``*`` or a half-open range ``2:5`` for layers and
heads, and negative numbers, which count from the end: ``resid_post.*``, ``resid_*.3``,
``mlp_out.-2:``. TransformerLens names (``blocks.3.hook_resid_post``) are understood too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.scores",
    "attn.pattern",
    "attn.z",
    "mlp.pre",
    "mlp.post",
)
HEAD_KINDS = ("attn.q", "attn.k", "attn.v", "attn.pattern", "attn.z", "attn.out")

_TEMPLATES = (
    *GLOBAL_KINDS,
    *(f"{kind}.0" for kind in LAYER_KINDS),
    *(kind.replace(".", ".0.") for kind in INNER_KINDS),
    *(kind.replace(".", ".0.head.0.") for kind in HEAD_KINDS),
)

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
    # TransformerLens' hook_q and hook_k lie before the rotary embedding, ours after it.
    "attn.hook_rot_q": "attn.{}.q",
    "attn.hook_rot_k": "attn.{}.k",
    "attn.hook_v": "attn.{}.v",
    "attn.hook_attn_scores": "attn.{}.scores",
    "attn.hook_pattern": "attn.{}.pattern",
    "attn.hook_z": "attn.{}.z",
    "mlp.hook_pre": "mlp.{}.pre",
    "mlp.hook_post": "mlp.{}.post",
}


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model.

    Attributes:
        kind: ``"resid_post"``, ``"attn.z"``, ...: the name without its numbers.
        layer: block, counted from 0 (negative: from the last; see `resolve`), or None.
        head: query head of a per-head site, or None.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        """Return the name; `Site.parse` reads it back."""
        if self.layer is None:
            return self.kind
        group, _, leaf = self.kind.partition(".")
        if not leaf:
            return f"{group}.{self.layer}"
        head = "" if self.head is None else f"head.{self.head}."
        return f"{group}.{self.layer}.{head}{leaf}"

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """Read the name of one site.

        Raises:
            SiteError: the name is unknown, or is a pattern of several sites.
        """
        if isinstance(name, Site):
            return name
        pattern = _parse(name)
        layer, head = pattern.layer, pattern.head
        kind, *others = pattern.kinds
        if others or isinstance(layer, slice) or isinstance(head, slice):
            raise SiteError(f"'{name}' names several sites; give exactly one here")
        return cls(kind, layer, head)

    def resolve(self, n_layers: int, n_heads: int | None = None) -> Site:
        """Return the site with its layer and head counted from 0.

        Raises:
            SiteError: the model has no such layer or head.
        """
        layer = None if self.layer is None else _index(self.layer, n_layers, "layer", str(self))
        head = self.head
        if head is not None and n_heads is not None:
            head = _index(head, n_heads, "head", str(self))
        return replace(self, layer=layer, head=head)


def expand(
    names: str | Site | Iterable[str | Site],
    *,
    n_layers: int,
    n_heads: int,
    available: Sequence[Site] | None = None,
) -> tuple[Site, ...]:
    """Return the sites that names and patterns stand for, each once, in the order asked.

    A pattern of several kinds (``resid_*``) stands for those in `available`; a site named outright
    is returned whether available or not, so that the caller can say why it is missing.

    Raises:
        SiteError: a name is unknown, or its layer or head does not exist.
    """
    wanted: dict[Site, None] = {}
    for name in [names] if isinstance(names, str | Site) else names:
        pattern = _parse(str(name))
        sites = [
            Site(kind, layer, head)
            for kind in pattern.kinds
            for layer in _indices(pattern.layer, n_layers, "layer", str(name))
            for head in _indices(pattern.head, n_heads, "head", str(name))
        ]
        if len(pattern.kinds) > 1 and available is not None:
            known = set(available)
            sites = [site for site in sites if site in known] or sites
        wanted.update(dict.fromkeys(sites))
    return tuple(wanted)


@dataclass(frozen=True)
class _Pattern:
    """A parsed name: its kinds and, for each number, one index, a slice, or None."""

    kinds: tuple[str, ...]
    layer: int | slice | None = None
    head: int | slice | None = None


def _parse(name: str) -> _Pattern:
    text = _from_transformer_lens(name.strip())
    parts = text.split(".")
    numbers: tuple[str, ...] = ()
    if len(parts) == 1:
        kinds = _matching(text, GLOBAL_KINDS)
    elif len(parts) == 2:
        kinds, numbers = _matching(parts[0], LAYER_KINDS), (parts[1],)
    elif len(parts) == 3:
        kinds, numbers = _matching(f"{parts[0]}.{parts[2]}", INNER_KINDS), (parts[1],)
    elif len(parts) == 5 and parts[2] == "head":
        kinds, numbers = _matching(f"{parts[0]}.{parts[4]}", HEAD_KINDS), (parts[1], parts[3])
    else:
        kinds = ()
    indices = [_number(number) for number in numbers]
    if not kinds or None in indices:
        raise SiteError(_unknown(name, text))
    return _Pattern(kinds, *indices)


def _from_transformer_lens(text: str) -> str:
    if text in _TRANSFORMER_LENS_GLOBAL:
        return _TRANSFORMER_LENS_GLOBAL[text]
    match = re.fullmatch(r"blocks\.([^.]+)\.(.+)", text)
    if match and match[2] in _TRANSFORMER_LENS_LAYER:
        return _TRANSFORMER_LENS_LAYER[match[2]].format(match[1])
    return text


def _matching(pattern: str, kinds: tuple[str, ...]) -> tuple[str, ...]:
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
