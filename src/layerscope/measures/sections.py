"""The diagnostic sections that a run adds to its summary: their names, and the skipped ones.

A run puts them under `summary["diagnostics"]`, each a plain dict. What did not run is
`{"status": "skipped", "reason": ...}`; a section that is absent was never asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Names of the sections, and the function of this package that makes each of them.
MADE_BY: dict[str, str] = {
    "repeatability": "layerscope.measures.repeatability.repeatability",
    "repeatability_forward": "layerscope.measures.repeatability.repeatability_forward",
    "decoding_point": "layerscope.measures.decoding_point.decoding_point",
    "gate_stability_small_scale": "layerscope.measures.gate_stability.gate_stability",
    "lens_consistency": "layerscope.measures.lens_consistency.lens_consistency",
    "position_window": "layerscope.measures.position_window.position_window",
    "skip_layers_sanity": "layerscope.measures.skip_layers.skip_layers",
    "tuned_audit": "layerscope.measures.tuned_audit.tuned_audit",
    "tuned_attribution": "layerscope.measures.sidecar.attribution",
    "prism_summary": "layerscope.measures.sidecar.sidecar_metrics",
    "head_transforms": "layerscope.measures.head_transforms.head_transforms",
    "copy_mask": "layerscope.measures.copy_mask.copy_mask",
    "normalization_provenance": "layerscope.measures.normalisation.normalisation_provenance",
    "tau_norm_per_layer": "a fitted temperature lens: one number per row",
}


def skipped(reason: str) -> dict[str, str]:
    """Return the section of a stage that did not run, with the reason."""
    return {"status": "skipped", "reason": reason}


def ran(sections: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Return a section that ran, None when it is absent, skipped or failed."""
    section = (sections or {}).get(name)
    if not isinstance(section, Mapping) or section.get("status", "ok") != "ok":
        return None
    return dict(section)  # pyright: ignore[reportUnknownArgumentType]  # JSON: keys are strings
