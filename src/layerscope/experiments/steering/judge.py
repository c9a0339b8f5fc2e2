"""From rows to a verdict: the layer chosen, what steering does beside controls, what to doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from layerscope.experiments.steering.config import SteeringConfig
from layerscope.interventions.steering.dose import Response

# Fewer of either, and neither the direction nor what chance would do is known well.
FEWEST_CONTRASTS, FEWEST_RANDOM = 32, 20
# Bits per token by which texts that should stay as they are may change without a word.
MUCH = 1.0
TEXTS = {
    "kind": pl.String,
    "alpha": pl.Float64,
    "prompt": pl.String,
    "text": pl.String,
    "perplexity": pl.Float64,
    "repeated_2": pl.Float64,
    "repeated_3": pl.Float64,
    "repeated_4": pl.Float64,
    "score": pl.Float64,
}


def choose_layer(layers: pl.DataFrame) -> int:
    """Return the layer of the largest mean slope on validation examples; ties to the earliest."""
    return int(layers.sort(["slope", "layer"], descending=[True, False])["layer"][0])


def summarise(
    name: str,
    layers: pl.DataFrame,
    chosen: int,
    slopes: pl.DataFrame,
    responses: pl.DataFrame,
    texts: pl.DataFrame,
    config: SteeringConfig,
    *,
    left_out: int,
    warnings: Sequence[str],
    classifier: float | None,
    neutral: pl.DataFrame,
    calibration: dict[str, Any] | None,
    per_side: int,
    judged: int,
) -> dict[str, Any]:
    """Return what was found, as plain values."""
    row = layers.row(by_predicate=pl.col("layer") == chosen, named=True)
    vector = slopes.filter(kind="vector")
    columns = ("slope", "residual", "rank_correlation")
    fit = Response(*(vector[column].to_numpy() for column in columns)).summary(seed=config.seed)
    random = (
        slopes.filter(kind="random")
        .group_by("draw", maintain_order=True)
        .agg(pl.col("slope").mean())
    )["slope"].to_numpy()
    base = _mean(responses.filter(kind="vector", alpha=0.0))
    prompting = responses.filter(kind="prompting")
    summary: dict[str, Any] = {
        "contrasts": name,
        "layer": chosen,
        "typical_norm": row["typical_norm"],
        "coefficient_of_alpha_1": row["typical_norm"] / row["vector_norm"],
        "contrasts_a_side": per_side,
        "cone_degrees": row["cone_degrees"],
        "cosines": {key: row[f"cos_{key}"] for key in ("pca_centred", "pca_pairwise", "probe")},
        "response": fit,
        "random": {
            "directions": len(random),
            "mean_slope": float(random.mean()),
            "largest_absolute_slope": float(np.abs(random).max()),
            "beyond": float((np.abs(random) >= abs(fit["mean_slope"])).mean()),
        },
        "propensity": {
            "unsteered": base,
            "by_alpha": {
                f"{alpha:g}": _mean(responses.filter(kind="vector", alpha=alpha))
                for alpha in config.alphas
            },
            "after_positive_texts": _mean(prompting.filter(alpha=1.0)),
            "after_negative_texts": _mean(prompting.filter(alpha=-1.0)),
        },
        "neutral": {
            "texts": len(config.neutral),
            "bits_by_alpha": _by_alpha(neutral, "vector"),
            "random_bits_by_alpha": _by_alpha(neutral, "random"),
        },
        "calibration": calibration,
        "left_out": left_out,
        "classifier_error": classifier,
        "classifier_texts": judged,
        "texts": _texts(texts),
    }
    summary["warnings"] = [*warnings, *_doubts(summary, texts)]
    return summary


def _by_alpha(neutral: pl.DataFrame, kind: str) -> dict[str, float]:
    rows = neutral.filter(kind=kind).select("alpha", "bits").rows()
    return {f"{alpha:g}": bits for alpha, bits in rows}


def _mean(frame: pl.DataFrame) -> float:
    return float(frame["propensity"].to_numpy().mean())


def _texts(texts: pl.DataFrame) -> list[dict[str, Any]]:
    """Coherence by kind and strength: geometric mean perplexity, repetition, classifier's score."""
    if not len(texts):
        return []
    grouped = texts.group_by(["kind", "alpha"], maintain_order=True).agg(
        pl.col("perplexity").log().mean().exp(),
        pl.col("repeated_3").mean(),
        pl.col("score").mean(),
        (pl.col("score") > 0).mean().alias("share_positive"),
    )
    return grouped.to_dicts()


