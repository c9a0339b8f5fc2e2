"""All checks of a finished run, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch

from layerscope.errors import LayerscopeError
from layerscope.experiments.layers.diagnostics.decoding_point import decoding_point
from layerscope.experiments.layers.diagnostics.gate_stability import gate_stability
from layerscope.experiments.layers.diagnostics.head_bias import unembed_bias
from layerscope.experiments.layers.diagnostics.head_transforms import head_transforms
from layerscope.experiments.layers.diagnostics.health import numbers
from layerscope.experiments.layers.diagnostics.ignored import copy_mask
from layerscope.experiments.layers.diagnostics.layout import layer_map
from layerscope.experiments.layers.diagnostics.lens_consistency import lens_consistency
from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.normalisation import normalisation_provenance
from layerscope.experiments.layers.diagnostics.position_window import position_window
from layerscope.experiments.layers.diagnostics.repeatability import (
    repeatability,
    repeatability_forward,
)
from layerscope.experiments.layers.diagnostics.sections import Section, Skipped, skipped
from layerscope.experiments.layers.diagnostics.settings import Settings
from layerscope.experiments.layers.diagnostics.sidecars import (
    prism_summary,
    tau_norm_per_layer,
    tuned_attribution,
)
from layerscope.experiments.layers.diagnostics.skip_layers import skip_layers_sanity
from layerscope.experiments.layers.diagnostics.tuned_audit import tuned_audit
from layerscope.experiments.units import Progress, UnitStore, work_key
from layerscope.files import sha256_file
from layerscope.lenses.base import Lens
from layerscope.measures.table import LayersTable

if TYPE_CHECKING:
    from layerscope.experiments.layers.run import Plan

CHECKS: dict[str, Callable[[Material], Section]] = {
    "layer_map": layer_map,
    "normalization_provenance": normalisation_provenance,
    "numeric_health": numbers,
    "unembed_bias": unembed_bias,
    "copy_mask": copy_mask,
    "head_transforms": head_transforms,
    "repeatability": repeatability,
    "repeatability_forward": repeatability_forward,
    "decoding_point": decoding_point,
    "gate_stability_small_scale": gate_stability,
    "lens_consistency": lens_consistency,
    "position_window": position_window,
    "skip_layers_sanity": skip_layers_sanity,
    "tuned_audit": tuned_audit,
    "tau_norm_per_layer": tau_norm_per_layer,
    "tuned_attribution": tuned_attribution,
    "prism_summary": prism_summary,
}
SECTIONS = tuple(CHECKS)


def diagnose(
    planned: Plan,
    lenses: Mapping[str, Lens] | Sequence[Lens],
    table: LayersTable,
    *,
    level: str = "standard",
    text: str | Path | None = None,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> dict[str, Section]:
    """Make every check of a finished run that needs the model again.

    Args:
        planned: the run.
        lenses: those it was decoded with.
        table: its rows.
        level: "standard" (eight passes, 2048 tokens of text) or "full".
        text: held-out text, as a `TextSource` takes it; a page of prose by default.
        units: where finished sections are kept, so that a killed run goes on after the last one.
        progress: called with (sections done, sections in all).

    Returns:
        One JSON-able section per check: ``{"status": "ok", "gates": ..., "warnings": ...}`` with
        its figures, or ``{"status": "skipped", "reason": ...}``.

    Raises:
        ConfigError: unknown level.
    """
    settings = Settings.of(level)
    named = lenses if isinstance(lenses, Mapping) else {lens.name: lens for lens in lenses}
    material = Material(planned, named, table, settings, text=None if text is None else str(text))
    found: dict[str, Section] = {}
    for name, check in CHECKS.items():
        key = _key(planned, name, settings, text)
        found[name] = _kept(units, key) or _make(check, material)
        if units is not None and _kept(units, key) is None:
            units.put_unit(key, pl.DataFrame({"section": [name]}), found[name])
        if progress is not None:
            progress(len(found), len(CHECKS))
    return found


def _make(check: Callable[[Material], Section], material: Material) -> Section:
    """Carry out one check; what the model cannot do becomes the reason of a skipped section."""
    try:
        return check(material)
    except (Skipped, LayerscopeError) as reason:
        return skipped(str(reason))
    except (MemoryError, torch.OutOfMemoryError):
        return skipped("there was not enough memory for this check; use a smaller batch_bytes")


def _kept(units: UnitStore | None, key: str) -> Section | None:
    kept = units.get_unit(key) if units is not None else None
    return None if kept is None else kept[1]


def _key(planned: Plan, name: str, settings: Settings, text: str | Path | None) -> str:
    # The keys of the run's own units cover configuration, prompts, lenses, weights and versions.
    source = None if text is None else [str(text), _digest(Path(text))]
    units = [unit.key for unit in planned.units]
    return work_key("layers.diagnostics", name, settings.to_dict(), source, units)


def _digest(path: Path) -> str | None:
    # The name of a dataset stands for itself.
    return sha256_file(path) if path.is_file() else None
