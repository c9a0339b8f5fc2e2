"""What a replay says of every edge: confirmed, nonlinear, refuted, or not to be told.

Gradients rank, replays prove. The null of an edge are edits along random directions, of its size,
at its layer and position. What they do to the target is a sum over many coordinates, so its spread
is estimated from them and the edge is held against Student's t. Beside it stands how many other
features that are active there would have moved the target as much: they may be real drivers too, so
they are no null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import t

from layerscope.features.pathways.replay import DOSES, Measured, target_index
from layerscope.features.pathways.state import PromptState

VERDICTS = ("confirmed", "nonlinear", "refuted", "undetermined")
FDR = 0.05
RATIO = (0.5, 2.0)
_FLOORS = 3.0


def judge(
    state: PromptState,
    edges: pl.DataFrame,
    measured: Measured,
    *,
    doses: Sequence[float] = DOSES,
    thresholds: Mapping[tuple[int, int], float | None] | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return edges with their replay and verdict, and one row per edge and dose.

    The edge's own figures are those of the dose farthest from 1 (an ablation, by default). p is two
    sided, against the random directions; q is after Benjamini and Hochberg over the edges given;
    `null_quantile` is what 95% of random directions stay below.

    Args:
        state: the prompt. edges: from `discover`. measured: from `replay`.
        doses: as replayed.
        thresholds: gate thresholds by (layer, feature), to tell whether a target's gate flipped.
    """
    places = target_index(state)
    main = max(doses, key=lambda dose: (abs(dose - 1.0), -dose))
    values = _values(state)
    summary: list[dict[str, Any]] = []
    detail: list[dict[str, Any]] = []
    for edge in edges.iter_rows(named=True):
        source = (edge["source_layer"], edge["source_id"], edge["source_position"])
        place = places[edge["target_layer"], edge["target_id"], edge["target_position"]]
        value, length = values[source]
        found: dict[float, tuple[float, float]] = {}
        for dose in doses:
            predicted = edge["gradient"] * (dose - 1.0) * value
            actual = measured.doses[source, place, dose]
            found[dose] = (predicted, actual)
            detail.append(
                {
                    **{name: edge[name] for name in ("prompt_id", "space")},
                    **{name: edge[name] for name in edge if name.startswith("source_")},
                    **{name: edge[name] for name in ("target_layer", "target_id")},
                    "target_position": edge["target_position"],
                    "variant": edge["variant"],
                    "dose": dose,
                    "predicted": predicted,
                    "actual": actual,
                }
            )
        floor = _FLOORS * measured.floor.get(place, 0.0)
        threshold = (thresholds or {}).get((edge["target_layer"], edge["target_id"]))
        at = (place, source[0], source[2])
        nulls = [np.abs(measured.nulls.get((*at, kind), [])) for kind in ("direction", "feature")]
        size = abs(main - 1.0) * value * length
        summary.append(_edge(edge, found, main, size, nulls, floor, threshold))
    table = pl.concat([edges, pl.DataFrame(summary, schema=_ADDED, orient="row")], how="horizontal")
    return settle(table).drop("floor", "signs"), pl.DataFrame(detail)


_ADDED: dict[str, Any] = {
    "predicted": pl.Float64,
    "actual": pl.Float64,
    "ratio": pl.Float64,
    "sign_agrees": pl.Boolean,
    "gate_flipped": pl.Boolean,
    "null_quantile": pl.Float64,
    "other_features": pl.Float64,
    "p": pl.Float64,
    "floor": pl.Float64,
    "signs": pl.Boolean,
}


def _edge(
    edge: Mapping[str, Any],
    found: Mapping[float, tuple[float, float]],
    main: float,
    length: float,
    nulls: Sequence[np.ndarray],
    floor: float,
    threshold: float | None,
) -> dict[str, Any]:
    predicted, actual = found[main]
    measurable = abs(predicted) > floor
    after = edge["target_pre_activation"] + actual
    flipped = None if threshold is None else (after > threshold) != edge["target_active"]
    moved = abs(actual) / length if length else 0.0
    null, others = nulls
    spread = float(np.sqrt((null**2).mean())) if len(null) else None
    if spread == 0.0:  # nothing moves this target from here
        spread = None if moved == 0.0 else np.finfo(float).tiny
    return {
        "predicted": predicted,
        "actual": actual,
        "ratio": actual / predicted if measurable else None,
        "sign_agrees": predicted * actual > 0,
        "gate_flipped": flipped,
        "null_quantile": None if spread is None else spread * length * t.ppf(0.975, len(null)),
        "other_features": float((others >= moved).mean()) if len(others) else None,
        "p": None if spread is None else float(2.0 * t.sf(moved / spread, len(null))),
        "floor": floor,
        "signs": all(p * a > 0 for dose, (p, a) in found.items() if dose != 1.0),
    }


