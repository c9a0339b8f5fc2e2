"""The page of a causal-feature run."""

from __future__ import annotations

from collections.abc import Mapping
from math import log10
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    Lines,
    Part,
    Reasons,
    Section,
    Table,
    Text,
    write_page,
)

_POINTS = 1500  # of the volcano; the rest lies among the undistinguished
_FLOOR = 1e-300
_GROUPS = ("q < 0.05, patched", "q < 0.05", "not told apart")


def write_causal_features(outcome: Outcome, path: Path) -> Path:
    """Write the page of a run; raises OutputError when it cannot be written."""
    return write_page(
        path,
        title=f"Causal features: {outcome.summary['task']}",
        kicker=str(outcome.provenance["model_name"]),
        verdict=_verdict(outcome.summary),
        sections=[_headline(outcome), _effects(outcome), _patching(outcome), _answers(outcome)],
        provenance=outcome.provenance,
    )


def _verdict(summary: Mapping[str, Any]) -> str:
    verdicts = summary["verdicts"]
    causal = sum(verdicts.get(name, 0) for name in ("safe", "risky", "mixed"))
    return (
        f"{summary['different']} of {summary['tested']} living features differ between safe and "
        f"risky prompts; of {summary['patched']} that were patched, {causal} change decisions "
        "beyond chance and random controls."
    )


def _headline(outcome: Outcome) -> Section:
    summary = outcome.summary
    power, base = summary["power"], summary["baselines"]
    parts: list[Part] = [
        Figures(
            [
                ("features", summary["features"], f"{summary['dead']} never active here"),
                ("differ between groups", summary["different"], "q < 0.05 over all layers"),
                ("largest |d|", summary["largest_d"], "Cohen's d"),
                ("safe prompts: stop", base["safe_baseline"]["stop_rate"], "without a patch"),
                ("risky prompts: stop", base["risky_baseline"]["stop_rate"], "without a patch"),
                ("answers parsed", summary["parse_rate"], f"of {summary['answers']}"),
                (
                    "detectable change",
                    power["detectable_corrected"],
                    f"power 0.8, {summary['trials']} trials, {power['tests']} tests",
                ),
                (
                    "answers changed by identity edits",
                    summary["identity"]["differing"],
                    f"of {summary['identity']['compared']}: should be 0",
                ),
            ]
        )
    ]
    if summary["warnings"]:
        parts.append(
            Reasons(
                [
                    {"severity": "warn", "message": line, "action": ""}
                    for line in summary["warnings"]
                ]
            )
        )
    return Section("What was found", parts)


def _effects(outcome: Outcome) -> Section:
    effects = outcome.tables["effects"]
    patched = (
        outcome.tables["features"].select("layer", "feature_id").with_columns(patched=pl.lit(True))
    )
    tested = effects.filter(pl.col("p").is_not_null() & pl.col("cohen_d").is_not_null()).join(
        patched, on=["layer", "feature_id"], how="left", maintain_order="left"
    )
    series: dict[str, list[tuple[float, float | None]]] = {name: [] for name in _GROUPS}
    for row in tested.sort("p").head(_POINTS).iter_rows(named=True):
        name = _GROUPS[2] if row["q"] >= 0.05 else _GROUPS[0] if row["patched"] else _GROUPS[1]
        series[name].append((row["cohen_d"], -log10(max(row["p"], _FLOOR))))
    by_layer = (
        effects.group_by("layer", maintain_order=True)
        .agg(
            (~pl.col("dead")).sum().alias("living"),
            (pl.col("q") < 0.05).sum().alias("different"),
            (pl.col("cohen_d") > 0).sum().alias("higher in risky"),
            pl.col("cohen_d").abs().max().alias("largest |d|"),
        )
        .sort("layer")
    )
    columns = (
        "layer", "feature_id", "cohen_d", "d_low", "d_high", "hedges_g", "safe_mean", "risky_mean",
        "safe_active", "risky_active", "p", "q",
    )  # fmt: skip
    strongest = tested.sort(pl.col("cohen_d").abs(), descending=True).head(100)
    return Section(
        "Differences between the groups",
        [
            Lines(
                {name: points for name, points in series.items() if points},
                "Cohen's d (risky - safe)",
                "-log10 p",
                "Every living feature: size of the difference, and Welch's test",
                points=True,
            ),
            Bars(
                [f"block {layer}" for layer in by_layer["layer"].to_list()],
                by_layer["different"].to_list(),
                "Features with q < 0.05 by layer",
            ),
            Table(tuple(by_layer.columns), by_layer.rows(), "By layer"),
            Table(
                columns,
                strongest.select(columns).rows(),
                "The hundred largest differences",
                folded=True,
            ),
        ],
        "Feature values at the last token of each prompt. A difference is no cause: see below.",
    )


def _patching(outcome: Outcome) -> Section:
    features = outcome.tables["features"].sort("layer", "feature_id")
    names = [f"L{layer}-{i}" for layer, i in features.select("layer", "feature_id").iter_rows()]
    drawings: list[Part] = [
        Bars(
            names,
            features[f"{side}_effect"].to_list(),
            f"{what}; 95% of random controls move it by at most "
            f"{_shown(features[f'{side}_control_95'].max())}",
            errors=[
                None if low is None else (low, high)
                for low, high in features.select(f"{side}_low", f"{side}_high").iter_rows()
            ],
        )
        for side, what in (
            ("safe", "Risky prompts, feature at the safe mean: change of the stop rate"),
            ("risky", "Safe prompts, feature at the risky mean: change of the bet rate"),
        )
    ]
    columns = (
        "layer", "feature_id", "cohen_d", "safe_mean", "risky_mean", "safe_effect", "safe_p",
        "safe_q", "risky_effect", "risky_p", "risky_q", "verdict",
    )  # fmt: skip
    return Section(
        "What patching changes",
        [
            *drawings,
            Table(columns, features.select(columns).rows(), "Every patched feature"),
            Text(
                [
                    "Only the difference between the wanted value and the feature's own is added "
                    "to the residual stream, so the dictionary's error never enters. Trial i draws "
                    "the same numbers under every condition; changes are tested trial by trial "
                    "(McNemar, exact, two-sided), and q corrects over features and sides.",
                ]
            ),
        ],
        "Positive is the expected direction. A verdict needs q < 0.05, the least effect asked for, "
        "and more than random features of the same length do.",
    )


def _answers(outcome: Outcome) -> Section:
    conditions = outcome.tables["conditions"].filter(pl.col("kind") != "control")
    columns = (
        "layer", "feature_id", "condition", "n", "parse_rate", "stop_rate", "mean_bet", "distinct",
    )  # fmt: skip
    responses = outcome.tables["responses"]
    texts = (
        responses.group_by("response", "action")
        .agg(pl.len().alias("answers"), pl.col("reason").first())
        .sort("answers", "response", descending=[True, False])
        .head(50)
    )
    parts: list[Part] = [
        Table(columns, conditions.select(columns).rows(), "Six conditions by feature", folded=True),
        Table(tuple(texts.columns), texts.rows(), "The most frequent answers, as parsed"),
    ]
    reasons = outcome.summary["invalid"]
    if reasons:
        parts.append(
            Table(("reason", "answers"), list(reasons.items()), "Answers without a decision")
        )
    return Section("Answers", parts, "Answers that cannot be parsed are in no rate.")


def _shown(value: Any) -> str:
    return "an unknown amount (no controls)" if value is None else f"{value:.3g}"
