"""From answers to verdicts: paired tests of both sides, held against random controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from layerscope.experiments.causal_features.answering import BASELINES, EXPECTED
from layerscope.experiments.causal_features.config import FDR, GATE, CausalConfig
from layerscope.experiments.causal_features.statistics import (
    Paired,
    detectable,
    paired,
    paired_power,
    q_values,
)
from layerscope.experiments.causal_features.task import SIDES, Task

_CELL = ["kind", "layer", "feature_id", "along", "condition"]
_TEST = ("n", "before", "after", "effect", "low", "high", "gained", "lost", "p", "parse_rate")


def judge(
    chosen: pl.DataFrame, responses: pl.DataFrame, config: CausalConfig
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return one row per patched feature with its verdict, and one per cell with its rates.

    The safe side asks whether the safe group's mean makes risky prompts stop more often, the risky
    side whether the risky group's makes safe prompts bet more often; effects of either sign count.
    q corrects over features and sides; the controls are corrected among themselves.
    """
    conditions = _conditions(responses)
    tests = _tests(responses, config)
    corrected = pl.concat(
        [
            of.with_columns(q=q_values(of["p"]))
            for of in (tests.filter(pl.col("kind") == kind) for kind in ("feature", "control"))
        ]
    )
    null = _null(corrected)
    features = chosen.rename({"q": "effect_q"})
    for side in SIDES:
        mine = corrected.filter(kind="feature", side=side).select(
            "layer",
            "feature_id",
            *(pl.col(name).alias(f"{side}_{name}") for name in (*_TEST, "q")),
        )
        features = features.join(mine, on=["layer", "feature_id"], how="left")
        features = features.with_columns(
            pl.lit(null[side], dtype=pl.Float64).alias(f"{side}_control_95")
        )
    verdict = [_verdict(row, config) for row in features.iter_rows(named=True)]
    controls = corrected.filter(kind="control").select(
        "layer", "feature_id", "along", "side", "effect", "p", "q"
    )
    conditions = conditions.join(
        controls.rename({"effect": "control_effect", "p": "control_p", "q": "control_q"})
        .with_columns(
            condition=pl.col("side").replace_strict({s: c for c, s in EXPECTED.items()}),
            kind=pl.lit("control"),
        )
        .drop("side"),
        on=_CELL,
        how="left",
        nulls_equal=True,
        maintain_order="left",
    )
    return features.with_columns(verdict=pl.Series(verdict, dtype=pl.String)), conditions


