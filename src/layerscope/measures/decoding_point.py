"""Does the reading depend on which norm decodes a row? Definitions after the layer-lens reference.

The choices are `final` (the model's final norm), `next_norm` (the input norm of the next block) and
`same_norm` (the norm before the same block's MLP); the first one given is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.agreement import list_agreement
from layerscope.measures.config import MeasureConfig

# Milestones that are decoded anew; a run of two is checked on both its rows.
TARGETS = ("L_semantic", "L_semantic_strong", "L_semantic_strong_run2", "first_rank_le_5")


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One row decoded through one norm: most likely tokens first, and the answer's rank."""

    top_ids: Sequence[int]
    p_top1: float
    answer_rank: int | None = None
    p_answer: float | None = None


def targets_of(milestones: Mapping[str, int | None]) -> list[tuple[str, int]]:
    """Return (name, row) of what should be decoded anew, given the first row of every milestone."""
    found: list[tuple[str, int]] = []
    for name in TARGETS:
        layer = milestones.get(name)
        if layer is None:
            continue
        found.append((name, layer))
        if name.endswith("_run2"):
            found.append((f"{name}+1", layer + 1))
    return found


def decoding_point(
    targets: Sequence[tuple[str, int]],
    decoded: Mapping[str, Mapping[int, Decoded]],
    *,
    arch: str | None = None,
    missing: Mapping[str, str] | None = None,
    preferred: tuple[str, int] | None = None,
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Compare the target rows under every choice with those under the first choice.

    `decoded` maps a choice to its rows; `missing` says why a choice has none (no such norm in this
    family). Two choices agree on a row when the answer is first under both or under neither. The
    gate is false when they disagree on a target, or when at the preferred target (else the first)
    fewer than half (Jaccard) of the 10 most likely tokens are shared; null when nothing was
    compared. Raises TableError without a reference.
    """
    config = config or MeasureConfig()
    if not decoded:
        raise TableError("no choice of norm was decoded; give at least the reference")
    reference, *others = decoded
    entries = [
        _compare(name, layer, reference, choice, decoded)
        for choice in others
        for name, layer in targets
    ]
    done = [entry for entry in entries if entry["status"] == "ok"]
    return {
        "status": "ok",
        "arch": arch,
        "tested": bool(done),
        "strategies": list(decoded),
        "reference": reference,
        "not_available": dict(missing or {}),
        "targets": [{"name": name, "layer": layer} for name, layer in targets],
        "per_target": entries,
        "gate": {"decoding_point_consistent": _gate(done, preferred, config)},
        "preferred_target": None
        if preferred is None
        else {"name": preferred[0], "layer": preferred[1]},
    }


def _compare(
    name: str,
    layer: int,
    reference: str,
    choice: str,
    decoded: Mapping[str, Mapping[int, Decoded]],
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "layer": layer, "choice": choice}
    one, two = decoded[choice].get(layer), decoded[reference].get(layer)
    if one is None or two is None:
        return entry | {"status": "missing_baseline_logits" if two is None else "missing_residual"}
    ranks = (one.answer_rank, two.answer_rank)
    known = ranks[0] is not None and ranks[1] is not None
    entry |= {
        "rank1_agree": (ranks[0] == 1) == (ranks[1] == 1) if known else None,
        "delta_answer_rank": ranks[0] - ranks[1]
        if ranks[0] is not None and ranks[1] is not None
        else None,
        "top1_token_agree": one.top_ids[0] == two.top_ids[0],
    }
    for label, row in ((choice, one), (reference, two)):
        entry |= {
            f"answer_rank_{label}": row.answer_rank,
            f"top1_id_{label}": row.top_ids[0],
            f"p_answer_{label}": row.p_answer,
            f"p_top1_{label}": row.p_top1,
        }
    return entry | list_agreement(two.top_ids, one.top_ids) | {"status": "ok"}


def _gate(
    done: Sequence[Mapping[str, Any]], preferred: tuple[str, int] | None, config: MeasureConfig
) -> bool | None:
    if not done:
        return None
    if any(entry["rank1_agree"] is False for entry in done):
        return False
    at = [entry for entry in done if preferred and entry["layer"] == preferred[1]] or [done[0]]
    return all(entry["jaccard@10"] >= config.decoding_jaccard for entry in at)
