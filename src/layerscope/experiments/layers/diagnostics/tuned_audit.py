"""What the tuned lens gains, by which of its parts, and whether it does so at other positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float

from layerscope.experiments.layers.diagnostics.material import Material, answer_id
from layerscope.experiments.layers.diagnostics.scoring import Along, Audit, audit, score
from layerscope.experiments.layers.diagnostics.sections import Section, all_hold, result, skipped
from layerscope.experiments.layers.diagnostics.splitting import FITTED_TEMPERATURE
from layerscope.experiments.layers.diagnostics.temperatures import best_temperature
from layerscope.measures import tuned_audit as measure
from layerscope.measures.position_window import position_grid

_SKIPPED = 4  # first positions, which fits leave out too
_SURE = 3.0  # standard errors
_VARIANTS = ("rot_only", "matrix_only", "temp_only", "bias_only", "own_bias_only")


def tuned_audit(material: Material) -> Section:
    """Audit the tuned lens on every pass and on held-out text.

    Per row: KL to the model of the norm lens, the tuned lens, and its parts (`splitting`); what
    each part gains, and what only their combination does. Verdicts are drawn on held-out text,
    where every row has many tokens, and the gain also on the run's own prompts; the figures of the
    first pass stand on top.
    """
    variants = material.variants
    if not variants:
        return skipped(
            "the run has no tuned lens; fit one (layerscope fit tuned) and add tuned to lenses"
        )
    config = material.config.measures
    per_pass: list[dict[str, Any]] = []
    variant_frames: list[pl.DataFrame] = []
    position_frames: list[pl.DataFrame] = []
    for number, item in enumerate(material.passes):
        rows, positions = _pass_frames(material, number)
        mismatch = _head_mismatch(material, number)
        section = measure.tuned_audit(rows, positions, head_mismatch=mismatch, config=config)
        named = material.describe(item)
        per_pass.append({**named, **section})
        labels = [pl.lit(value).alias(key) for key, value in named.items()]
        variant_frames.append(rows.with_columns(*labels))
        position_frames.append(positions.with_columns(*labels))
    on_text = _on_text(material)
    gates, warnings = _judge(material, per_pass, on_text)
    return result(
        gates,
        thresholds={
            "rotation_bits": config.tuned_rotation_bits,
            "temperature_share": config.tuned_temperature_share,
            "head_bits": _bound(material),
        },
        warnings=warnings,
        **per_pass[0],
        gain_on_prompts_p50=_median_gain(per_pass),
        gain_on_text_p50=_gain(on_text),
        on_text=on_text,
        sources=material.variant_sources,
        passes=per_pass,
        variants=pl.concat(variant_frames).to_dicts(),
        positions=pl.concat(position_frames).to_dicts(),
        **material.scope,
    )


def _pass_frames(material: Material, number: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the variants and positions tables of one pass.

    The gold token is the answer at the last position, and the model's own top-1 at the grid.
    """
    captured, item = material.captured, material.passes[number]
    grid = position_grid(item.length)
    residual = captured.residual[number]
    places = [captured.positions[number].tolist().index(position) for position in grid.values()]
    _, norm = material.model.norm_at(material.model.n_layers, "final")
    with torch.no_grad():
        final = norm(residual[:, -1]).float()
    last = audit(
        material,
        material.variants,
        residual[-1:],
        final[-1:],
        np.array([item.length - 1]),
        np.array([1.0]),
        gold=torch.tensor([answer_id(item)]),
    )
    at_grid = audit(
        material,
        {name: material.variants[name] for name in ("baseline", "tuned")},
        residual[places],
        final[places],
        np.array(list(grid.values())),
        np.array(list(grid)),
    )
    return _variant_frame(last), _position_frame(at_grid)


def _variant_frame(found: Audit) -> pl.DataFrame:
    """Return one row per row index: means over the places, ranks only where there is one place."""
    n_rows, n_places = found.kl_bits["baseline"].shape
    columns: dict[str, Any] = {"layer": np.arange(n_rows)}
    for name in ("baseline", "tuned", *_VARIANTS):
        columns[f"kl_bits_{name}"] = found.kl_bits[name].mean(1)
        ranks = found.rank[name][:, 0] if n_places == 1 else [None] * n_rows
        columns[f"answer_rank_{name}"] = pl.Series(ranks, dtype=pl.Int64)
    for name in ("baseline", "tuned"):
        columns[f"entropy_bits_{name}"] = found.entropy_bits[name].mean(1)
    rows = measure.variant_rows(pl.DataFrame(columns).fill_nan(None))
    extra = [
        (pl.col("kl_bits_baseline") - pl.col(f"kl_bits_{name}")).alias(f"delta_kl_bits_{name}")
        for name in ("matrix_only", "bias_only", "own_bias_only")
    ]
    parts = pl.col("delta_kl_bits_matrix_only") + pl.col("delta_kl_bits_own_bias_only")
    return rows.with_columns(*extra).with_columns(
        (pl.col("delta_kl_bits_rot_only") - parts).alias("delta_kl_bits_matrix_bias_interaction")
    )