def summarise(
    task: Task,
    effects: pl.DataFrame,
    features: pl.DataFrame,
    conditions: pl.DataFrame,
    responses: pl.DataFrame,
    config: CausalConfig,
    *,
    identity: Mapping[str, Any],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Return what was found, as plain values."""
    tests = 2 * len(features)
    controls = conditions.filter(pl.col("kind") == "control")
    verdicts = dict(features["verdict"].value_counts().sort("verdict").iter_rows())
    baselines = conditions.filter(pl.col("kind") == "baseline")
    summary: dict[str, Any] = {
        "task": task.name,
        "prompts": {
            side: {"contrast": len(task.contrast[side]), "patched": len(task.patched[side])}
            for side in SIDES
        },
        "layers": list(layers),
        "features": len(effects),
        "dead": int(effects["dead"].sum()),
        "tested": int(effects["p"].is_not_null().sum()),
        "different": int((effects["q"] < FDR).sum()),
        "largest_d": effects["cohen_d"].abs().max(),
        "patched": len(features),
        "verdicts": verdicts,
        "opposite": {
            side: int(((features[f"{side}_q"] < FDR) & (features[f"{side}_effect"] < 0)).sum())
            for side in SIDES
        },
        "baselines": {
            row["condition"]: {key: row[key] for key in ("n", "parse_rate", "stop_rate")}
            for row in baselines.iter_rows(named=True)
        },
        "controls": {
            "n": int(controls["control_p"].is_not_null().sum()),
            "discoveries": int((controls["control_q"] < FDR).sum()),
            **{f"{side}_95": features[f"{side}_control_95"].max() for side in SIDES},
        },
        "identity": dict(identity),
        "parse_rate": float(responses["valid"].mean() or 0.0),  # type: ignore[arg-type]
        "invalid": dict(
            responses.filter(~pl.col("valid"))["reason"].value_counts().sort("reason").iter_rows()
        ),
        "below_gate": int((conditions["parse_rate"] < GATE).sum()),
        "answers": len(responses),
        "trials": config.trials,
        "distinct_answers": float(conditions["distinct"].mean() or 0.0),  # type: ignore[arg-type]
        "power": {
            "tests": tests,
            "of_change_0.2": paired_power(config.trials, 0.2),
            "of_change_0.2_corrected": paired_power(config.trials, 0.2, alpha=FDR / tests),
            "detectable": detectable(config.trials),
            "detectable_corrected": detectable(config.trials, alpha=FDR / tests),
        },
    }
    summary["warnings"] = _doubts(summary, config)
    return summary


def _conditions(responses: pl.DataFrame) -> pl.DataFrame:
    valid = pl.col("valid")
    stops = (pl.col("action") == "stop").sum()
    return (
        responses.group_by(_CELL, maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n"),
            valid.sum().cast(pl.Int64).alias("valid"),
            stops.cast(pl.Int64).alias("stops"),
            (pl.col("action") == "bet").sum().cast(pl.Int64).alias("bets"),
            valid.mean().alias("parse_rate"),
            pl.when(valid.sum() > 0).then(stops / valid.sum()).alias("stop_rate"),
            pl.col("bet").mean().alias("mean_bet"),
            (pl.col("response").n_unique() / pl.len()).alias("distinct"),
        )
    )  # fmt: skip


def _tests(responses: pl.DataFrame, config: CausalConfig) -> pl.DataFrame:
    """Return one row per patched feature or control and side."""
    before = {
        BASELINES[str(condition)]: of.sort("trial")
        for (condition,), of in responses.filter(kind="baseline").group_by(["condition"])
    }
    rows: list[dict[str, Any]] = []
    patched = responses.filter(pl.col("condition").is_in(list(EXPECTED)))
    for key, of in patched.group_by(_CELL, maintain_order=True):
        kind, layer, feature, along, condition = key
        side = EXPECTED[str(condition)]
        base = before["risky" if side == "safe" else "safe"]
        after = of.sort("trial")
        found = paired(_outcomes(base, side, config), _outcomes(after, side, config))
        rows.append(
            {
                "kind": kind,
                "layer": layer,
                "feature_id": feature,
                "along": along,
                "side": side,
                **_account(found),
                "parse_rate": min(_share(base), _share(after)),
            }
        )
    floats = ("before", "after", "effect", "low", "high", "p", "parse_rate")
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(floats, pl.Float64))


def _account(found: Paired) -> dict[str, Any]:
    names = ("n", "before", "after", "effect", "low", "high", "gained", "lost", "p")
    return {name: getattr(found, name) for name in names}


def _outcomes(of: pl.DataFrame, side: str, config: CausalConfig) -> list[bool | None]:
    """Return whether each trial did what the side counts; None where it cannot be told."""
    if side == "safe":
        return [a == "stop" if ok else None for a, ok in of.select("action", "valid").iter_rows()]
    if config.high_bet is None:
        return [a == "bet" if ok else None for a, ok in of.select("action", "valid").iter_rows()]
    return [
        None if not ok or (a == "bet" and bet is None) else a == "bet" and bet > config.high_bet
        for a, bet, ok in of.select("action", "bet", "valid").iter_rows()
    ]


def _share(of: pl.DataFrame) -> float:
    return float(of["valid"].to_numpy().mean())


def _null(tests: pl.DataFrame) -> dict[str, float | None]:
    """Return what 95% of the controls' absolute effects stay at or below, by side."""
    found: dict[str, float | None] = {}
    for side in SIDES:
        sizes = tests.filter(kind="control", side=side)["effect"].drop_nulls().abs().to_numpy()
        found[side] = float(np.quantile(sizes, 0.95, method="higher")) if len(sizes) else None
    return found


def _verdict(row: Mapping[str, Any], config: CausalConfig) -> str:
    if min(row[f"{side}_parse_rate"] for side in SIDES) < GATE:
        return "unparsed"
    causal = [side for side in SIDES if _moves(row, side, config)]
    return "mixed" if len(causal) == 2 else causal[0] if causal else "none"


def _moves(row: Mapping[str, Any], side: str, config: CausalConfig) -> bool:
    effect, q, null = (row[f"{side}_{name}"] for name in ("effect", "q", "control_95"))
    if effect is None or q is None or q >= FDR or abs(effect) < config.min_effect:
        return False
    return null is None or abs(effect) > null


def _doubts(summary: Mapping[str, Any], config: CausalConfig) -> list[str]:
    notes: list[str] = []
    power, controls = summary["power"], summary["controls"]
    if summary["identity"]["differing"]:
        notes.append(
            f"{summary['identity']['differing']} of {summary['identity']['compared']} answers "
            "change when features keep their own value: the edits are not exact, trust no verdict"
        )
    if summary["below_gate"]:
        notes.append(
            f"{summary['below_gate']} cells have fewer than {GATE:.0%} answers that can be parsed: "
            "their features get no verdict"
        )
    if power["of_change_0.2_corrected"] < 0.8:
        notes.append(
            f"{config.trials} trials find a one-way change of 0.2 with power "
            f"{power['of_change_0.2_corrected']:.2f} after correction for {power['tests']} tests: "
            "'none' may mean too few trials"
        )
    if not controls["n"]:
        notes.append("there were no random controls: an effect may be that of any edit so large")
    elif controls["discoveries"] > FDR * controls["n"]:
        notes.append(
            f"{controls['discoveries']} of {controls['n']} random controls change decisions by the "
            "same test: edits of this size do so whatever they write"
        )
    rates = [base["stop_rate"] for base in summary["baselines"].values()]
    if None not in rates and rates[0] - rates[1] < 0.1:
        notes.append(
            f"the model stops in {rates[0]:.0%} of safe and {rates[1]:.0%} of risky trials: the "
            "prompts hardly differ in what it decides"
        )
    if not set(summary["verdicts"]) & {"safe", "risky", "mixed"}:
        notes.append("no single feature changes decisions: differences of means did not predict it")
    return notes
