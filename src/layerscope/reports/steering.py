"""The page of a steering run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Figures,
    Lines,
    Multiples,
    Part,
    Reasons,
    Section,
    Table,
    write_page,
)


def write_steering(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run; raises OutputError when it cannot be written."""
    sections = [_headline(outcome), _dose(outcome), _layers(outcome)]
    if outcome.summary["texts"]:
        sections.append(_texts(outcome))
    return write_page(
        path,
        title=f"Steering: {outcome.summary['contrasts']}",
        kicker=str(outcome.provenance["model_name"]),
        verdict=_verdict(outcome.summary),
        sections=sections,
        provenance=outcome.provenance,
    )


def _verdict(summary: Mapping[str, Any]) -> str:
    fit, random = summary["response"], summary["random"]
    return (
        f"Added after block {summary['layer']}, one typical residual length of the vector moves "
        f"log P(positive) - log P(negative) by {fit['mean_slope']:.2f} nats "
        f"({fit['low']:.2f} to {fit['high']:.2f}); the strongest of {random['directions']} random "
        f"directions by {random['largest_absolute_slope']:.2f}."
    )


def _headline(outcome: Outcome) -> Section:
    summary = outcome.summary
    fit, moved = summary["response"], summary["propensity"]
    alphas = list(moved["by_alpha"])
    neutral = summary["neutral"]
    bits, random = neutral["bits_by_alpha"], neutral["random_bits_by_alpha"]
    parts: list[Part] = [
        Figures(
            [
                ("mean slope", fit["mean_slope"], "nats per typical residual length"),
                ("examples that move the other way", fit["anti_steerable"], "share"),
                ("typical residual length", summary["typical_norm"], "median, BOS left out"),
                *_calibrated(summary),
                ("95% cone of the direction", summary["cone_degrees"], "degrees, bootstrap"),
            ]
        ),
        Table(
            (
                "condition",
                "log P(positive) - log P(negative), nats",
                "change of neutral texts, bits per token",
                "by a random direction",
            ),
            [
                ("unsteered", moved["unsteered"], 0.0, 0.0),
                *(
                    (f"vector at alpha {at}", moved["by_alpha"][at], bits[at], random[at])
                    for at in (alphas[0], alphas[-1])
                ),
                ("after negative texts (prompting)", moved["after_negative_texts"], None, None),
                ("after positive texts (prompting)", moved["after_positive_texts"], None, None),
            ],
            "Mean over the test examples, and what the same strength does to texts that have "
            "nothing to do with them",
        ),
    ]
    if summary["warnings"]:
        notes = [
            {"severity": "warn", "message": line, "action": ""} for line in summary["warnings"]
        ]
        parts.append(Reasons(notes))
    return Section("What the vector does", parts)


def _calibrated(summary: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    found = summary["calibration"]
    if found is None or found["alpha"] is None:
        return []
    note = f"changes neutral texts by {found['bits']:.3g} bits per token"
    return [("alpha found", found["alpha"], note)]


def _dose(outcome: Outcome) -> Section:
    responses, slopes = outcome.tables["responses"], outcome.tables["slopes"]

    def means(of: pl.DataFrame) -> list[tuple[float, float | None]]:
        grouped = of.group_by("alpha", maintain_order=True).agg(pl.col("propensity").mean())
        return list(grouped.sort("alpha").rows())

    series = {"vector": means(responses.filter(kind="vector"))}
    draws = responses.filter(kind="random")
    spread = (
        draws.group_by(["draw", "alpha"], maintain_order=True)
        .agg(pl.col("propensity").mean())
        .group_by("alpha", maintain_order=True)
        .agg(
            pl.col("propensity").mean().alias("mean"),
            pl.col("propensity").min().alias("low"),
            pl.col("propensity").max().alias("high"),
        )
        .sort("alpha")
    )
    series["random directions"] = list(spread.select("alpha", "mean").rows())
    band = list(spread.select("alpha", "low", "high").rows())
    damage = outcome.tables["damage"]
    hurt = {
        label: list(damage.filter(kind=kind).select("alpha", "bits").rows())
        for label, kind in (("vector", "vector"), ("random direction", "random"))
    }
    own = slopes.filter(kind="vector").sort("slope")["slope"].to_list()
    return Section(
        "Dose and response",
        [
            Multiples(
                [
                    Lines(
                        series,
                        "alpha, typical residual lengths",
                        "nats",
                        "Propensity by strength; shade: lowest and highest random direction",
                        bands={"random directions": band},
                    ),
                    Lines(
                        hurt,
                        "alpha, typical residual lengths",
                        "bits per token",
                        "Change of neutral texts: KL of the next token, unsteered to steered",
                    ),
                    Lines(
                        {"vector": [(float(at), value) for at, value in enumerate(own)]},
                        "example, by slope",
                        "nats per length",
                        "Slope of every test example",
                        points=True,
                    ),
                ]
            )
        ],
        "One line was fitted per example; a mean can hide examples that move the other way.",
    )


def _layers(outcome: Outcome) -> Section:
    layers = outcome.tables["layers"]
    columns = (
        "layer",
        "typical_norm",
        "vector_norm",
        "shared",
        "split_half",
        "cone_degrees",
        "slope",
    )
    cosines = ("layer", "cos_pca_centred", "cos_pca_pairwise", "cos_probe")
    return Section(
        "Choice of the layer",
        [
            Lines(
                {"slope": list(layers.select("layer", "slope").rows())},
                "block",
                "nats per length",
                "Mean slope on validation examples, with 95% intervals",
                bands={"slope": list(layers.select("layer", "low", "high").rows())},
            ),
            Table(columns, layers.select(columns).rows(), "Directions by layer"),
            Table(cosines, layers.select(cosines).rows(), "|cos| with the mean difference"),
        ],
        "Chosen is the largest slope on examples that no other figure of this page uses.",
    )


def _texts(outcome: Outcome) -> Section:
    entries = outcome.summary["texts"]

    def lines(field: str, title: str, *, log: bool = False) -> Lines:
        series = {
            kind: [(e["alpha"], e[field]) for e in entries if e["kind"] == kind]
            for kind in ("vector", "random")
        }
        return Lines(series, "alpha", "", title, log_y=log)

    drawings = [
        lines("perplexity", "Perplexity of the texts under the unsteered model", log=True),
        lines("repeated_3", "Share of trigrams that repeat"),
    ]
    if entries[0]["share_positive"] is not None:
        drawings.append(lines("share_positive", "Share of texts that a classifier calls positive"))
    texts = outcome.tables["texts"].filter(kind="vector")
    columns = ("alpha", "prompt", "text", "perplexity", "score")
    error, judged = outcome.summary["classifier_error"], outcome.summary["classifier_texts"]
    return Section(
        "Texts and their coherence",
        [Multiples(drawings), Table(columns, texts.select(columns).rows(), "Every text")],
        "The classifier counts words of contrasts that the vector was not made from"
        + ("." if error is None else f"; it is wrong on {error:.1%} of the {judged} texts it was."),
    )