def _position_frame(found: Audit) -> pl.DataFrame:
    """Return one row per place and row index, with the rank of the model's own top-1."""
    n_rows, n_places = found.kl_bits["baseline"].shape
    columns: dict[str, Any] = {
        "pos_frac": np.repeat(found.fraction, n_rows),
        "pos_index": np.repeat(found.position, n_rows),
        "layer": np.tile(np.arange(n_rows), n_places),
    }
    for name in ("baseline", "tuned"):
        columns[f"kl_bits_{name}"] = found.kl_bits[name].T.ravel()
        columns[f"answer_rank_{name}"] = found.rank[name].T.ravel().astype(np.int64)
        columns[f"entropy_bits_{name}"] = found.entropy_bits[name].T.ravel()
    return measure.position_rows(pl.DataFrame(columns).fill_nan(None))


def _on_text(material: Material) -> dict[str, Any]:
    """Return the same audit on held-out text, and the gain at every row."""
    scores = material.once("scores", score)
    if scores.audit is None or not scores.audit.position.size:
        return skipped("there is no text to read")
    rows = _variant_frame(scores.audit)
    section = measure.tuned_audit(rows, config=material.config.measures)
    means = {name: values.mean(1)[:-1] for name, values in scores.audit.kl_bits.items()}
    apart = means.get(FITTED_TEMPERATURE)
    beyond = None if apart is None else float(np.median(apart - means["tuned"]))
    return {
        **section,
        "beyond_temperature_p50": beyond,
        "notes": list(scores.text.notes),
        "source": scores.text.source,
        "places": int(scores.audit.position.size),
        "positional": _along(material, scores.along),
        "fitted_context": _fitted_context(material),
        "variants": rows.to_dicts(),
    }


def _along(material: Material, along: Along | None) -> dict[str, Any]:
    """Return means by tenths of a sequence, and its last part against the part before it.

    Every position counts, at 25, 50 and 75% depth; standard errors are over positions.
    """
    assert along is not None
    config = material.config.measures
    baseline, tuned = along.baseline.mean(0), along.tuned.mean(0)
    known = np.isfinite(baseline) & np.isfinite(tuned)
    # The first positions are never typical, and no fit samples them.
    typical = known & (along.position >= _SKIPPED)
    middle = typical & (along.fraction <= config.position_in_dist)
    late = typical & (along.fraction >= config.position_ood)
    tenth = np.minimum((along.fraction * 10).astype(int), 9)
    return {
        "depths": "25%, 50% and 75%",
        "places": int(known.sum()),
        "longest_position": int(along.position.max()),
        "by_tenth": [
            {
                "from": part / 10,
                "places": int((known & (tenth == part)).sum()),
                "kl_bits_baseline": float(baseline[known & (tenth == part)].mean()),
                "kl_bits_tuned": float(tuned[known & (tenth == part)].mean()),
            }
            for part in range(10)
            if (known & (tenth == part)).any()
        ],
        "gain": _rise(baseline - tuned, middle, late),
        "kl_bits_tuned": _rise(tuned, middle, late),
    }


def _rise(
    values: Float[np.ndarray, " place"],
    middle: Bool[np.ndarray, " place"],
    late: Bool[np.ndarray, " place"],
) -> dict[str, float | None]:
    """Return means before and at the end, their difference, and its standard error."""
    if min(middle.sum(), late.sum()) < 2:
        return {"middle": None, "late": None, "rise": None, "standard_error": None}
    error = np.sqrt(
        values[middle].var(ddof=1) / middle.sum() + values[late].var(ddof=1) / late.sum()
    )
    before, after = float(values[middle].mean()), float(values[late].mean())
    return {
        "middle": before,
        "late": after,
        "rise": after - before,
        "standard_error": float(error),
    }


def _fitted_context(material: Material) -> int | None:
    """Return the sequence length that the lens was fitted on, where the table says so."""
    facts: Any = material.table.meta.lenses.get("tuned") or {}
    corpus: Any = facts.get("corpus") or {}
    return corpus.get("context")


