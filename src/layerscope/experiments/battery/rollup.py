"""From items to the model: medians with intervals, shares, and what is missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from layerscope.experiments.battery.questions import SHIFTS
from layerscope.experiments.battery.summarise import MOVED, ROLES
from layerscope.measures.detectors import percentile

MILESTONES = (
    "L_semantic",
    "L_semantic_run2",
    "L_semantic_margin_ok",
    "L_semantic_strong",
    "L_semantic_confirmed",
    "first_rank_le_1",
    "first_rank_le_5",
    "first_rank_le_10",
    "first_kl_below_0.5",
    "first_kl_below_1.0",
    "L_copy",
    "L_copy_soft_k1",
    "negation_margin_first_positive",
    "control_margin_first_positive",
)
MEASURES = (
    "onset",
    "delta_hat",
    "entropy_gap_bits_p25",
    "entropy_gap_bits_p50",
    "entropy_gap_bits_p75",
    "p_answer_at_onset",
    "p_answer_last",
    "answer_rank_last",
    "foil_rank_at_onset",
    "kl_to_final_bits_last",
    "artifact_score",
    "paraphrase_iqr",
    "paraphrase_range",
    "invariance_index",
    "negation_margin_max",
    "control_margin_max",
    "control_margin_at_onset",
    *(f"onset_shift_{name}" for name in MOVED),
    *(f"delta_hat_shift_{name}" for name in MOVED),
    *(f"asymmetry_{name}" for name in ROLES),
)
GROUPED = ("relation", "language", "frequency", "name_length")
PER_GROUP = ("L_semantic", "onset", "delta_hat", "paraphrase_iqr", "first_kl_below_1.0")
SCHEMA: dict[str, pl.DataType] = {
    "lens": pl.String(),
    "by": pl.String(),
    "group": pl.String(),
    "measure": pl.String(),
    "n": pl.Int64(),
    "found": pl.Int64(),
    "missing": pl.Int64(),
    "median": pl.Float64(),
    "median_low": pl.Float64(),
    "median_high": pl.Float64(),
    "p10": pl.Float64(),
    "p25": pl.Float64(),
    "p75": pl.Float64(),
    "p90": pl.Float64(),
    "iqr": pl.Float64(),
    "median_all": pl.Float64(),
}


def rollup_table(items: pl.DataFrame, *, seed: int, resamples: int) -> pl.DataFrame:
    """Return one row per lens, group and measure, over the real items (or the invented ones).

    `n` items were asked, `missing` of them never reached the milestone (or lack the value), and
    the statistics are over the `found` ones. `median_low` and `median_high` are the 2.5 and 97.5
    percentiles of the bootstrap of the median. `median_all`, for milestones, is the median over
    all items with missing ones counted as never: null when it falls on one.
    """
    records: list[dict[str, Any]] = []
    for lens in items["lens"].unique(maintain_order=True).sort():
        own = items.filter(pl.col("lens") == lens)
        for by, group, members in _groups(own):
            wanted = (*MILESTONES, *MEASURES) if by == "all" else PER_GROUP
            for name in wanted:
                if name not in members.columns:
                    continue
                values = members[name].cast(pl.Float64)
                if by != "all" or values.is_not_null().any() or name in MILESTONES:
                    rng = generator(seed, lens, by, group, name)
                    found = describe(values, rng=rng, resamples=resamples)
                    if name in MILESTONES or name == "onset":
                        found["median_all"] = median_with_never(values)
                    key = {"lens": lens, "by": by, "group": group, "measure": name}
                    records.append(key | found)
    return pl.DataFrame(records, schema=SCHEMA)


def _groups(items: pl.DataFrame) -> Iterator[tuple[str, str, pl.DataFrame]]:
    real = items.filter(~pl.col("invented"))
    yield "all", "all", real
    for by in GROUPED:
        for group in real[by].drop_nulls().unique().sort():
            yield by, group, real.filter(pl.col(by) == group)
    pairs = real.select("relation", "language").unique().sort("relation", "language")
    for relation, language in pairs.iter_rows():
        chosen = (pl.col("relation") == relation) & (pl.col("language") == language)
        yield "relation/language", f"{relation}/{language}", real.filter(chosen)
    invented = items.filter(pl.col("invented"))
    if invented.height:
        yield "novelty", "invented", invented


def generator(seed: int, *name: str) -> np.random.Generator:
    """Return a generator that depends on the seed and on what it is for, not on the order."""
    digest = hashlib.sha256("\0".join(name).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def describe(values: pl.Series, *, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    """Return count, missing, percentiles and the bootstrap interval of the median."""
    known = np.sort(values.drop_nulls().to_numpy())
    n, found = len(values), len(known)
    quantiles = {q: percentile(known, q) for q in (0.1, 0.25, 0.5, 0.75, 0.9)}
    low, high = median_interval(known, rng=rng, resamples=resamples)
    p25, p75 = quantiles[0.25], quantiles[0.75]
    return {
        "n": n,
        "found": found,
        "missing": n - found,
        "median": quantiles[0.5],
        "median_low": low,
        "median_high": high,
        "p10": quantiles[0.1],
        "p25": p25,
        "p75": p75,
        "p90": quantiles[0.9],
        "iqr": None if p25 is None or p75 is None else p75 - p25,
    }


def median_with_never(values: pl.Series) -> float | None:
    """Return the median where unknown values are larger than all others, None if it is one."""
    known, n = np.sort(values.drop_nulls().to_numpy()), len(values)
    if not n or n // 2 >= len(known):
        return None
    return float((known[(n - 1) // 2] + known[n // 2]) / 2)


def median_interval(
    known: Float[np.ndarray, " found"], *, rng: np.random.Generator, resamples: int
) -> tuple[float | None, float | None]:
    """Return the 2.5 and 97.5 percentiles of the bootstrap of the median of sorted values.

    The median of a resample is an order statistic of n indices drawn uniformly, so that indices
    are drawn from its distribution (a Beta, and for an even n the next one given the first)
    instead of drawing n values and sorting them.
    """
    n = len(known)
    if not n:
        return None, None
    k = (n + 1) // 2
    first = rng.beta(k, n - k + 1, resamples)
    indices = np.minimum((first * n).astype(np.int64), n - 1)
    medians = known[indices]
    if n % 2 == 0:
        second = 1.0 - (1.0 - first) * rng.random(resamples) ** (1.0 / (n - k))
        medians = (medians + known[np.minimum((second * n).astype(np.int64), n - 1)]) / 2
    return percentile(medians, 0.025), percentile(medians, 0.975)


def share(flags: pl.Series, *, rng: np.random.Generator, resamples: int) -> dict[str, Any]:
    """Return the share of true flags among the known ones, with its bootstrap interval."""
    known = flags.drop_nulls()
    n, hits = len(known), int(known.sum())
    if not n:
        return {"n": 0, "share": None, "low": None, "high": None}
    drawn = rng.binomial(n, hits / n, resamples) / n
    return {
        "n": n,
        "share": hits / n,
        "low": percentile(drawn, 0.025),
        "high": percentile(drawn, 0.975),
    }


def summary(
    items: pl.DataFrame,
    rollup: pl.DataFrame,
    *,
    d_vocab: int,
    seed: int,
    resamples: int,
    lenses: Sequence[str],
) -> dict[str, Any]:
    """Return, per lens, the shares and counts that the roll-up's medians do not hold."""
    return {
        lens: _of_lens(
            items.filter((pl.col("lens") == lens) & ~pl.col("invented")),
            rollup.filter((pl.col("lens") == lens) & (pl.col("by") == "all")),
            d_vocab=d_vocab,
            seed=seed,
            resamples=resamples,
        )
        for lens in lenses
    }


