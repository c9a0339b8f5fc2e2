"""Everything that is measured on one pass through one lens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import copy_fractions, copy_summary
from layerscope.measures.detectors import Milestone
from layerscope.measures.distribution import entropy_gap_fields, kl_fields
from layerscope.measures.rows import PassRows
from layerscope.measures.semantics import (
    semantic_fields,
    semantic_fractions,
    semantic_milestones,
)
from layerscope.measures.surface import surface_fields, surface_milestones

# What to quote when one onset layer is wanted: the most demanding milestone that was reached.
PREFERENCE = (
    "L_semantic_strong_run2",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "L_semantic",
)


@dataclass(frozen=True)
class PassSummary:
    """Published scalar fields and milestones of one pass through one lens."""

    part: PassRows
    fields: dict[str, Any]
    milestones: dict[str, Milestone]

    def to_dict(self) -> dict[str, Any]:
        """Return identity, fields and milestones as one flat dict."""
        prompt = self.part.prompt
        return {
            "prompt_index": prompt.prompt_index,
            "fact_key": prompt.fact_key,
            "fact_index": prompt.fact_index,
            "prompt_id": prompt.prompt_id,
            "prompt_variant": prompt.prompt_variant,
            "prompt_sha256": prompt.prompt_sha256,
            "lens": self.part.lens,
            **self.fields,
            "milestones": {name: item.to_dict() for name, item in self.milestones.items()},
        }


def summarise_pass(
    part: PassRows,
    config: MeasureConfig,
    *,
    d_vocab: int,
    raw: PassRows | None,
    radius: int,
    confirmed: dict[str, Any] | None,
) -> PassSummary:
    """Measure one pass; `raw` is it through the raw lens, `confirmed` the test of its onset."""
    onset = semantic_milestones(part, config, d_vocab=d_vocab)
    semantic = onset["L_semantic"].first
    confirmed_layer: int | None = confirmed["L_semantic_confirmed"] if confirmed else None
    copies, copy_found = copy_summary(part, config, raw=raw, radius=radius, semantic=semantic)
    surface = surface_milestones(part, config)
    fields = copies | semantic_fields(
        part, onset, config, d_vocab=d_vocab, confirmed=confirmed_layer
    )
    fields |= surface_fields(part, surface, config) | entropy_gap_fields(part) | kl_fields(part)
    fields["depth_fractions"] = semantic_fractions(onset, n_layers=part.n_layers)
    fields["depth_fractions"] |= copy_fractions(copies, n_layers=part.n_layers)
    if confirmed is not None:
        fields["confirmed_semantics"] = confirmed
        fields["L_semantic_confirmed"] = confirmed_layer
    found = copy_found | onset | surface
    layers = {name: item.first for name, item in found.items()}
    layers["L_semantic_confirmed"] = confirmed_layer
    fields["preferred_milestone"] = next(
        ({"name": name, "layer": layers[name]} for name in PREFERENCE if layers[name] is not None),
        None,
    )
    return PassSummary(part=part, fields=fields, milestones=found)
