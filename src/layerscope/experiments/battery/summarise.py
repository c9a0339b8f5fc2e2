"""One row per item and lens: its milestones, and how they answer to every control.

All columns are those of the plain question (of `novel` for an invented subject) unless their name
says otherwise. Shifts are in rows of depth, variant minus plain question.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from layerscope.experiments.battery.questions import BASE, SHIFTS
from layerscope.measures.detectors import first_true, percentile

KEY = ["item", "lens"]
MOVED = ("no_filler", *(f"shift_{shift}" for shift in SHIFTS), "comma", "colon", "space")
ROLES = ("reversed", "wrong_role")
STABLE_IQR = 0.05  # of the depth; what counts as invariant to wording
MIN_PARAPHRASES = 3  # with an onset, so that their spread says anything


def with_margins(rows: pl.DataFrame, prompts: pl.DataFrame, controls: pl.DataFrame) -> pl.DataFrame:
    """Add the negation margin (rows of `no_filler`) and the control margin (rows of `orig`).

    The first is p(answer | plain) - p(answer | negated), the second p(control's answer) - p(item's
    answer) after the control's question; both at the same row and lens.
    """
    names = prompts.select("prompt_index", "item", "variant").unique(maintain_order=True)
    rows = rows.join(names, on="prompt_index", how="left", maintain_order="left")
    negated = rows.filter(pl.col("variant") == "negated").select(
        *KEY, "layer", pl.lit("no_filler").alias("variant"), pl.col("p_answer").alias("_negated")
    )
    margins = controls.select(
        *KEY,
        "layer",
        pl.lit("orig").alias("variant"),
        (pl.col("p_control") - pl.col("p_item")).alias("control_margin"),
    )
    on = [*KEY, "layer", "variant"]
    rows = rows.join(negated, on=on, how="left", maintain_order="left")
    rows = rows.join(margins, on=on, how="left", maintain_order="left")
    rows = rows.with_columns((pl.col("p_answer") - pl.col("_negated")).alias("negation_margin"))
    front = ["prompt_index", "item", "variant", "lens", "layer"]
    rest = [name for name in rows.columns if name not in front and name != "_negated"]
    return rows.select(*front, *rest)


def items_table(prompts: pl.DataFrame, rows: pl.DataFrame, *, n_layers: int) -> pl.DataFrame:
    """Return one row per item and lens; see the module."""
    base = prompts.filter(pl.col("variant").is_in(BASE)).drop("part")
    table = _moved(base, prompts, n_layers)
    table = table.join(_dispersion(prompts, n_layers), on=KEY, how="left", maintain_order="left")
    table = table.join(
        _margin(rows, "no_filler", "negation_margin"), on=KEY, how="left", maintain_order="left"
    )
    table = table.join(
        _margin(rows, "orig", "control_margin"), on=KEY, how="left", maintain_order="left"
    )
    at_onset = rows.select(
        *KEY, "variant", pl.col("layer").alias("L_semantic"), "control_margin"
    ).filter(pl.col("variant").is_in(BASE))
    return table.join(
        at_onset.rename({"control_margin": "control_margin_at_onset"}),
        on=[*KEY, "variant", "L_semantic"],
        how="left",
        maintain_order="left",
    )


def _moved(base: pl.DataFrame, prompts: pl.DataFrame, n_layers: int) -> pl.DataFrame:
    """Add what each variant does to the onset and to delta-hat, and the asymmetry of roles."""
    for variant in (*MOVED, *ROLES):
        other = prompts.filter(pl.col("variant") == variant).select(
            *KEY, pl.col("L_semantic").alias("_onset"), pl.col("delta_hat").alias("_delta")
        )
        base = base.join(
            other.with_columns(pl.lit(True).alias("_asked")),
            on=KEY,
            how="left",
            maintain_order="left",
        )
        shift = pl.col("_onset") - pl.col("L_semantic")
        if variant in ROLES:  # positive where the wrong way round comes earlier
            added = [(-shift / n_layers).alias(f"asymmetry_{variant}")]
        else:
            added = [
                shift.alias(f"onset_shift_{variant}"),
                (pl.col("_delta") - pl.col("delta_hat")).alias(f"delta_hat_shift_{variant}"),
            ]
        lost = (
            pl.when(pl.col("_asked") & pl.col("L_semantic").is_not_null())
            .then(pl.col("_onset").is_null())
            .alias(f"onset_lost_{variant}")
        )
        base = base.with_columns(*added, lost).drop("_onset", "_delta", "_asked")
    return base


def _dispersion(prompts: pl.DataFrame, n_layers: int) -> pl.DataFrame:
    """Return how far the onset moves over an item's paraphrases, as fractions of depth.

    The invariance index is 1 - IQR / n_layers, IQR in rows; spread and index need three onsets.
    """
    asked = prompts.filter(pl.col("part") == "paraphrases").select(*KEY, "onset")
    grouped = asked.group_by(KEY, maintain_order=True).agg(pl.col("onset"))
    records: list[dict[str, object]] = []
    for item, lens, onsets in grouped.iter_rows():
        known = pl.Series(onsets, dtype=pl.Float64).drop_nulls().to_numpy()
        low, high = (percentile(known, q) for q in (0.25, 0.75))
        enough = low is not None and high is not None and len(known) >= MIN_PARAPHRASES
        iqr = high - low if enough and low is not None and high is not None else None
        records.append(
            {
                "item": item,
                "lens": lens,
                "paraphrases": len(onsets),
                "paraphrases_with_onset": len(known),
                "paraphrase_onset_median": percentile(known, 0.5),
                "paraphrase_iqr": iqr,
                "paraphrase_range": float(known.max() - known.min()) if enough else None,
                "paraphrase_stable": None if iqr is None else bool(iqr <= STABLE_IQR),
                "invariance_index": None if iqr is None else 1.0 - iqr,
            }
        )
    schema = {
        "item": pl.String,
        "lens": pl.String,
        "paraphrases": pl.Int64,
        "paraphrases_with_onset": pl.Int64,
        "paraphrase_onset_median": pl.Float64,
        "paraphrase_iqr": pl.Float64,
        "paraphrase_range": pl.Float64,
        "paraphrase_stable": pl.Boolean,
        "invariance_index": pl.Float64,
    }
    return pl.DataFrame(records, schema=schema)


def _margin(rows: pl.DataFrame, variant: str, name: str) -> pl.DataFrame:
    """Return the first row where a margin is positive, and its largest value, per item and lens."""
    known = rows.filter((pl.col("variant") == variant) & pl.col(name).is_not_null())
    grouped = known.group_by(KEY, maintain_order=True).agg("layer", name)
    records: list[dict[str, object]] = []
    for item, lens, layers, values in grouped.iter_rows():
        margins, at = pl.Series(values).to_numpy(), pl.Series(layers).to_numpy()
        records.append(
            {
                "item": item,
                "lens": lens,
                f"{name}_first_positive": first_true(margins > 0, at),
                f"{name}_max": float(margins.max()),
            }
        )
    schema = {
        "item": pl.String,
        "lens": pl.String,
        f"{name}_first_positive": pl.Int64,
        f"{name}_max": pl.Float64,
    }
    return pl.DataFrame(records, schema=schema)


def numeric_columns(items: pl.DataFrame, wanted: Sequence[str]) -> list[str]:
    """Return the wanted columns that are numbers or flags and are known somewhere."""
    return [
        name
        for name in wanted
        if name in items.columns
        and (items.schema[name].is_numeric() or items.schema[name] == pl.Boolean)
        and items[name].is_not_null().any()
    ]