def _few(summary: dict[str, Any]) -> list[str]:
    notes: list[str] = []
    if summary["contrasts_a_side"] < FEWEST_CONTRASTS:
        notes.append(
            f"{summary['contrasts_a_side']} contrasts a side are few for a direction, a choice of "
            f"the layer and a test: give {FEWEST_CONTRASTS} or more"
        )
    if summary["random"]["directions"] < FEWEST_RANDOM:
        notes.append(
            f"{summary['random']['directions']} random directions say little about chance: take "
            f"{FEWEST_RANDOM} or more"
        )
    return notes


def _strength(summary: dict[str, Any]) -> list[str]:
    notes: list[str] = []
    hurt = [alpha for alpha, bits in summary["neutral"]["bits_by_alpha"].items() if bits > MUCH]
    if hurt:
        notes.append(
            f"at alpha {', '.join(hurt)} texts that have nothing to do with the contrasts change "
            f"by more than {MUCH:g} bit per token: look for a smaller strength"
        )
    found = summary["calibration"]
    if found is not None and found["alpha"] is None:
        notes.append(f"no strength was found: {found['reason']}")
    elif found is not None and not found["monotone"]:
        notes.append(
            "more strength did not always change neutral texts more: the strength found is one of "
            "several"
        )
    return notes


def _doubts(summary: dict[str, Any], texts: pl.DataFrame) -> list[str]:
    notes = _few(summary)
    fit, random = summary["response"], summary["random"]
    if fit["low"] <= 0:
        notes.append(
            "the mean slope is not above zero with 95% confidence: this direction does not steer "
            "these examples as meant"
        )
    if random["beyond"] > 0.05:
        notes.append(
            f"{random['beyond']:.0%} of {random['directions']} random directions move the examples "
            "as much on average"
        )
    if fit["anti_steerable"] > 0.1:
        notes.append(
            f"{fit['anti_steerable']:.0%} of the examples move the other way: look at the slopes, "
            "not at their mean"
        )
    moved = summary["propensity"]
    best = max(moved["by_alpha"].values())
    if moved["after_positive_texts"] >= best:
        notes.append("putting a few positive texts in front moves the examples as far as steering")
    if summary["left_out"]:
        notes.append(
            f"{summary['left_out']} contrasts are no choice after a common prompt and were not "
            "measured"
        )
    notes += _strength(summary)
    error = summary["classifier_error"]
    if len(texts) and error is not None and error > 0.2:
        notes.append(
            f"the classifier of texts is wrong on {error:.0%} of the training contrasts: do not "
            "trust its scores"
        )
    plain = next((e for e in summary["texts"] if e["kind"] == "vector" and e["alpha"] == 0.0), None)
    if plain is None:
        return notes
    for entry in summary["texts"]:
        worse = entry["perplexity"] > 3 * plain["perplexity"]
        if entry["kind"] == "vector" and (worse or entry["repeated_3"] > 0.5):
            notes.append(
                f"at alpha {entry['alpha']:g} texts fall apart: perplexity "
                f"{entry['perplexity']:.3g} under the unsteered model ({plain['perplexity']:.3g} "
                f"at alpha 0), {entry['repeated_3']:.0%} of trigrams repeated"
            )
    return notes
