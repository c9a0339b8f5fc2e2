"""Attribution patching and integrated gradients of nodes.

Attribution patching (Nanda 2023; Syed, Rager, Conmy 2023) is the first-order prediction of an exact
patch: ``(donor - base) · ∂metric/∂activation``, at the base run. Integrated gradients replace the
gradient by its mean along a path: through the input embeddings (EAP-IG, Hanna et al. 2024), or
along each site's own segment, where a perfect quadrature gives the exact effect of the whole site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.contrast import FIRST, Contrast
from layerscope.interventions.attribution.nodes import (
    NodeScores,
    at_real_tokens,
    per_unit,
    resolve_sites,
)
from layerscope.interventions.attribution.quadrature import Rule, points
from layerscope.models import Replace, Site

Path: TypeAlias = Literal["inputs", "activations"]
_MeanGradients: TypeAlias = dict[Site, Tensor]


def attribution_patching(contrast: Contrast, sites: str | Sequence[str] = "heads") -> NodeScores:
    """Score nodes by the first-order prediction of their patch: two forwards and one backward.

    Blind where the metric or an attention pattern is saturated, and where paths of opposite sign
    cancel; verify what it finds (`verify`).
    """
    chosen = resolve_sites(contrast.model, sites)
    donor = contrast.values("donor", chosen)
    base = contrast.gradients(chosen)
    scores = _products(contrast, base.values, donor, base.gradients)
    return NodeScores("attribution patching", contrast, scores)


def integrated_gradients(
    contrast: Contrast,
    sites: str | Sequence[str] = "heads",
    *,
    path: Path = "inputs",
    rule: Rule = "midpoint",
    steps: int = 5,
    error: bool = True,
) -> NodeScores:
    """Score nodes by gradients averaged along a path from the base to the donor run.

    Args:
        contrast: what is asked.
        sites: groups of nodes, or sites.
        path: "inputs" interpolates what block 0 reads, one pass per step; "activations" each site
            by itself (all its units and positions together), one pass per step and site.
        rule: see `points`.
        steps: passes along the path.
        error: also go along it with twice the steps; the scores are then those of the finer rule,
            and the difference is their estimated error. The note ``gap`` says by how much the
            integrals over the inputs miss the metric's true change ([row], path "inputs" only),
            which also shows features of the path that both rules stepped over.

    Raises:
        ConfigError: an unknown path or rule, or no steps.
    """
    if path not in ("inputs", "activations"):
        raise ConfigError(f"path is {path!r}; use 'inputs' or 'activations'")
    chosen = resolve_sites(contrast.model, sites)
    every = [*dict.fromkeys([*chosen, FIRST])] if path == "inputs" else chosen
    kept = [*dict.fromkeys([*every, FIRST])]
    base, donor = contrast.values("base", kept), contrast.values("donor", kept)
    mean = _along_inputs if path == "inputs" else _along_activations

    def integral(count: int) -> dict[Site, Tensor]:
        gradients = mean(contrast, every, base, donor, points(rule, count))
        return _products(contrast, base, donor, gradients)

    scores = integral(2 * steps if error else steps)
    errors = None
    if error:
        coarse = integral(steps)
        errors = {site: (scores[site] - coarse[site]).abs() for site in chosen}
    notes: dict[str, object] = {
        "rule": rule,
        "steps": steps,
        "passes": (3 if error else 1) * steps * (1 if path == "inputs" else len(every)),
    }
    if path == "inputs":
        notes["gap"] = contrast.total - scores[FIRST].sum((1, 2))
    return NodeScores(
        f"integrated gradients over {path}", contrast, {s: scores[s] for s in chosen}, errors, notes
    )


def _along_inputs(
    contrast: Contrast,
    sites: Sequence[Site],
    base: dict[Site, Tensor],
    donor: dict[Site, Tensor],
    rule: Sequence[tuple[float, float]],
) -> _MeanGradients:
    """Average gradients over interpolated inputs of block 0."""
    return _average(
        rule,
        lambda place: (
            contrast.gradients(sites, start=_between(base[FIRST], donor[FIRST], place)).gradients
        ),
    )


def _along_activations(
    contrast: Contrast,
    sites: Sequence[Site],
    base: dict[Site, Tensor],
    donor: dict[Site, Tensor],
    rule: Sequence[tuple[float, float]],
) -> _MeanGradients:
    """Average each site's gradients over interpolated values of that site alone."""

    def at(place: float) -> _MeanGradients:
        found: _MeanGradients = {}
        for site in sites:
            value = _between(base[site], donor[site], place).requires_grad_(True)
            edit = Replace(site, value)
            found |= contrast.gradients([site], start=base[FIRST], edits=[edit]).gradients
        return found

    return _average(rule, at)


def _average(
    rule: Sequence[tuple[float, float]], at: Callable[[float], _MeanGradients]
) -> _MeanGradients:
    total: _MeanGradients = {}
    for place, weight in rule:
        for site, gradient in at(place).items():
            known = total.get(site)
            total[site] = gradient * weight if known is None else known + gradient * weight
    return total


def _between(base: Tensor, donor: Tensor, place: float) -> Tensor:
    return base + place * (donor - base)


def _products(
    contrast: Contrast,
    base: dict[Site, Tensor],
    donor: dict[Site, Tensor],
    gradients: dict[Site, Tensor],
) -> dict[Site, Float[Tensor, "row pos unit"]]:
    """Return (donor - base) · gradient per unit, accumulated in float32 or wider."""
    scores: dict[Site, Tensor] = {}
    for site, gradient in gradients.items():
        wide = torch.promote_types(gradient.dtype, torch.float32)
        difference = donor[site].to(wide) - base[site].to(wide)
        product = per_unit(site, difference * gradient.to(wide))
        scores[site] = at_real_tokens(product, contrast.base)
    return scores
