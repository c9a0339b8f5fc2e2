"""How much of the behaviour circuits of growing size carry: faithfulness, CPR and CMD.

Faithfulness of a circuit C is ``(m(C) - m(none)) / (m(all) - m(none))``, with m the mean metric
over the pairs, "all" the base run and "none" the donor's. Over edge fractions k, CPR is the
integral of faithfulness with edges ranked by signed score (more is better), CMD that of
|1 - faithfulness| with edges ranked by size (less is better), both by the trapezoid rule (MIB;
Mueller et al. 2025). Ranks and areas of different rankings are never mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from layerscope.errors import ConfigError
from layerscope.interventions.attribution.edges import EdgeScores
from layerscope.interventions.circuits.graph import Ranking, edge_mask, keep_edges
from layerscope.interventions.circuits.run import circuit_metric

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Faithfulness:
    """One curve.

    Attributes:
        ranking: of the edges.
        fractions: asked for. counts: edges kept.
        metric: mean metric of each circuit. faithfulness: None where base and donor are alike.
        base: m(all). donor: m(none).
    """

    ranking: Ranking
    fractions: tuple[float, ...]
    counts: tuple[int, ...]
    metric: tuple[float, ...]
    faithfulness: tuple[float | None, ...]
    base: float
    donor: float

    @property
    def area(self) -> float | None:
        """CPR of a signed ranking, CMD of one by magnitude; None without faithfulness."""
        values = [value for value in self.faithfulness if value is not None]
        if len(values) < len(self.faithfulness):
            return None
        if self.ranking == "magnitude":
            values = [abs(1 - value) for value in values]
        steps = zip(self.fractions, self.fractions[1:], values, values[1:], strict=False)
        return sum((right - left) * (a + b) / 2 for left, right, a, b in steps)

    def table(self) -> pl.DataFrame:
        """Return one row per size: ``ranking, fraction, edges, metric, faithfulness``."""
        return pl.DataFrame(
            {
                "ranking": [self.ranking] * len(self.counts),
                "fraction": list(self.fractions),
                "edges": list(self.counts),
                "metric": list(self.metric),
                "faithfulness": list(self.faithfulness),
            },
            schema={
                "ranking": pl.String,
                "fraction": pl.Float64,
                "edges": pl.Int64,
                "metric": pl.Float64,
                "faithfulness": pl.Float64,
            },
        )


def faithfulness_curve(
    scores: EdgeScores,
    *,
    ranking: Ranking = "magnitude",
    fractions: Sequence[float] = FRACTIONS,
) -> Faithfulness:
    """Run circuits of growing size, and say how much of the behaviour each carries.

    Raises:
        ConfigError: a fraction is not within 0 and 1, or they do not ascend.
    """
    given = tuple(fractions)
    if not given or list(given) != sorted(set(given)) or not 0 <= given[0] <= given[-1] <= 1:
        raise ConfigError(f"fractions must ascend within 0 and 1, got {list(given)}")
    contrast = scores.contrast
    base, donor = (float(end.double().mean()) for end in contrast.ends)
    whole = keep_edges(scores, 0, ranking=ranking).n_all
    counts = tuple(round(fraction * whole) for fraction in given)
    metric: list[float] = []
    for count in counts:
        kept = keep_edges(scores, count, ranking=ranking, live=False).edges
        metric.append(float(circuit_metric(contrast, edge_mask(scores, kept)).double().mean()))
    gap = base - donor
    alike = abs(gap) <= 1e-9 * max(abs(base), abs(donor), 1.0)
    faithful = tuple(None if alike else (value - donor) / gap for value in metric)
    return Faithfulness(ranking, given, counts, tuple(metric), faithful, base, donor)
