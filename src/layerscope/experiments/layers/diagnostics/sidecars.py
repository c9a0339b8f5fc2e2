"""Fitted lenses beside the norm lens, from the table alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.sections import Section, Skipped, result
from layerscope.lenses.fitted import TemperatureLens
from layerscope.measures import sidecar as measure
from layerscope.measures.detectors import percentile_row
from layerscope.measures.distribution import DEPTHS

_ENDLESS = 1e20  # of 1 / tau, and below the end of a fit's search (e^60)


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
    """Compare milestones and divergences of the prism lens with those of the norm lens.

    The gate holds where the median prompt is nearer to the model at 25, 50 and 75% of the depth.
    """
    per_pass: list[dict[str, Any]] = [
        {
            **material.describe(item),
            "metrics": measure.sidecar_metrics(material.part(item), material.part(item, "prism")),
        }
        for item in material.passes
    ]
    gains = {
        depth: _median(
            [entry["metrics"]["kl_bits_at_percentiles"]["delta"][depth] for entry in per_pass]
        )
        for depth, q in DEPTHS.items()
        # Of a model of one block 75% is the last row, where all lenses are the model.
        if percentile_row(material.model.n_layers, q) < material.model.n_layers
    }
    known = [gain for gain in gains.values() if gain is not None]
    helps = all(gain > 0.0 for gain in known) if known else None
    warnings = [
        f"at {DEPTHS[depth]:.0%} of the depth the prism lens is {-gain:.3g} bits further from the "
        "model than the norm lens (median over prompts)"
        for depth, gain in gains.items()
        if gain is not None and not gain > 0.0
    ]
    if helps is None:
        warnings.append("no divergence is known, so nothing was compared")
    return result(
        {"prism_beats_norm": helps},
        warnings=warnings,
        gain_bits=gains,
        **per_pass[0],
        passes=per_pass,
        **material.scope,
    )


def tau_norm_per_layer(material: Material) -> Section:
    """Return the temperature of every row, as its lens was fitted; the last row's is 1."""
    lens = material.lenses.get("temperature")
    if not isinstance(lens, TemperatureLens):
        raise Skipped("the run has no temperature lens; fit one and add temperature to lenses")
    inverse = lens.tensors()["inverse_temperature"].double().tolist()
    # 1 / tau is 0 where tau has no end, and beyond all bounds where the search never turned.
    endless = [row for row, value in enumerate(inverse) if not 0.0 < value < _ENDLESS]
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


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
