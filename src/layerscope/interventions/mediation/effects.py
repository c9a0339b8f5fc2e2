"""Total, direct and indirect effects of exchanging prompts, through every mediator by itself.

With Y(x, m) the metric where the prompt is x and the mediator is held at the value m, clean prompts
c and corrupt prompts c': total effect Y(c', M(c')) - Y(c, M(c)); natural indirect effect
Y(c, M(c')) - Y(c, M(c)); natural direct effect Y(c', M(c)) - Y(c, M(c)) (Pearl 2001; Vig et al.
2020). What is left of the total, less both, is their interaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import polars as pl
from jaxtyping import Float

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.contrast import Contrast
from layerscope.interventions.attribution.exact import exact_effects, joint_effect
from layerscope.interventions.attribution.gradient import (
    attribution_patching,
    integrated_gradients,
)
from layerscope.interventions.attribution.nodes import Node, NodeScores, resolve_sites
from layerscope.interventions.mediation.intervals import Interval, bootstrap
from layerscope.models.sites import Site

Method: TypeAlias = Literal["patch", "atp", "ig"]
Places: TypeAlias = Literal["all", "last", "each"] | Sequence[int]

SCHEMA = {
    "mediator": pl.String,
    "kind": pl.String,
    "layer": pl.Int64,
    "unit": pl.Int64,
    "position": pl.Int64,
    "total": pl.Float64,
    "indirect": pl.Float64,
    "indirect_low": pl.Float64,
    "indirect_high": pl.Float64,
    "direct": pl.Float64,
    "direct_low": pl.Float64,
    "direct_high": pl.Float64,
    "interaction": pl.Float64,
    "recovery": pl.Float64,
    "recovery_low": pl.Float64,
    "recovery_high": pl.Float64,
}


@dataclass(frozen=True, eq=False)
class Mediation:
    """Effects by mediator and pair, in units of the metric.

    Attributes:
        method: "patch" (exact), "atp" or "ig" (approximations of the indirect and direct effects).
        mediators: nodes, in order; the last is None for all of them together where asked.
        total: [row].
        indirect: [mediator, row]. direct: [mediator, row].
        seed: of the intervals.
        zero: pairs whose total effect is zero: no share of theirs exists; they stay in the means.
    """

    method: Method
    mediators: tuple[Node | None, ...]
    total: Float[np.ndarray, " row"]
    indirect: Float[np.ndarray, "mediator row"]
    direct: Float[np.ndarray, "mediator row"]
    seed: int
    zero: tuple[int, ...]

    def recovery(self, index: int) -> Interval:
        """Return a mediator's mean indirect effect over the mean total effect."""
        return bootstrap(self.indirect[index], self.total, seed=self.seed)

    def table(self) -> pl.DataFrame:
        """Return one row per mediator: effects, interaction, recovery, with 95% intervals."""
        rows: list[dict[str, object]] = []
        for index, node in enumerate(self.mediators):
            indirect = bootstrap(self.indirect[index], seed=self.seed)
            direct = bootstrap(self.direct[index], seed=self.seed)
            recovery = self.recovery(index)
            left = self.total - self.indirect[index] - self.direct[index]
            site = None if node is None else node.site
            rows.append(
                {
                    "mediator": "all together" if node is None else str(node),
                    "kind": None if site is None else site.kind,
                    "layer": None if site is None else site.layer,
                    "unit": None if node is None else node.unit,
                    "position": None if node is None else node.position,
                    "total": float(self.total.mean()),
                    "indirect": indirect.value,
                    "indirect_low": indirect.low,
                    "indirect_high": indirect.high,
                    "direct": direct.value,
                    "direct_low": direct.low,
                    "direct_high": direct.high,
                    "interaction": float(left.mean()),
                    "recovery": recovery.value,
                    "recovery_low": recovery.low,
                    "recovery_high": recovery.high,
                }
            )
        return pl.DataFrame(rows, schema=SCHEMA)


def mediate(
    contrast: Contrast,
    sites: str | Sequence[str] = "heads",
    *,
    positions: Places = "all",
    method: Method = "patch",
    steps: int = 10,
    together: bool = False,
    seed: int = 0,
) -> Mediation:
    """Split the effect of the donor's prompts over mediators.

    Args:
        contrast: base prompts (c) and donor prompts (c').
        sites: groups of mediators ("heads", "mlp_out", ...), or sites.
        positions: mediators at "all" positions at once, at the "last", at "each", or at some.
        method: "patch" exchanges every mediator in both runs; "atp" and "ig" predict that from
            gradients at the ends, or along each site's own path.
        steps: of "ig" (Gauss-Legendre).
        together: also take all of them as one mediator (exact, whatever the method).
        seed: of the intervals.

    Raises:
        ConfigError: an unknown method or position.
    """
    nodes = mediators_of(contrast, sites, positions)
    forward, backward = contrast, contrast.reverse
    total = contrast.total.double().cpu().numpy()
    indirect = _effects(forward, sites, nodes, method, steps)
    direct = total + _effects(backward, sites, nodes, method, steps)
    mediators: tuple[Node | None, ...] = tuple(nodes)
    if together:
        mediators = (*mediators, None)
        joint = [joint_effect(side, nodes).double().cpu().numpy() for side in (forward, backward)]
        indirect = np.vstack([indirect, joint[0]])
        direct = np.vstack([direct, total + joint[1]])
    base = np.maximum(*(np.abs(end.double().cpu().numpy()) for end in contrast.ends))
    zero = np.flatnonzero(np.abs(total) <= 1e-9 * np.maximum(base, 1.0))
    return Mediation(method, mediators, total, indirect, direct, seed, tuple(map(int, zero)))


def mediators_of(contrast: Contrast, sites: str | Sequence[str], positions: Places) -> list[Node]:
    """Return the mediators that sites and positions stand for, in order."""
    chosen = resolve_sites(contrast.model, sites)
    if isinstance(positions, str) and positions not in ("all", "last", "each"):
        raise ConfigError(f"positions is {positions!r}; use all, last, each or numbers")
    if positions == "each":
        places: list[int | None] = list(range(max(contrast.base.lengths)))
    elif positions == "all":
        places = [None]
    else:
        places = [-1] if isinstance(positions, str) else [int(place) for place in positions]
    return [
        Node(site, unit, place)
        for site in chosen
        for unit in _units(contrast, site)
        for place in places
    ]


def _units(contrast: Contrast, site: Site) -> list[int | None]:
    shape = contrast.model.backend.trailing(site, contrast.base.width)
    if len(shape) == 2 or site.kind == "mlp.post":
        return list(range(shape[0]))
    return [None]


def _effects(
    contrast: Contrast,
    sites: str | Sequence[str],
    nodes: Sequence[Node],
    method: Method,
    steps: int,
) -> Float[np.ndarray, "node row"]:
    if method == "patch":
        found = list(exact_effects(contrast, nodes).values())
    else:
        scores = _scores(contrast, sites, method, steps)
        found = [scores.of(node) for node in nodes]
    return np.stack([effect.double().cpu().numpy() for effect in found])


def _scores(
    contrast: Contrast, sites: str | Sequence[str], method: Method, steps: int
) -> NodeScores:
    if method == "atp":
        return attribution_patching(contrast, sites)
    if method != "ig":
        raise ConfigError(f"method is {method!r}; use 'patch', 'atp' or 'ig'")
    return integrated_gradients(
        contrast, sites, path="activations", rule="gauss-legendre", steps=steps, error=False
    )
