"""What layerscope makes of every tiny class: its sites, its identities, or why it is refused.

docs/families.md is this survey in words, and a test holds the two together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import layerscope
from layerscope.errors import LayerscopeError
from layerscope.models import LanguageModel
from layerscope.models.identities import STATEMENTS
from layerscope.models.sites import Site
from support.tiny_configs import CANDIDATES, FAMILIES, UNLISTED
from support.tiny_models import tiny, tiny_config, tiny_tokenizer

EVERYTHING = (*FAMILIES, *UNLISTED, *CANDIDATES)

# Columns of the table: what is looked for, as kinds of sites.
COLUMNS = {
    "mid": ("resid_mid",),
    "q k v": ("attn.q", "attn.k", "attn.v"),
    "pattern": ("attn.pattern",),
    "heads": ("attn.z", "attn.out"),
    "neurons": ("mlp.pre", "mlp.post"),
    "router": ("mlp.router",),
}


_TOP = """\
# Families

What layerscope makes of the causal language models of transformers, found by loading tiny random
models of every class with the interesting options of its configuration switched on. Written by
`make docs` from the survey that the tests run, not by hand.

**{classes} classes load** ({configurations} configurations), and all their identities hold except
where a note says so. "1 of 3" counts layers. The worst error is relative, in float32; the bound is
1e-5. Family: a row of the family table, or found from the module tree.
"""
_MIDDLE = """
`mid`: the residual between attention and MLP. `q k v`: what attention reads. `pattern`: scores and
pattern. `heads`: `z` and `out`, whole and per head. `neurons`: what the MLP's activation function
reads and gives. `router`: logits of the experts. All have `embed`, `resid_pre`, `resid_post`,
`attn_in`, `attn_out`, `mlp_in`, `mlp_out`, `final_norm` and `logits`.

## Notes
"""
_REFUSED = """
## Refused

| Class | Configuration | Why |
|---|---|---|"""


@dataclass(frozen=True)
class Surveyed:
    """One tiny model: what it offers, or why it is refused.

    Attributes:
        key: its row in the tiny configurations.
        class_name: of transformers.
        family: row of the family table, or "structure:..."; empty when refused.
        sites: for each column, in how many layers there is what it names, as text.
        absent: why a column is not there in some layer, without the layer's number.
        identities: number of identities that hold.
        error: the worst error of those.
        refusal: why the model, or (beginning with the site) a part of it, is refused.
    """

    key: str
    class_name: str
    model_type: str
    family: str = ""
    sites: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    identities: int = 0
    error: float = 0.0
    refusal: str = ""


def survey(key: str) -> Surveyed:
    """Build a tiny model, load it, and write down what came of it."""
    config = tiny_config(key)
    module = tiny(key)
    name, kind = type(module).__name__, str(config.model_type)
    try:
        model = layerscope.load(module, tokenizer=tiny_tokenizer())
    except LayerscopeError as error:
        return Surveyed(key, name, kind, refusal=_plain(str(error)))
    report = model.identities
    assert report is not None
    columns = [_column(model, kinds) for kinds in COLUMNS.values()]
    return Surveyed(
        key,
        name,
        kind,
        family=model.family,
        sites=tuple(shown for shown, _ in columns),
        absent=tuple(dict.fromkeys(reason for _, reason in columns if reason)),
        identities=sum(identity.passed for identity in report.identities),
        error=max(identity.error for identity in report.identities if identity.passed),
        refusal="; ".join(
            f"{identity.name} is off by {_rough(identity.error)}" for identity in report.failures
        ),
    )


def family_table(rows: Sequence[Surveyed]) -> str:
    """Return the survey as Markdown."""
    loads = [row for row in rows if row.family]
    classes = len({row.class_name for row in loads})
    columns = [*(f"`{column}`" for column in COLUMNS), "identities", "worst error", "notes"]
    lines = [
        _TOP.format(classes=classes, configurations=len(loads)),
        f"| Class | Configuration | Family | {' | '.join(columns)} |",
        "|" + "---|" * (3 + len(columns)),
    ]
    notes: dict[str, int] = {}
    for row in sorted(loads, key=lambda row: (row.class_name.lower(), row.key)):
        reasons = [*row.absent, *([row.refusal] if row.refusal else [])]
        marks = [notes.setdefault(reason, len(notes) + 1) for reason in reasons]
        family = "found" if row.family.startswith("structure:") else f"`{row.family}`"
        cells = [row.class_name, f"`{row.key}`", family, *row.sites]
        cells += [str(row.identities), _bound(row.error), " ".join(f"[{m}](#notes)" for m in marks)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [_MIDDLE, *(f"{number}. {reason}" for reason, number in notes.items()), _REFUSED]
    refused = [row for row in rows if not row.family]
    for row in sorted(refused, key=lambda row: (row.class_name.lower(), row.key)):
        lines.append(f"| {row.class_name} | `{row.key}` | {row.refusal} |")
    return "\n".join(lines) + "\n"


def _column(model: LanguageModel, kinds: Sequence[str]) -> tuple[str, str]:
    """Return how many layers have all of `kinds`, and why the others have not."""
    reasons = [
        next(_reasons(model, [Site(kind, layer) for kind in kinds]), "")
        for layer in range(model.n_layers)
    ]
    count = reasons.count("")
    shown = "yes" if count == model.n_layers else f"{count} of {model.n_layers}" if count else "no"
    reason = next((reason for reason in reasons if reason), "")
    # Every model lacks one of the two: neurons or a router.
    ordinary = "no mixture of experts" in reason or "in its experts" in reason
    return shown, "" if ordinary else reason


def _reasons(model: LanguageModel, sites: Sequence[Site]) -> Iterator[str]:
    for site in sites:
        reason = model.backend.why_not(site)
        if reason is not None:
            yield _note(reason, site.layer)


def _plain(text: str) -> str:
    """Return a message without what differs from machine to machine or repeats the row's name."""
    text = " ".join(text.split()).replace("|", "/")
    text = re.sub(r"off by ([0-9.e+-]+)", lambda found: f"off by {_rough(float(found[1]))}", text)
    text = re.sub(r" \(\S+ \(read as \S+\) is refused: ", ": ", text)
    text = re.sub(r"\S+ \(read as \S+\) is refused: ", "", text)
    text = re.sub(r"^.*? no known layout fits it: ", "", text)
    text = re.sub(r"^\S+ is not a model that layerscope can read: ", "", text)
    text = re.sub(r" \(\S+ cannot be run: .*", "", text)
    for statement in STATEMENTS.values():
        text = text.replace(f" ({statement})", "")
    if text.count(")") > text.count("("):
        text = text.removesuffix(")")
    return text


def _note(text: str, layer: int | None) -> str:
    """Return why a site is missing, in words that many sites and families share."""
    text = re.sub(rf"(?<=\.){layer}\b", "L", text).replace(f"block {layer}", "a block")
    text = _plain(text)
    text = re.sub(r"^'[^']+' (is not available|does not exist)( in \S+)?: ", "", text)
    text = re.sub(
        r"a block has no attention but an? (\w+);.*",
        r"some blocks have a \1 instead of attention",
        text,
    )
    return re.sub(r", which shows no \w+;.*", ", which does not show these", text)


def _rough(error: float) -> str:
    """Return the order of magnitude of an error, the same on every machine."""
    if not math.isfinite(error):
        return "something that is not finite"
    return "0" if error == 0 else f"about 1e{math.floor(math.log10(error) + 0.5):+d}"


def _bound(error: float) -> str:
    return next(f"< {bound:.0e}" for bound in (1e-6, 1e-5) if error < bound)
