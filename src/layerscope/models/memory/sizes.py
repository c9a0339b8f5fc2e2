"""How large a model is: what memory depends on, however it was found out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["files", "configuration", "name"]

# 8x7b: not eight times seven, because attention and embeddings are shared; the share is Mixtral's
# (46.7e9 parameters in all, 12.9e9 of them active for two experts of eight).
_SHARED_OF_EXPERT = 0.191
_UNIT = {"k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = r"(\d+(?:[._]\d+)?)"
_NAMED = re.compile(rf"(?<![a-z0-9.])(?:(\d+)\s*x\s*)?{_NUMBER}\s*([kmb])(?![a-z0-9])", re.I)
_ACTIVE = re.compile(rf"(?<![a-z0-9])a{_NUMBER}\s*([kmb])(?![a-z0-9])", re.I)


@dataclass(frozen=True)
class KvLayer:
    """What one layer caches.

    Attributes:
        values: numbers per token, keys and values together.
        window: tokens kept at most; None keeps all.
    """

    values: int
    window: int | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, as far as they are known.

    Attributes:
        name: as it was asked for.
        origin: where the count comes from: the headers of its weight files (with config.json), the
            configuration alone, or only its name.
        parameters: all of them; a tied unembedding is counted once, with the embedding.
        active: those that one token passes; fewer than all only with experts.
        embedding: parameters of the token embedding.
        unembedding: parameters of the output head, which are the embedding's own if `tied`.
        experts: parameters of all routed experts together.
        n_experts: routed experts of a block.
        experts_per_token: those that a token passes.
        linear: parameters that quantisation on load would pack: matrices of linear layers, without
            the output head.
        stored: parameters by the dtype they have in the files.
        scheme: how weights are quantised in the files; None when they are not.
        packed_bytes: bytes of a quantised model as it stands in its files.
        unpacked_on: kinds of devices where a quantised model is turned back on loading.
        d_mlp: widest intermediate width that one token fills in a block.
        eager: attention that holds [batch, head, pos, pos] scores.
        kv: what each layer caches; empty when unknown.
        notes: what a reader of the figures should know.
    """

    name: str
    origin: Origin
    parameters: int
    active: int
    embedding: int | None = None
    unembedding: int | None = None
    tied: bool = False
    experts: int = 0
    n_experts: int = 0
    experts_per_token: int = 0
    linear: int | None = None
    stored: Mapping[str, int] = field(default_factory=dict[str, int])
    scheme: str | None = None
    packed_bytes: int | None = None
    unpacked_on: tuple[str, ...] = ()
    n_layers: int | None = None
    d_model: int | None = None
    d_vocab: int | None = None
    d_mlp: int | None = None
    n_heads: int | None = None
    n_ctx: int | None = None
    eager: bool = False
    kv: tuple[KvLayer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the parameters were counted, not read out of a name."""
        return self.origin != "name"


def from_name(name: str) -> Sizes | None:
    """Estimate the parameters from a model's name; None when it names no number.

    Understands ``pythia-160m``, ``Qwen2.5-0.5B``, ``Mixtral-8x7B``, ``Qwen3-30B-A3B`` and
    ``stories260K``-like names, in the last part of an id. Of several numbers the largest counts
    (``0.5B-from-2B`` is thus overestimated rather than under).
    """
    last = re.sub(
        r"([a-z]{3,})(\d+[kmb])(?![a-z0-9])", r"\1-\2", name.rsplit("/", 1)[-1], flags=re.I
    )
    best: Sizes | None = None
    for match in _NAMED.finditer(last):
        times, number, unit = match.groups()
        one = float(number.replace("_", ".")) * _UNIT[unit.lower()]
        sizes = Sizes(name, "name", round(one), round(one))
        if times is not None and int(times) > 1:
            shared, count = one * _SHARED_OF_EXPERT, int(times)
            total = round(shared + count * (one - shared))
            sizes = Sizes(
                name, "name", total, round(shared + 2 * (one - shared)), n_experts=count,
                experts=round(count * (one - shared)), experts_per_token=2,
            )  # fmt: skip
        if best is None or sizes.parameters > best.parameters:
            best = sizes
    active = _ACTIVE.search(last)
    if best is None or active is None:
        return best
    count = round(float(active[1].replace("_", ".")) * _UNIT[active[2].lower()])
    return Sizes(name, "name", best.parameters, min(count, best.parameters))
