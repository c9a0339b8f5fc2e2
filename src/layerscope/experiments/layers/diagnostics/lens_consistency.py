"""Do the lenses rank the same tokens at the rows that matter?"""

from __future__ import annotations

from typing import Any

import torch

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, result, skipped
from layerscope.measures import lens_consistency as measure
from layerscope.readout import Request

_TOP = 50
_REQUEST = Request(
    entropy=False,
    top_k=_TOP,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=False,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)


def lens_consistency(material: Material) -> Section:
    """Compare every lens with the norm lens at the milestones: overlap and rank correlation.

    Spearman's rho is over the 50 most likely tokens of the norm lens, ranked anew by what the other
    lens thinks of them in its whole vocabulary.
    """
    others = [name for name in material.lenses if name != "norm"]
    if not others or "norm" not in material.lenses:
        return skipped("the run has only one lens; add raw or a fitted one to compare with norm")
    per_pass: list[dict[str, Any]] = []
    without: list[int] = []
    for number, item in enumerate(material.passes):
        found = material.milestones(item)
        targets = {name: found.get(name) for name in measure.TARGETS if name in found}
        rows = sorted({row for row in targets.values() if row is not None})
        if not rows:
            without.append(item.source.index)
            continue
        compared = _rows(material, number, rows, others)
        section = measure.lens_consistency(targets, compared, config=material.config.measures)
        per_pass.append({**material.describe(item), **section})
    if not per_pass:
        return skipped("no pass has a milestone at which lenses could be compared")
    gates: dict[str, bool | None] = {}
    for name in others:
        low = [entry for entry in per_pass if any(e["lens"] == name for e in entry["low"])]
        gates[f"lenses_agree.norm_{name}"] = not low
    warnings = [line for name in others if (line := _complaint(per_pass, name))]
    return result(
        gates,
        thresholds={"least": material.config.measures.consistency_min},
        warnings=warnings,
        **per_pass[0],
        passes=per_pass,
        prompt_indices_without_milestone=without,
        **material.scope,
    )


def _complaint(per_pass: list[dict[str, Any]], lens: str) -> str:
    """Say at how many passes a lens ranks otherwise than norm, and where worst; "" if none."""
    low = [
        (entry["fact_key"], found)
        for entry in per_pass
        for found in entry["low"]
        if found["lens"] == lens
    ]
    if not low:
        return ""
    fact, worst = min(low, key=lambda pair: pair[1]["jaccard@10"])
    rho = worst["spearman_top50"]
    return (
        f"norm and {lens} rank tokens differently at milestones of "
        f"{len({key for key, _ in low})} of {len(per_pass)} passes; worst {fact} at "
        f"{worst['name']} (row {worst['layer']}): Jaccard@10 {worst['jaccard@10']:.2f}, Spearman "
        f"{'unknown' if rho is None else format(rho, '.2f')}"
    )


def _rows(
    material: Material, number: int, rows: list[int], others: list[str]
) -> dict[str, dict[int, measure.LensRow]]:
    residual = material.captured.residual[number, -1]

    def through(name: str) -> torch.Tensor:
        lens = material.lenses[name]
        return torch.cat([lens.transform(residual[row][None], row) for row in rows])

    ours = material.read(through("norm"), _REQUEST).top_ids
    assert ours is not None
    found: dict[str, dict[int, measure.LensRow]] = {}
    for name in others:
        theirs = material.read(through(name), _REQUEST, tokens=ours.long())
        assert theirs.top_ids is not None and theirs.token_rank is not None
        found[name] = {
            row: measure.LensRow(
                reference=ours[index].tolist(),
                other=theirs.top_ids[index].tolist(),
                ranks=theirs.token_rank[index].tolist(),
            )
            for index, row in enumerate(rows)
            if not bool(theirs.nonfinite[index])
        }
    return found