def _head_mismatch(material: Material, number: int) -> dict[str, Any]:
    """Return how far the tuned lens's last row is from the head, and which temperature is best."""
    captured = material.captured
    hidden = material.lenses["tuned"].transform(
        captured.residual[number, -1, -1][None], material.model.n_layers
    )
    logits = material.model.unembedding.logits(hidden)[0]
    fit = best_temperature(logits, captured.logits[number])
    return {
        "kl_bits_tuned_final": fit.kl_bits,
        "kl_bits_tuned_final_after_tau_star": fit.kl_after_bits,
        "tau_star_modelcal": fit.temperature,
        "settled": fit.settled,
    }


def _bound(material: Material) -> float:
    settings = material.settings
    return settings.exact_bits_low if material.low else settings.exact_bits


def _judge(
    material: Material, per_pass: list[dict[str, Any]], on_text: dict[str, Any]
) -> tuple[dict[str, bool | None], list[str]]:
    """Return gates and warnings: drawn on text, and on the first pass where there is none."""
    basis = on_text if on_text["status"] == "ok" else per_pass[0]
    gains = basis["rotation_vs_temperature"]
    warnings: list[str] = []
    if basis is not on_text:
        warnings.append(f"the verdicts rest on one prompt: {on_text['reason']}")
    tuned, own = gains["delta_kl_tuned_p50"], _median_gain(per_pass)
    for where, gain in (("on held-out text", tuned), ("on the run's own prompts", own)):
        if not gain > 0.0:
            warnings.append(
                f"{where} the tuned lens is no nearer to the model than the norm lens: "
                f"{gain:.3g} bits gained at the median row"
            )
    more = _more_than_calibration(basis, warnings)
    generalises = _generalises(material, on_text, warnings)
    heads = [
        entry["head_mismatch"]["kl_bits_tuned_final"] <= _bound(material) for entry in per_pass
    ]
    if not all(heads):
        warnings.append(
            f"the last row of the tuned lens is not the head; temperature "
            f"{per_pass[0]['head_mismatch']['tau_star_modelcal']:.3g} comes nearest"
        )
    return {
        "tuned_gains_on_text": bool(tuned > 0.0),
        "tuned_gains_on_prompts": bool(own > 0.0),
        "tuned_is_more_than_calibration": more,
        "tuned_holds_at_later_positions": generalises,
        "tuned_last_row_is_head": all_hold(heads),
    }, [*warnings, *on_text.get("notes", [])]


def _gain(on_text: dict[str, Any]) -> float | None:
    return (on_text.get("rotation_vs_temperature") or {}).get("delta_kl_tuned_p50")


def _median_gain(per_pass: list[dict[str, Any]]) -> float:
    found = [entry["rotation_vs_temperature"]["delta_kl_tuned_p50"] for entry in per_pass]
    return float(np.median([value for value in found if value is not None]))


def _more_than_calibration(basis: dict[str, Any], warnings: list[str]) -> bool:
    """Say whether the lens beats one temperature per row; both may gain the same bits."""
    gains, beyond = basis["rotation_vs_temperature"], basis.get("beyond_temperature_p50")
    if basis["tuned_is_calibration_only"]:
        warnings.append(
            f"of {gains['delta_kl_tuned_p50']:.3g} bits gained, one temperature per row alone "
            f"gains {gains['delta_kl_temp_p50']:.3g}: the lens is little more than calibration"
        )
        return False
    if beyond is not None and not beyond > 0.0:
        warnings.append("one temperature per row, fitted alone, is nearer to the model")
        return False
    return True


def _generalises(material: Material, on_text: dict[str, Any], warnings: list[str]) -> bool | None:
    """Say whether the lens keeps its gain late in a sequence, beyond doubt.

    It fails where it gains less there and is further from the model there, both by more than the
    least gain that counts and by three standard errors: text may get easier, lenses may not.
    """
    along = on_text.get("positional")
    if not along or along["gain"]["rise"] is None:
        warnings.append("too few positions were read to say whether the gain lasts")
        return None
    least = material.config.measures.tuned_rotation_bits
    gain, left = along["gain"], along["kl_bits_tuned"]
    loses = -gain["rise"] > max(least, _SURE * gain["standard_error"])
    grows = left["rise"] > max(least, _SURE * left["standard_error"])
    if not (loses and grows):
        return True
    warnings.append(
        f"late in a sequence the tuned lens gains {gain['late']:.3g} bits instead of "
        f"{gain['middle']:.3g}: it does not carry over to later positions"
    )
    return False
