"""Reasons from the other lenses of a run: how they were fitted, and how far they lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerscope.measures.detectors import percentile_row
from layerscope.measures.distribution import DEPTHS
from layerscope.measures.evidence import Evidence, Reason

SHOWN = 4  # warnings quoted in the evidence of one reason
NORM, HALF = "norm", "p50"
LEAST = 0.1  # bits: less is gained or lost by chance


def fits(evidence: Evidence) -> Iterator[Reason]:
    """A fitted lens that carries warnings of its fit."""
    warned: Mapping[str, Sequence[str]] = _comparison(evidence).get("warnings") or {}
    if warned:
        lens, lines = next(iter(warned.items()))
        yield Reason(
            "lens_fit_warns",
            "low",
            f"The fit of {_lenses(list(warned))} came with a warning; {lens}: {_plain(lines[0])}",
            {"warnings": {name: list(entry)[:SHOWN] for name, entry in warned.items()}},
            "Fit again on more text, or leave that lens out of conclusions.",
        )


def lenses_apart(evidence: Evidence) -> Iterator[Reason]:
    """The lenses put the onset far from one another."""
    spread: Mapping[str, Any] | None = _comparison(evidence).get("onset_spread")
    limit = 0.25 * evidence.meta.n_layers
    if spread is not None and spread["median"] is not None and spread["median"] > limit:
        yield Reason(
            "onset_depends_on_lens",
            "low",
            f"Lenses first have the answer on top {spread['median']:g} layers apart (median over "
            f"{spread['facts']} facts).",
            {**spread, "limit": limit, "lenses": evidence.sections.get("lenses")},
            "Name the lens with the layer, or give the range over lenses.",
        )


def other_text(evidence: Evidence) -> Iterator[Reason]:
    """A lens gains on the text held out by its fit, and loses on the prompts of the run.

    Gains are KL(model || norm lens) - KL(model || lens), at half the depth; both must exceed 0.1
    bits. It weighs more where such a lens alone confirms an onset.
    """
    bits: Mapping[str, Any] = _comparison(evidence).get("kl_from_final_bits") or {}
    row = percentile_row(evidence.meta.n_layers, DEPTHS[HALF])
    gains: dict[str, dict[str, float]] = {}
    for name, facts in evidence.meta.lenses.items():
        held_out: Mapping[str, Any] = facts.get("held_out") or {}
        table: Mapping[str, Sequence[float]] = held_out.get("kl_bits") or {}
        here = _less(bits.get(NORM, {}).get(HALF), bits.get(name, {}).get(HALF))
        if here is None or row >= min(len(table.get(lens, ())) for lens in (NORM, name)):
            continue
        there = table[NORM][row] - table[name][row]
        if there > LEAST and here < -LEAST:
            gains[name] = {"on_its_text": there, "on_these_prompts": here}
    if not gains:
        return
    confirmed: Mapping[str, Any] = evidence.sections["confirmed_semantics"]
    alone = {entry["confirmed_source"] for entry in confirmed.values()} & set(gains)
    worst = min(gains, key=lambda name: gains[name]["on_these_prompts"])
    yield Reason(
        "lens_fitted_on_other_text",
        "medium" if alone else "low",
        f"{_lenses(list(gains)).capitalize()} came nearer to the model than the norm lens on the "
        f"text of the fit ({worst}: by {gains[worst]['on_its_text']:.2f} bits at half the depth), "
        f"and further from it on these prompts (by {-gains[worst]['on_these_prompts']:.2f}).",
        {"bits_gained": gains, "row": row},
        "Do not read these prompts with it; fit it on text like them.",
    )


RULES = (fits, other_text, lenses_apart)


def _comparison(evidence: Evidence) -> Mapping[str, Any]:
    return evidence.sections.get("lens_comparison") or {}


def _lenses(names: Sequence[str]) -> str:
    return f"the {names[0]} lens" if len(names) == 1 else f"{len(names)} lenses"


def _plain(line: str) -> str:
    return line if line.endswith(".") else f"{line}."


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two
