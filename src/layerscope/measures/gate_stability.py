"""Do the onset's gates hold when all logits are scaled a little? (Layer-lens reference, 2.10.)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig


@dataclass(frozen=True)
class ScaledRow:
    """One row: the answer's probability under each scale, and its lead over all others in logits.

    The lead z[answer] - max of the others is negative when another token is first.
    """

    p_answer: tuple[float, ...]
    lead: float


def scaled_row(
    logits: Float[np.ndarray, " vocab"], answer: int, scales: Sequence[float]
) -> ScaledRow:
    """Measure one row of logits; raises TableError when the answer lies outside the vocabulary."""
    if not 0 <= answer < logits.size:
        raise TableError(f"the answer's id {answer} is outside the {logits.size} logits")
    z = logits.astype(np.float64) - float(logits.max())
    others = np.delete(z, answer)
    probabilities = tuple(float(np.exp(s * z[answer]) / np.exp(s * z).sum()) for s in scales)
    return ScaledRow(p_answer=probabilities, lead=float(z[answer] - others.max()))


def gate_stability(
    targets: Mapping[str, int | None],
    rows: Mapping[int, ScaledRow],
    *,
    d_vocab: int,
    config: MeasureConfig | None = None,
) -> dict[str, Any]:
    """Return, per onset milestone, the share of scales under which each gate passes.

    The gates: probability at least 0.002 above uniform, and a lead of at least 0.5 logits after
    scaling. A milestone that is a run of two must pass both on both its rows, and gives only the
    last share. `targets` maps milestones to rows (None: not reached). Raises TableError when a row
    was measured under another number of scales.
    """
    config = config or MeasureConfig()
    per_target: dict[str, dict[str, Any]] = {}
    for name, layer in targets.items():
        if layer is None or layer not in rows:
            continue
        margin, gap = _passes(rows[layer], d_vocab, config)
        both = margin & gap
        entry: dict[str, Any] = {"layer": layer}
        if name.endswith("_run2"):
            if layer + 1 not in rows:
                continue
            following = _passes(rows[layer + 1], d_vocab, config)
            both &= following[0] & following[1]
            entry |= {"uniform_margin_pass_frac": None, "top2_gap_pass_frac": None}
        else:
            entry["uniform_margin_pass_frac"] = float(margin.mean())
            entry["top2_gap_pass_frac"] = float(gap.mean())
        per_target[name] = entry | {"both_gates_pass_frac": float(both.mean())}
    shares = [entry["both_gates_pass_frac"] for entry in per_target.values()]
    return {
        "status": "ok",
        "scales": list(config.gate_scales),
        "per_target": per_target,
        "min_both_gates_pass_frac": min(shares, default=None),
    }


def _passes(row: ScaledRow, d_vocab: int, config: MeasureConfig) -> tuple[np.ndarray, np.ndarray]:
    scales = np.array(config.gate_scales)
    if len(row.p_answer) != scales.size:
        raise TableError(
            f"a row was measured under {len(row.p_answer)} scales, the configuration has "
            f"{scales.size}; use gate_scales of one configuration for both"
        )
    margin = np.array(row.p_answer) - 1.0 / d_vocab >= config.semantic_margin
    return margin, scales * row.lead >= config.semantic_gap
