"""Do the gates of a milestone hold when all logits are scaled a little?"""

from __future__ import annotations

from typing import Any

from layerscope.experiments.layers.diagnostics.material import Material, answer_id
from layerscope.experiments.layers.diagnostics.onsets import PREFERRED
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result, skipped
from layerscope.measures import gate_stability as measure


def gate_stability(material: Material) -> Section:
    """Scale the logits of every milestone row by 0.9, 0.95, 1.05 and 1.1.

    A pass is stable where three of the four scales keep the answer's probability 0.002 above
    uniform and its lead at half a logit, at its strong milestones. `L_semantic` itself is measured
    too: being top-1 promises no gap, so it has no gate.
    """
    config = material.config.measures
    per_pass: list[dict[str, Any]] = []
    without: list[int] = []
    for number, item in enumerate(material.passes):
        found = material.milestones(item)
        targets = {name: found.get(name) for name in PREFERRED}
        rows = {row for row in targets.values() if row is not None}
        if not rows:
            without.append(item.source.index)
            continue
        run2 = targets["L_semantic_strong_run2"]
        rows |= set() if run2 is None else {run2 + 1}
        section = measure.gate_stability(
            targets,
            {row: _scaled(material, number, row) for row in sorted(rows)},
            d_vocab=material.model.d_vocab,
            config=config,
        )
        strong = [
            entry["both_gates_pass_frac"]
            for name, entry in section["per_target"].items()
            if name != "L_semantic"
        ]
        stable = min(strong) >= config.gate_pass_share if strong else None
        per_pass.append({**material.describe(item), **section, "gate": stable})
    if not per_pass:
        return skipped("the answer is top-1 in no row of any pass, so there is no gate to test")
    gate = all_hold([entry["gate"] for entry in per_pass])
    warnings = [
        f"{entry['fact_key']}: a strong milestone passes both gates under only "
        f"{entry['min_both_gates_pass_frac']:.0%} of the scales"
        for entry in per_pass
        if entry["gate"] is False
    ]
    if gate is None:
        warnings.append("no pass has a strong milestone: the answer is top-1 without margin or gap")
    return result(
        {"gate_stable_under_rescaling": gate},
        thresholds={
            "scales": list(config.gate_scales),
            "share": config.gate_pass_share,
            "margin": config.semantic_margin,
            "gap": config.semantic_gap,
        },
        warnings=warnings,
        **{name: value for name, value in per_pass[0].items() if name != "gate"},
        passes=per_pass,
        prompt_indices_without_milestone=without,
        **material.scope,
    )


def _scaled(material: Material, number: int, row: int) -> measure.ScaledRow:
    residual = material.captured.residual[number, -1, row][None]
    logits = material.model.unembedding.logits(material.norm.transform(residual, row))[0]
    return measure.scaled_row(
        logits.double().cpu().numpy(),
        answer_id(material.passes[number]),
        material.config.measures.gate_scales,
    )
