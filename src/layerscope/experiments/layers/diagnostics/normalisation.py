"""Which norm decoded which row, what it is, and whether it does what it says."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.norms import NormFacts, facts_of
from layerscope.experiments.layers.diagnostics.sections import Section, result
from layerscope.measures import normalisation as measure


def normalisation_provenance(material: Material) -> Section:
    """Describe the norm of every row, and prove it twice.

    `formula_error`: its module against its own formula in float64 (kind, eps, gain, bias) on the
    residuals of the run. `used_error`: its output on those residuals against what the model itself
    fed to attention, or to the head, with it. Both relative to the largest value.
    """
    model, captured = material.model, material.captured
    bound = material.settings.norm_error_low if material.low else material.settings.norm_error
    choice = material.config.norm_choice
    cache: dict[str, NormFacts] = {}
    modules: list[dict[str, Any]] = []
    for row in range(material.n_rows):
        name, norm = model.norm_at(row, choice)
        facts = cache.get(name) or cache.setdefault(name, facts_of(model, name, norm))
        residual = captured.residual[:, -1, row]
        with torch.no_grad():
            normed = norm(residual)
        modules.append(
            {
                "layer": row,
                "module": name,
                "kind": facts.kind,
                "eps": facts.eps,
                **_gain(facts),
                **_lengths(residual, normed),
                "formula_error": _formula_error(facts, residual, normed),
                "used_error": _used_error(material, row),
            }
        )
    used = [entry["used_error"] for entry in modules if entry["used_error"] is not None]
    formula = [entry["formula_error"] for entry in modules if entry["formula_error"] is not None]
    gates: dict[str, bool | None] = {
        "norm_is_its_formula": all(e <= bound for e in formula) if formula else None,
        "norm_is_the_one_used": all(e <= bound for e in used) if used else None,
    }
    section: dict[str, Any] = {"per_layer": []}
    if (material.passes[0].source.index, "norm") in material.parts:
        section = measure.normalisation_provenance(
            material.part(material.passes[0]),
            arch=model.architecture,
            strategy={"primary": choice, "ablation": "same_norm, next_norm, final"},
            epsilon_inside_sqrt=gates["norm_is_its_formula"],
            gain_used=any(facts.gain is not None for facts in cache.values()),
        )
    return result(
        gates,
        thresholds={"relative_error": bound},
        warnings=_warnings(modules, gates, bound),
        **section,
        modules=modules,
        **material.scope,
    )


def _gain(facts: NormFacts) -> dict[str, Any]:
    gain, bias = facts.gain, facts.bias
    return {
        "gain_mean": None if gain is None else float(gain.mean()),
        "gain_std": None if gain is None else float(gain.std(correction=0)),
        "gain_min": None if gain is None else float(gain.min()),
        "gain_max": None if gain is None else float(gain.max()),
        "bias_l2": None if bias is None else float(bias.norm()),
    }


def _lengths(residual: Tensor, normed: Tensor) -> dict[str, float]:
    """Return the median over the passes of the root mean squares before and after."""
    before, after = (x.double().square().mean(-1).sqrt() for x in (residual, normed))
    return {
        "resid_rms": float(before.median()),
        "normed_rms": float(after.median()),
        "rms_ratio": float((after / before.clamp_min(1e-30)).median()),
    }


def _formula_error(
    facts: NormFacts, residual: Float[Tensor, "pass d_model"], normed: Tensor
) -> float | None:
    if facts.kind is None or facts.eps is None:
        return None
    return _relative(normed, facts.formula(residual))


def _used_error(material: Material, row: int) -> float | None:
    """Compare the norm of a row with the vectors that the model computed with it."""
    captured, model = material.captured, material.model
    residual = captured.residual[:, -1, row]
    if row == model.n_layers:
        name, norm = model.norm_at(row, "final")
        given = captured.head_input
    else:
        name, norm = model.norm_at(row, "next_norm")
        given = None if captured.attn_in is None else captured.attn_in[:, row]
        if name == model.norm_at(row, "final")[0]:
            return None
    if given is None:
        return None
    with torch.no_grad():
        return _relative(norm(residual), given)


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))


def _warnings(
    modules: list[dict[str, Any]], gates: dict[str, bool | None], bound: float
) -> list[str]:
    lines: list[str] = []
    for key, what in (
        ("formula_error", "is not what its kind, eps and gain say"),
        ("used_error", "is not what the model normalised with"),
    ):
        off = [e for e in modules if e[key] is not None and not e[key] <= bound]
        if off:
            worst = max(off, key=lambda entry: entry[key])
            lines.append(
                f"{worst['module']} {what} at row {worst['layer']}: off by {worst[key]:.2g}"
            )
    if gates["norm_is_its_formula"] is None:
        lines.append("the norm's parameters do not tell its kind; only its output was compared")
    if gates["norm_is_the_one_used"] is None:
        lines.append("the model does not show what it normalised, so that could not be compared")
    return lines
