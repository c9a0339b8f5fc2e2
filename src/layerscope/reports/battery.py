"""The page of a battery run: where facts appear, how firmly, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    Lines,
    Multiples,
    Part,
    Reasons,
    Section,
    Table,
    Text,
    write_page,
)

COLUMNS = ("median", "median_low", "median_high", "iqr", "p10", "p90", "found", "missing")
HEAD = ("median", "from", "to", "IQR", "p10", "p90", "items found", "missing")
MOST_EXCLUDED = 400
VARIANTS = ("no_filler", "shift_1", "shift_3", "shift_7", "comma", "colon", "space")
LABELS = {
    "L_semantic": "answer is top-1 (onset)",
    "L_semantic_run2": "top-1 on two rows running",
    "L_semantic_strong": "top-1 with margin and gap",
    "L_semantic_confirmed": "onset confirmed by another lens",
    "first_rank_le_5": "answer among the first 5",
    "first_rank_le_10": "answer among the first 10",
    "first_kl_below_0.5": "within 0.5 bits of the end",
    "first_kl_below_1.0": "within 1 bit of the end",
    "L_copy": "echo of the prompt, strict",
    "L_copy_soft_k1": "echo of the prompt, soft",
}
STAGES = {
    "absent": "no answer in the battery",
    "alignment": "answer not aligned",
    "prompt": "prompt too long or not encodable",
    "in_prompt": "answer's first token in the prompt",
    "position": "no neutral text of that length",
}


def write_battery(outcome: Outcome, path: Path) -> Path:
    """Write the page of a battery run; returns the path."""
    summary = outcome.summary
    lens = _main_lens(summary)
    return write_page(
        path,
        title=f"{summary['model']}: {summary['counts']['items']} facts",
        kicker=f"battery {summary['battery']}, {summary['counts']['prompts']} prompts",
        verdict=verdict(summary, lens),
        sections=[
            _trust(summary),
            _headline(outcome, lens),
            _relations(outcome, lens),
            _languages(outcome, lens),
            _controls(outcome, lens),
            _strata(outcome, lens),
            _items(outcome, lens),
            _left_out(outcome),
        ],
        provenance=outcome.provenance,
    )


def verdict(summary: Mapping[str, Any], lens: str) -> str:
    """Say in a few sentences where the facts appear, and how far to believe it."""
    found = summary["by_lens"][lens]
    onset, reached = found["medians"].get("L_semantic"), found["shares"]["reached"]["share"]
    if onset is None or onset["median"] is None:
        return "No fact of the battery is ever the most likely token at any layer."
    depth = summary["n_layers"]
    lines = [
        f"{reached:.0%} of {found['items']} facts become top-1 somewhere; for those, the median "
        f"onset is row {onset['median']:g} of {depth} ({onset['median_low']:g} to "
        f"{onset['median_high']:g}, 95% bootstrap).",
    ]
    if onset["median_all"] is None:
        lines.append("Half of the facts or more never do, so this is the onset of what is known.")
    stable = found["shares"]["paraphrase_stable"]
    if stable["share"] is not None:
        lines.append(
            f"Under other wordings the onset holds still (IQR at most 5% of the depth) for "
            f"{stable['share']:.0%} of {stable['n']} facts."
        )
    tiers = found["tiers"]
    if tiers.get("high", 0) > sum(tiers.values()) / 2:
        lines.append(
            "For most facts the norm lens and the raw lens disagree strongly (artefact tier high): "
            "report ranks and confirmed onsets, not probabilities."
        )
    return " ".join(lines)


def _trust(summary: Mapping[str, Any]) -> Section:
    advice = summary["measurement_guidance"]
    lead = f"Trust: {advice['trust']}. Figures are quoted under the {_main_lens(summary)} lens."
    if advice["use_confirmed_semantics"]:
        lead += " Another lens confirms most onsets: quote confirmed ones."
    found = advice["reasons"]
    part = Reasons(found) if found else Text(["No reason for doubt was found."])
    return Section("How far to believe it", [part], lead)


def _main_lens(summary: Mapping[str, Any]) -> str:
    return summary["measurement_guidance"]["preferred_lens_for_reporting"]


def _rollup(outcome: Outcome, **wanted: str) -> pl.DataFrame:
    rows = outcome.tables["rollup"]
    return rows.filter(*(pl.col(name) == value for name, value in wanted.items()))


def _cells(row: Mapping[str, Any]) -> list[Any]:
    return [row[name] for name in COLUMNS]


def _headline(outcome: Outcome, lens: str) -> Section:
    summary = outcome.summary
    found = summary["by_lens"][lens]
    shares, permuted = found["shares"], found["permuted_rank_le_10_at_onset"]
    figures: list[tuple[str, Any, str]] = [
        ("facts asked", found["items"], f"{summary['counts']['prompts']} prompts in all"),
        ("reach top-1", _percent(shares["reached"]), _interval(shares["reached"])),
        (
            "model answers right",
            _percent(shares["answer_first_in_model"]),
            _interval(shares["answer_first_in_model"]),
        ),
    ]
    if permuted["share"] is not None:
        note = f"among the first 10 at the onset; chance {permuted['chance']:.2%}"
        figures.append(("another's answer", _percent(permuted), note))
    rows = [
        [entry, LABELS[row["measure"]], *_cells(row), row["median_all"]]
        for entry in summary["lenses"]
        for row in _rollup(outcome, lens=entry, by="all").iter_rows(named=True)
        if row["measure"] in LABELS
    ]
    table = Table(
        ("lens", "milestone", *HEAD, "median, missing = never"),
        rows,
        caption="Rows of depth over the facts that reach each milestone; from and to are the 95% "
        "bootstrap interval of the median.",
    )
    lead = "Row 0 is the embedding, row k the residual after block k - 1."
    return Section("Where the facts appear", [Figures(figures), table], lead)


def _relations(outcome: Outcome, lens: str) -> Section:
    """Draw, per relation, how many answers are top-1 and among the first ten at each row."""
    rows, prompts = outcome.tables["rows"], outcome.tables["prompts"]
    base = prompts.filter((pl.col("variant") == "orig") & (pl.col("lens") == lens))
    own = rows.filter((pl.col("lens") == lens) & (pl.col("variant") == "orig"))
    joined = own.join(
        base.select("prompt_index", "relation", "language"), on="prompt_index", how="inner"
    )
    drawings: list[Lines] = []
    for relation, language in _pairs(base):
        chosen = (pl.col("relation") == relation) & (pl.col("language") == language)
        depth = (
            joined.filter(chosen)
            .group_by("layer")
            .agg(
                (pl.col("answer_rank") == 1).mean().alias("top-1"),
                (pl.col("answer_rank") <= 10).mean().alias("among the first 10"),
                (pl.col("foil_rank") <= 10).mean().alias("another's answer, first 10"),
            )
            .sort("layer")
        )
        series = {
            name: [(float(x), y) for x, y in depth.select("layer", name).iter_rows()]
            for name in depth.columns[1:]
            if depth[name].is_not_null().any()
        }
        count = base.filter(chosen).height
        drawings.append(
            Lines(series, "row", "share of facts", f"{relation}, {language}: {count} facts")
        )
    lead = f"Share of facts by row, {lens} lens, plain question."
    return Section("Fact by fact, relation by relation", [Multiples(drawings)], lead)


def _pairs(base: pl.DataFrame) -> Iterator[tuple[str, str]]:
    names = base.select("relation", "language").unique().sort("relation", "language")
    yield from names.iter_rows()


def _languages(outcome: Outcome, lens: str) -> Section:
    onset = {
        row["group"]: row
        for row in _rollup(outcome, lens=lens, by="language", measure="L_semantic").iter_rows(
            named=True
        )
    }
    rows: list[list[Any]] = []
    for entry in outcome.summary["languages"]:
        found = onset.get(entry["language"])
        rate = entry["alignment_rate"]
        rows.append(
            [
                entry["language"],
                entry["tried"],
                None if rate is None else round(100 * rate, 1),
                entry["excluded_in_prompt"],
                entry["asked"],
                *(_cells(found) if found else [None] * len(COLUMNS)),
            ]
        )
    columns = ("language", "tried", "aligned, %", "answer in prompt", "asked")
    caption = "Onset (row) by language; tried and asked count invented subjects too."
    pairs = _rollup(outcome, lens=lens, by="relation/language", measure="L_semantic")
    spread = Bars(
        labels=pairs["group"].to_list(),
        values=pairs["median"].to_list(),
        caption="Median onset row with its 95% interval, by relation and language.",
        unit="row",
        errors=[_ends(row) for row in pairs.iter_rows(named=True)],
    )
    return Section("Languages", [Table((*columns, *HEAD), rows, caption=caption), spread])


def _controls(outcome: Outcome, lens: str) -> Section:
    overall = {
        row["measure"]: row for row in _rollup(outcome, lens=lens, by="all").iter_rows(named=True)
    }
    shares = outcome.summary["by_lens"][lens]["shares"]
    rows: list[list[Any]] = []
    for name in VARIANTS:
        row = overall.get(f"onset_shift_{name}")
        if row is not None and row["found"]:
            lost = shares.get(f"onset_lost_{name}", {}).get("share")
            rows.append([f"onset, {name} minus plain (rows)", *_cells(row)[:-1], _rounded(lost)])
    for name in ("reversed", "wrong_role"):
        row, lost = overall.get(f"asymmetry_{name}"), shares.get(f"onset_lost_{name}")
        if row is not None or lost is not None:
            cells = _cells(row)[:-1] if row is not None else [None] * (len(COLUMNS) - 1)
            label = f"asymmetry, plain minus {name} (share of depth)"
            rows.append([label, *cells, _rounded(lost["share"]) if lost else None])
    for name, label in (
        ("paraphrase_iqr", "IQR of the onset over paraphrases (share of depth)"),
        ("invariance_index", "invariance index (1 - IQR)"),
        ("negation_margin_max", "largest p(answer | plain) - p(answer | negated)"),
        ("control_margin_at_onset", "p(Paris) - p(answer) when France is asked, at the onset row"),
        ("foil_rank_at_onset", "rank of another's answer at the onset"),
        ("delta_hat", "delta-hat: onset minus echo (share of depth)"),
        ("artifact_score", "artefact score, norm against raw"),
    ):
        row = overall.get(name)
        if row is not None and row["found"]:
            rows.append([label, *_cells(row)[:-1], None])
    parts: list[Part] = [
        Table(
            ("control", *HEAD[:-1], "onset lost, share"),
            rows,
            caption="Controls over the facts that have both values.",
        )
    ]
    found = outcome.summary["by_lens"][lens]
    counts = [[f"artefact tier {k}", v] for k, v in found["tiers"].items()]
    counts += [[f"onset confirmed by {k}", v] for k, v in found["confirmed_by"].items()]
    if counts:
        parts.append(Table(("facts by", "count"), counts))
    shared = found["shares"]["first_token_shared"]["share"]
    if shared:
        parts.append(
            Text(
                [
                    f"An answer is known by its first token. For {shared:.0%} of the facts another "
                    "answer of the same relation begins with the same token."
                ]
            )
        )
    return Section("Controls", parts, "What else would move the onset, and what must not show it.")


def _strata(outcome: Outcome, lens: str) -> Section:
    rows = [
        [by, row["group"], *_cells(row)]
        for by in ("relation", "frequency", "name_length", "novelty")
        for row in _rollup(outcome, lens=lens, by=by, measure="L_semantic").iter_rows(named=True)
    ]
    table = Table(("by", "stratum", *HEAD), rows, caption="Onset row by stratum.")
    return Section("Strata", [table])


def _items(outcome: Outcome, lens: str) -> Section:
    names = ("item", "subject", "answer", "answer_rank_model", "L_semantic", "L_copy", "delta_hat")
    extra = ("paraphrase_iqr", "foil_rank_at_onset", "artifact_tier", "confirmed_source")
    table = outcome.tables["items"].filter(pl.col("lens") == lens)
    columns = [name for name in (*names, *extra) if name in table.columns]
    rows = [list(row) for row in table.select(columns).iter_rows()]
    caption = f"All {len(rows)} facts, {lens} lens"
    return Section("Facts", [Table(columns, rows, caption=caption, folded=True)])


def _left_out(outcome: Outcome) -> Section:
    excluded = outcome.tables["excluded"]
    if not excluded.height:
        return Section("Left out", [Text(["Nothing: every item could be asked in every way."])])
    counts = excluded["stage"].value_counts().sort("stage")
    rows = [[STAGES.get(stage, stage), number] for stage, number in counts.iter_rows()]
    shown = excluded.head(MOST_EXCLUDED).select("item", "variant", "stage", "reason")
    caption = f"{shown.height} of {excluded.height}; all are in excluded.parquet"
    return Section(
        "Left out",
        [
            Table(("why", "count"), rows),
            Table(shown.columns, [list(row) for row in shown.iter_rows()], caption, folded=True),
        ],
    )


def _percent(share: Mapping[str, Any]) -> str:
    return "-" if share["share"] is None else f"{share['share']:.0%}"


def _interval(share: Mapping[str, Any]) -> str:
    if share["share"] is None:
        return ""
    return f"{share['low']:.0%} to {share['high']:.0%} (95%), n = {share['n']}"


def _ends(row: Mapping[str, Any]) -> tuple[float, float] | None:
    if row["median_low"] is None:
        return None
    return row["median_low"], row["median_high"]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
