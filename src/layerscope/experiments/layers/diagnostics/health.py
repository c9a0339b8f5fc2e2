"""Are the numbers themselves sound, in every lens and before it?"""

from __future__ import annotations

from typing import Any

import torch

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, result
from layerscope.measures.health import health_caution, numeric_health

_HEADROOM = 0.5  # of the largest number of the dtype


def numbers(material: Material) -> Section:
    """Count NaN and infinity in every lens, and say how near the residual comes to overflow.

    `flagged` rows at or before a milestone of a pass make the gate fail; so does a residual beyond
    half of the largest number its dtype holds.
    """
    residual = material.captured.residual
    largest = residual.float().abs().amax(dim=(0, 1, 3))
    limit = torch.finfo(residual.dtype).max
    rows = [
        {"layer": row, "max_abs_residual": float(value), "share_of_range": float(value) / limit}
        for row, value in enumerate(largest)
    ]
    lenses: dict[str, Any] = {}
    gates: dict[str, bool | None] = {}
    warnings: list[str] = []
    for name in material.table.lenses:
        health = numeric_health(material.table, lens=name)
        cautions = [
            health_caution(health, copy=None, semantic=material.milestones(item).get("L_semantic"))
            for item in material.passes
            if (item.source.index, "norm") in material.parts
        ]
        lenses[name] = health
        gates[f"finite.{name}"] = not any(cautions) if health["checked"] else None
        if not health["checked"]:
            warnings.append(f"the table does not say whether {name} rows are finite")
        if health["layers_flagged"]:
            flagged = ", ".join(map(str, health["layers_flagged"]))
            warnings.append(f"NaN or infinity in the {name} lens at row(s) {flagged}")
    gates["no_overflow"] = bool(
        torch.isfinite(largest).all() and float(largest.max()) < _HEADROOM * limit
    )
    if not gates["no_overflow"]:
        warnings.append(
            f"the residual reaches {float(largest.max()):.3g}, and {residual.dtype} ends at "
            f"{limit:.3g}; load the model in bfloat16 or float32"
        )
    return result(
        gates,
        thresholds={"share_of_range": _HEADROOM},
        warnings=warnings,
        dtype=str(residual.dtype).removeprefix("torch."),
        any_nan=bool(residual.isnan().any()),
        any_inf=bool(residual.isinf().any()),
        lenses=lenses,
        rows=rows,
        **material.scope,
    )