def _of_lens(
    own: pl.DataFrame, overall: pl.DataFrame, *, d_vocab: int, seed: int, resamples: int
) -> dict[str, Any]:
    lens = own["lens"][0] if own.height else ""

    def of(name: str, flags: pl.Series) -> dict[str, Any]:
        return share(flags, rng=generator(seed, lens, "share", name), resamples=resamples)

    foil = own["foil_rank_at_onset"]
    shares = {
        "reached": of("reached", own["L_semantic"].is_not_null()),
        "answer_first_at_last_row": of("last", own["answer_rank_last"] == 1),
        "answer_first_in_model": of("model", own["answer_rank_model"] == 1),
        "paraphrase_stable": of("paraphrase_stable", own["paraphrase_stable"]),
        "first_token_shared": of("first_token_shared", own["first_token_shared"] > 0),
    }
    shares |= {
        f"onset_lost_{name}": of(name, own[f"onset_lost_{name}"])
        for name in (*MOVED, *ROLES)
        if own[f"onset_lost_{name}"].is_not_null().any()
    }
    permuted = of("permuted", foil <= 10) | {"chance": min(1.0, 10 / d_vocab)}
    names = ("L_semantic", "onset", "delta_hat", "invariance_index", "paraphrase_iqr")
    medians = {
        row["measure"]: {name: row[name] for name in row if name not in ("lens", "by", "group")}
        for row in overall.filter(pl.col("measure").is_in(names)).iter_rows(named=True)
    }
    return {
        "items": own.height,
        "medians": medians,
        "missing": {
            row["measure"]: row["missing"]
            for row in overall.filter(pl.col("measure").is_in(MILESTONES)).iter_rows(named=True)
        },
        "shares": shares,
        "permuted_rank_le_10_at_onset": permuted,
        "tiers": _counts(own["artifact_tier"]),
        # Without an onset there is nothing to confirm.
        "confirmed_by": _counts(own.filter(own["L_semantic"].is_not_null())["confirmed_source"]),
        "nonfinite_items": int((own["nonfinite_rows"] > 0).sum()),
        "shifts_in_tokens": list(SHIFTS),
    }


def _counts(values: pl.Series) -> dict[str, int]:
    known = values.drop_nulls()
    return dict(sorted(zip(*known.value_counts().to_dict(as_series=False).values(), strict=True)))


def by_language(
    items: pl.DataFrame, excluded: pl.DataFrame, tried: dict[tuple[str, str], int]
) -> list[dict[str, Any]]:
    """Return alignment and exclusion per language: how many items, how many could be asked."""
    found: list[dict[str, Any]] = []
    whole = excluded.filter(pl.col("variant").is_in(["orig", "novel"]))
    for language in sorted({language for _, language in tried}):
        count = sum(number for (_, other), number in tried.items() if other == language)
        own = whole.filter(pl.col("language") == language)
        stages = {
            stage: own.filter(pl.col("stage") == stage).height
            for stage in ("absent", "alignment", "prompt", "in_prompt")
        }
        failed = stages["alignment"] + stages["prompt"]
        found.append(
            {
                "language": language,
                "tried": count,
                "aligned": count - failed,
                "alignment_rate": (count - failed) / count if count else None,
                "asked": items.filter(pl.col("language") == language)["item"].n_unique(),
                **{f"excluded_{stage}": number for stage, number in stages.items()},
            }
        )
    return found
