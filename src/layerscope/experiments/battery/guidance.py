"""What a battery's figures may be used for: ranked reasons for doubt, and the pack to quote from.

Shares are over the real items of the lens to report with. A reason holds where a share passes its
threshold; thresholds stand in the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import polars as pl

from layerscope.experiments.battery.rollup import MILESTONES
from layerscope.experiments.battery.summarise import MOVED
from layerscope.measures.evidence import Reason
from layerscope.measures.guidance import rank, trust_of

HALF, SOME = 0.5, 0.2
ALIGNED = 0.9  # of a language's items, at least
FEW = 30  # items below which an interval of the median says little
MARGIN = 0.05  # of probability, by which an answer must lead where another one is right
PRIMARY = "norm"
_PACKED = (*MILESTONES, "delta_hat", "onset", "artifact_score", "paraphrase_iqr")
_ENTROPY = tuple(f"entropy_gap_bits_p{q}" for q in (25, 50, 75))

Summary = Mapping[str, Any]


def reporting_lens(lenses: Sequence[str]) -> str:
    """Return the lens whose figures are quoted: norm where it was run, else the first."""
    return PRIMARY if PRIMARY in lenses else lenses[0]


def guidance(summary: Summary, items: pl.DataFrame) -> dict[str, Any]:
    """Return trust, ranked reasons with their numbers, and how to report."""
    lens = reporting_lens(summary["lenses"])
    own = items.filter((pl.col("lens") == lens) & ~pl.col("invented"))
    found = summary["by_lens"][lens]
    reasons = rank(reason for rule in _RULES for reason in rule(summary, found, own))
    codes = {reason.code for reason in reasons}
    confirmed = found["confirmed_by"]
    return {
        "trust": trust_of(reasons),
        "reasons": [asdict(reason) for reason in reasons],
        "prefer_ranks": bool(codes & {"high_lens_artifact_score", "numeric_health_caution"}),
        "suppress_abs_probs": bool(codes & {"high_lens_artifact_score", "numeric_health_caution"}),
        "preferred_lens_for_reporting": lens,
        "use_confirmed_semantics": sum(confirmed.values()) > 2 * confirmed.get("none", 0),
    }


def evaluation_pack(
    summary: Summary, advice: Mapping[str, Any], tables: Mapping[str, pl.DataFrame]
) -> dict[str, Any]:
    """Return the figures to quote, each with the table and the 0-based row that it stands in."""
    lens = advice["preferred_lens_for_reporting"]
    found = summary["by_lens"][lens]
    overall = (
        tables["rollup"].with_row_index("row").filter(pl.col("lens") == lens, pl.col("by") == "all")
    )
    figures = {row["measure"]: row for row in overall.iter_rows(named=True)}
    keys = ("median", "median_low", "median_high", "iqr", "found", "missing", "median_all")
    return {
        "model": summary["model"],
        "n_layers": summary["n_layers"],
        "battery": summary["battery"],
        "lens": lens,
        "trust": advice["trust"],
        "figures": {
            name: {key: figures[name][key] for key in keys} for name in _PACKED if name in figures
        },
        "entropy": {name: figures[name]["median"] for name in _ENTROPY if name in figures},
        "shares": found["shares"],
        "permuted_rank_le_10_at_onset": found["permuted_rank_le_10_at_onset"],
        "artifact": {"tiers": found["tiers"]},
        "confirmed_by": found["confirmed_by"],
        "alignment": {entry["language"]: entry["alignment_rate"] for entry in summary["languages"]},
        "citations": {
            "rollup": {name: figures[name]["row"] for name in _PACKED if name in figures},
            "items": _cited(lens, figures, tables),
        },
    }


def _cited(
    lens: str, figures: Mapping[str, Any], tables: Mapping[str, pl.DataFrame]
) -> list[dict[str, Any]]:
    """Cite the first item whose onset is the lower quartile, the median and the upper quartile."""
    onset = figures.get("L_semantic")
    if onset is None or onset["median"] is None:
        return []
    items = (
        tables["items"]
        .with_row_index("row")
        .filter(pl.col("lens") == lens, ~pl.col("invented"), pl.col("L_semantic").is_not_null())
    )
    rows = tables["rows"].with_row_index("row").filter(pl.col("lens") == lens)
    cited: list[dict[str, Any]] = []
    for name in ("p25", "median", "p75"):
        nearest = (pl.col("L_semantic") - onset[name]).abs()
        item = items.sort(nearest, "row").row(0, named=True)
        at = rows.filter(
            pl.col("prompt_index") == item["prompt_index"], pl.col("layer") == item["L_semantic"]
        )
        cited.append(
            {
                "at": name,
                "item": item["item"],
                "L_semantic": item["L_semantic"],
                "items_row": item["row"],
                "rows_row": at["row"][0],
            }
        )
    return cited


def _share(found: Summary, name: str) -> float | None:
    return (found["shares"].get(name) or {}).get("share")


def _below(margins: pl.Series) -> float:
    return int((margins < MARGIN).sum()) / len(margins)


def _broken(_summary: Summary, found: Summary, _own: pl.DataFrame) -> Iterator[Reason]:
    if found["nonfinite_items"]:
        yield Reason(
            "numeric_health_caution",
            "high",
            f"NaN or infinity appeared in {found['nonfinite_items']} facts.",
            {"items": found["nonfinite_items"]},
            "Run again with --dtype float32, or bfloat16 instead of float16.",
        )


def _unanswered(_summary: Summary, found: Summary, _own: pl.DataFrame) -> Iterator[Reason]:
    right, reached = (_share(found, name) for name in ("answer_first_in_model", "reached"))
    if right is not None and right < 1 - SOME:
        yield Reason(
            "answer_not_final_top1",
            "high" if right < HALF else "medium",
            f"The model itself answers {right:.0%} of the facts; an onset of any other is not what "
            "it goes on to say.",
            {"share_right": right, "wanted": 1 - SOME},
            "Read the facts with answer_rank_model = 1 apart, or reword the question.",
        )
    if reached is not None and reached < HALF:
        yield Reason(
            "onset_of_the_few",
            "medium",
            f"Only {reached:.0%} of the facts have an onset, so its median is that of what is "
            "known.",
            {"share_reached": reached, "wanted": HALF},
            "Quote the share beside the median; median_all counts the others as never.",
        )


def _unsure(summary: Summary, found: Summary, _own: pl.DataFrame) -> Iterator[Reason]:
    tiers, confirmed = found["tiers"], found["confirmed_by"]
    high, alone = tiers.get("high", 0), confirmed.get("none", 0)
    if 2 * high > sum(tiers.values()):
        yield Reason(
            "high_lens_artifact_score",
            "medium",
            f"For {high} of {sum(tiers.values())} facts raw and norm lens disagree strongly.",
            {"tiers": tiers},
            "Report ranks, KL thresholds and confirmed onsets, not probabilities.",
        )
    if alone and alone >= HALF * sum(confirmed.values()):
        yield Reason(
            "semantics_unconfirmed",
            "high" if alone == sum(confirmed.values()) else "medium",
            f"For {alone} of {sum(confirmed.values())} facts with an onset no other lens confirms "
            "it.",
            {"confirmed_by": confirmed},
            "Quote the row as 'under the norm lens'; fit a tuned lens for an independent view.",
        )
    if sum(confirmed.values()) == 0 and len(summary["lenses"]) == 1:
        yield Reason(
            "no_second_lens",
            "medium",
            "Only one lens was run, so nothing confirms an onset.",
            {"lenses": list(summary["lenses"])},
            "Run with --lens raw,norm.",
        )


def _controls(_summary: Summary, found: Summary, own: pl.DataFrame) -> Iterator[Reason]:
    margin = own["control_margin_max"].drop_nulls()
    if len(margin) and (lost := _below(margin)) > SOME:
        yield Reason(
            "control_not_separated",
            "high" if lost >= HALF else "medium",
            f"Asked about France, at no layer does France's answer lead that of {lost:.0%} of the "
            "facts: the reading may not depend on what is asked.",
            {"share": lost, "margin": MARGIN, "facts": len(margin), "wanted": SOME},
            "Do not read the onset as knowledge of the fact.",
        )
    # A fact that is never read off has no probability to lose.
    known = own.filter(pl.col("L_semantic").is_not_null())
    negated = known["negation_margin_max"].drop_nulls()
    if len(negated) and (deaf := _below(negated)) >= HALF:
        yield Reason(
            "negation_ignored",
            "low",
            f"For {deaf:.0%} of the facts with an onset the answer is as likely after a negation.",
            {"share": deaf, "margin": MARGIN, "facts": len(negated)},
            "Read the onset as association, not as assertion.",
        )
    permuted = found["permuted_rank_le_10_at_onset"]
    if permuted["low"] is not None and permuted["low"] > max(permuted["chance"], SOME):
        yield Reason(
            "other_answers_close",
            "low",
            f"At the onset another item's answer is among the first ten for "
            f"{permuted['share']:.0%} of the facts: being among ten is no knowledge of one fact.",
            {**permuted},
            "Report rank 1, not ranks 5 and 10.",
        )


def _wording(_summary: Summary, found: Summary, _own: pl.DataFrame) -> Iterator[Reason]:
    stable = _share(found, "paraphrase_stable")
    if stable is not None and stable < HALF:
        yield Reason(
            "wording_sensitive",
            "medium",
            f"Under ten other wordings the onset holds still for {stable:.0%} of the facts.",
            {"share_stable": stable, "wanted": HALF},
            "Report the onset over wordings (paraphrase_onset_median, paraphrase_iqr).",
        )
    lost = {name: _share(found, f"onset_lost_{name}") for name in MOVED}
    gone = {name: share for name, share in lost.items() if share is not None and share > SOME}
    if gone:
        worst = max(gone, key=lambda name: gone[name])
        yield Reason(
            "onset_lost_by_form",
            "medium" if gone[worst] >= HALF else "low",
            f"Small changes of the prompt's form take the onset from {gone[worst]:.0%} of the "
            f"facts that have one ({worst}).",
            {"share_lost": gone, "wanted": SOME},
            "Name the exact prompt with the onset.",
        )


def _sample(summary: Summary, found: Summary, _own: pl.DataFrame) -> Iterator[Reason]:
    rates = {entry["language"]: entry["alignment_rate"] for entry in summary["languages"]}
    low = {name: rate for name, rate in rates.items() if rate is not None and rate < ALIGNED}
    if low:
        yield Reason(
            "gold_alignment_partial",
            "high" if min(low.values()) < HALF else "medium",
            f"In {', '.join(sorted(low))} fewer than {ALIGNED:.0%} of the facts could be aligned "
            "with the tokens; those left are easier ones.",
            {"alignment_rate": low, "wanted": ALIGNED},
            "Do not compare these languages with the others.",
        )
    shared = _share(found, "first_token_shared")
    if shared is not None and shared > SOME:
        yield Reason(
            "first_token_shared",
            "low",
            f"For {shared:.0%} of the facts another answer begins with the same token.",
            {"share": shared, "wanted": SOME},
            "Read the facts with first_token_shared = 0 apart.",
        )
    if found["items"] < FEW:
        yield Reason(
            "few_facts",
            "low",
            f"The battery has {found['items']} facts; the interval of a median is wide.",
            {"facts": found["items"], "wanted": FEW},
            f"Ask at least {FEW} facts.",
        )


_RULES = (_broken, _unanswered, _unsure, _controls, _wording, _sample)
