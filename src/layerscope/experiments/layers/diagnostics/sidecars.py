"""Fitted lenses beside the norm lens, from the table alone."""

from __future__ import annotations

from typing import Any

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, Skipped, result
from layerscope.lenses.fitted import TemperatureLens
from layerscope.measures import sidecar as measure


def tuned_attribution(material: Material) -> Section:
    """Split what the tuned lens gains at 25, 50 and 75% depth into temperature and rotation."""
    per_pass: list[dict[str, Any]] = [
        {
            **material.describe(item),
            **measure.attribution(
                material.part(item), material.part(item, "tuned"), material.config.measures
            ),
        }
        for item in material.passes
    ]
    warnings: list[str] = []
    known = per_pass[0]["percentiles"]["p50"]["ΔKL_temp"] is not None
    if not known:
        warnings.append("the table has no norm_temp column: the temperature's share is unknown")
    return result({}, warnings=warnings, **per_pass[0], passes=per_pass, **material.scope)


def prism_summary(material: Material) -> Section:
    """Compare milestones and divergences of the prism lens with those of the norm lens."""
    per_pass: list[dict[str, Any]] = [
        {
            **material.describe(item),
            "metrics": measure.sidecar_metrics(material.part(item), material.part(item, "prism")),
        }
        for item in material.passes
    ]
    deltas = [
        value
        for entry in per_pass
        for value in entry["metrics"]["kl_bits_at_percentiles"]["delta"].values()
        if value is not None
    ]
    helps = sum(deltas) / len(deltas) > 0.0 if deltas else None
    warnings = ["the prism lens is further from the model than the norm lens"] if not helps else []
    return result(
        {"prism_beats_norm": helps},
        warnings=warnings,
        **per_pass[0],
        passes=per_pass,
        **material.scope,
    )


def tau_norm_per_layer(material: Material) -> Section:
    """Return the temperature of every row, as it was fitted on held-out text."""
    lens = material.lenses.get("temperature")
    if not isinstance(lens, TemperatureLens):
        raise Skipped("the run has no temperature lens; fit one and add temperature to lenses")
    inverse = lens.tensors()["inverse_temperature"].double().tolist()
    endless = [row for row, value in enumerate(inverse) if value == 0.0]
    warnings = (
        [f"at row(s) {', '.join(map(str, endless))} no finite temperature is best"]
        if endless
        else []
    )
    return result(
        {"temperatures_settled": not endless},
        warnings=warnings,
        tau=[None if value == 0.0 else 1.0 / value for value in inverse] + [1.0],
    )
