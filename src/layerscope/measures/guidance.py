"""How far to believe a reading: ranked reasons, each with its numbers and what to do about it.

A reason is given only when this run's own numbers call for it. Rules that hold for every model
(early rows that normalisation stretches, a gate that cannot be passed) are not reasons.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from layerscope.measures.config import MeasureConfig
from layerscope.measures.evidence import Evidence, Reason
from layerscope.measures.guidance_rules import RULES
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
    reasons = rank([reason for rule in RULES for reason in rule(evidence)])
    codes = {reason.code for reason in reasons}
    trust = trust_of(reasons)
    base = facts[0].fields.get("L_semantic_confirmed")
    return {
        "trust": trust,
        "reasons": [asdict(reason) for reason in reasons],
        "prefer_ranks": bool(codes & RANKS_ONLY),
        "suppress_abs_probs": bool(codes & CALIBRATION),
        "preferred_lens_for_reporting": sections["primary_lens"],
        "use_confirmed_semantics": base is not None,
        "notes": NOTES[trust],
    }


def rank(reasons: Iterable[Reason]) -> list[Reason]:
    """Sort reasons by severity, keeping the order of the rules within one."""
    return sorted(reasons, key=lambda reason: RANK[reason.severity])


def trust_of(reasons: Sequence[Reason]) -> str:
    """Return low with any reason of high severity, medium with any of medium, else high."""
    severest = min((RANK[reason.severity] for reason in reasons), default=math.inf)
    return {0: "low", 1: "medium"}.get(int(severest) if severest < math.inf else 2, "high")
