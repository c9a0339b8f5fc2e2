"""How far to believe a reading: ranked reasons, each with its numbers and what to do about it.

A reason is given only when this run's own numbers call for it. Rules that hold for every model
(early rows that normalisation stretches, a gate that cannot be passed) are not reasons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from layerscope.measures import guidance_diagnostics, guidance_lenses, guidance_rules
from layerscope.measures.config import MeasureConfig
from layerscope.measures.evidence import Evidence, Reason
from layerscope.measures.pass_summary import PassSummary
from layerscope.measures.table import TableMeta

RANK = {"high": 0, "medium": 1, "low": 2}

# Reasons that make probabilities (not ranks) of a reading unfit for comparison.
CALIBRATION = frozenset(
    {
        "warn_high_last_layer_kl",
        "numeric_health_caution",
        "high_lens_artifact_score",
        "norm_choice_next_norm",
        "repeatability_variance_high",
        "near_overflow",
    }
)
RANKS_ONLY = CALIBRATION | {"rank_only_near_uniform"}
NOTES = {
    "high": "Numbers of this run can be quoted as they stand.",
    "medium": "Quote layers together with the reasons below.",
    "low": "Do not quote layers of this run before the first reason is resolved.",
}


def guide(
    facts: Sequence[PassSummary],
    sections: dict[str, Any],
    config: MeasureConfig,
    *,
    meta: TableMeta,
) -> dict[str, Any]:
    """Return the measurement guidance: trust, ranked reasons, and how to report."""
    evidence = Evidence(facts=facts, sections=sections, config=config, meta=meta)
    reasons = rank(
        reason
        for rules in (guidance_rules.RULES, guidance_diagnostics.RULES, guidance_lenses.RULES)
        for rule in rules
        for reason in rule(evidence)
    )
    preferred = guidance_diagnostics.preferred_lens(sections)
    codes = {reason.code for reason in reasons}
    trust = trust_of(reasons)
    base = facts[0].fields.get("L_semantic_confirmed")
    return {
        "trust": trust,
        "reasons": [asdict(reason) for reason in reasons],
        "prefer_ranks": bool(codes & RANKS_ONLY),
        "suppress_abs_probs": bool(codes & CALIBRATION),
        "preferred_lens_for_reporting": preferred["lens"],
        "preferred_lens_reason": preferred["reason"],
        "preferred_semantics_lens_hint": preferred["hint"],
        "use_confirmed_semantics": base is not None,
        "confirmed_milestones": confirmed_milestones(facts, sections),
        "not_checked": guidance_diagnostics.not_checked(sections),
        "notes": NOTES[trust],
    }


def confirmed_milestones(
    facts: Sequence[PassSummary], sections: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return, per fact, the onset to quote: the confirmed row, by whom, and from where it stays.

    `preferred` is the most demanding milestone that was reached.
    """
    confirmed: Mapping[str, Any] = sections["confirmed_semantics"]
    entries: list[dict[str, Any]] = []
    for fact in facts:
        prompt = fact.part.prompt
        key = prompt.fact_key or f"prompt {prompt.prompt_index}"
        test: Mapping[str, Any] = confirmed.get(key) or {}
        onset = fact.milestones["L_semantic"]
        entries.append(
            {
                "fact_key": prompt.fact_key,
                "prompt_index": prompt.prompt_index,
                "L_semantic": onset.first,
                "stable": onset.stable,
                "L_semantic_confirmed": test.get("L_semantic_confirmed"),
                "confirmed_source": test.get("confirmed_source"),
                "preferred": fact.fields["preferred_milestone"],
            }
        )
    return entries


def rank(reasons: Iterable[Reason]) -> list[Reason]:
    """Sort reasons by severity, keeping the order of the rules within one; a code stands once.

    Of reasons that share a code the most severe is kept, the first of these.
    """
    kept: dict[str, Reason] = {}
    for reason in sorted(reasons, key=lambda reason: RANK[reason.severity]):
        kept.setdefault(reason.code, reason)
    return list(kept.values())


def trust_of(reasons: Sequence[Reason]) -> str:
    """Return low with any reason of high severity, medium with any of medium, else high."""
    severest = min((RANK[reason.severity] for reason in reasons), default=math.inf)
    return {0: "low", 1: "medium"}.get(int(severest) if severest < math.inf else 2, "high")