def settle(table: pl.DataFrame, *, fdr: float = FDR) -> pl.DataFrame:
    """Return replayed edges with q over all of them, and the verdicts that follow.

    Args:
        table: with ``signs``: whether signs agree at all doses. ``ratio`` is null where the
            prediction is below what can be measured.
        fdr: level of q.
    """
    table = table.with_columns(q=pl.Series(bh(table["p"].to_list()), dtype=pl.Float64))
    null = pl.col("null_quantile")
    refuted = (
        ~pl.col("signs")
        | (null.is_not_null() & (pl.col("actual").abs() <= null))
        | (pl.col("q").is_not_null() & (pl.col("q") >= fdr))
    )
    verdict = (
        pl.when(pl.col("ratio").is_null())
        .then(pl.lit("undetermined"))
        .when(refuted)
        .then(pl.lit("refuted"))
        .when(pl.col("p").is_null())
        .then(pl.lit("undetermined"))
        .when(pl.col("ratio").is_between(*RATIO))
        .then(pl.lit("confirmed"))
        .otherwise(pl.lit("nonlinear"))
    )
    return table.with_columns(verdict=verdict)


def bh(p: Sequence[float | None]) -> list[float | None]:
    """Return q-values (Benjamini and Hochberg, 1995); null stays null and is not counted."""
    known = [index for index, value in enumerate(p) if value is not None]
    order = sorted(known, key=lambda index: p[index] or 0.0)
    found: list[float | None] = [None] * len(p)
    least = 1.0
    for rank in range(len(order), 0, -1):
        index = order[rank - 1]
        least = min(least, (p[index] or 0.0) * len(order) / rank)
        found[index] = least
    return found


def agreement(table: pl.DataFrame, *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return how well predictions agree with replays: signs, correlations, slope, with intervals.

    The interval of sign agreement is Wilson's; that of the slope resamples whole targets.

    Args:
        table: edges (or doses) with ``predicted`` and ``actual``.
    """
    kept = table.filter(pl.col("predicted").is_finite() & pl.col("actual").is_finite())
    n = kept.height
    if n == 0:
        return {"n": 0, "status": "skipped", "reason": "no edge was replayed"}
    predicted, actual = kept["predicted"].to_numpy(), kept["actual"].to_numpy()
    agree = int((predicted * actual > 0).sum())
    groups = kept.select(
        pl.concat_str("prompt_id", "target_layer", "target_id", "target_position", separator=":")
    ).to_series()
    return {
        "n": n,
        "sign_agreement": agree / n,
        "sign_agreement_interval": wilson(agree, n),
        "pearson": _correlation(predicted, actual),
        "spearman": _correlation(_ranks(predicted), _ranks(actual)),
        **_slope(predicted, actual, groups.to_numpy(), draws, seed),
    }


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _slope(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    slope, intercept = _line(x, y)
    names = np.unique(groups)
    if len(names) < 2:
        return {"slope": slope, "intercept": intercept, "slope_interval": None}
    members = [np.flatnonzero(groups == name) for name in names]
    generator = np.random.default_rng(seed)
    slopes: list[float] = []
    for _ in range(draws):
        chosen = generator.integers(len(names), size=len(names))
        index = np.concatenate([members[each] for each in chosen])
        found = _line(x[index], y[index])[0]
        if found is not None:
            slopes.append(found)
    ends = np.quantile(slopes, [0.025, 0.975]).tolist() if slopes else None
    return {"slope": slope, "intercept": intercept, "slope_interval": ends}


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    spread = ((x - x.mean()) ** 2).sum()
    if spread == 0:
        return None, None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    return slope, float(y.mean() - slope * x.mean())


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return average ranks: ties share theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[which]


def _values(state: PromptState) -> dict[tuple[int, int, int], tuple[float, float]]:
    """Return value and length of the write direction of every active entry."""
    found: dict[tuple[int, int, int], tuple[float, float]] = {}
    for layer in state.layers.values():
        lengths = torch.linalg.vector_norm(layer.directions.double(), dim=1)[layer.which]
        for position, feature, value, length in zip(
            layer.positions.tolist(),
            layer.ids.tolist(),
            layer.values.tolist(),
            lengths.tolist(),
            strict=True,
        ):
            found[layer.layer, feature, position] = (value, length)
    return found
