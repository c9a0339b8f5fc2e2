"""Do two lenses rank the same tokens at the rows that matter? (Layer-lens reference, 2.11.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.agreement import list_agreement
from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import median

# Milestones at which lenses are compared; the onset family among them decides the flag.
TARGETS = (
    "first_rank_le_10",
    "first_rank_le_5",
    "L_semantic",
    "L_semantic_strong",
    "L_semantic_strong_run2",
    "L_semantic_confirmed",
)


@dataclass(frozen=True, kw_only=True)
class LensRow:
    """The most likely tokens of one row under a reference lens and under another.

    `ranks` holds the rank that the other lens gives to each of `reference`, if it is known.
    """

    reference: Sequence[int]
    other: Sequence[int]
    ranks: Sequence[float] | None = None


def lens_consistency(
    targets: Mapping[str, int | None],
    rows: Mapping[str, Mapping[int, LensRow]],
    *,
    reference: str = "norm",
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return overlap and rank correlation of the top lists at every milestone, per other lens.

    `targets` maps milestones to rows; `rows` maps another lens to the rows compared with it. At a
    milestone of the onset family, Jaccard@10 or Spearman below 0.30 raises `low_at_semantic`.
    Raises TableError when no lens was compared.
    """
    config = config or MeasureConfig()
    if not rows:
        raise TableError("no other lens was compared; give the rows of at least one")
    reached = {name: layer for name, layer in targets.items() if layer is not None}
    section: dict[str, Any] = {"status": "ok", "targets": list(reached)}
    low: list[dict[str, Any]] = []
    for lens, found in rows.items():
        entries: list[dict[str, Any]] = [
            {
                "name": name,
                "layer": layer,
                **list_agreement(
                    found[layer].reference, found[layer].other, ranks_in_second=found[layer].ranks
                ),
            }
            for name, layer in reached.items()
            if layer in found
        ]
        low += [{"lens": lens, **entry} for entry in entries if _is_low(entry, config)]
        names = [name for name in (entries[0] if entries else {}) if name not in ("name", "layer")]
        section[f"{reference}_vs_{lens}"] = {
            "at_targets": entries,
            "p50": {name: median([entry[name] for entry in entries]) for name in names},
        }
    return section | {"low_at_semantic": bool(low), "low": low}


def _is_low(entry: Mapping[str, Any], config: MeasureConfig) -> bool:
    if not entry["name"].startswith("L_semantic"):
        return False
    values = (entry["jaccard@10"], entry["spearman_top50"])
    return any(value is not None and value < config.consistency_min for value in values)
