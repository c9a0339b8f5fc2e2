"""The page of a causal follow-up: onsets beside onsets, heads, directions, languages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.units import Outcome
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Lines,
    Multiples,
    Part,
    Section,
    Table,
    Text,
    write_page,
)

SITES = {
    "attn_out": "attention",
    "resid_mid": "stream after attention",
    "mlp_out": "MLP",
    "resid_post": "whole block",
}
STAGES = {
    "absent": "no answer in the battery",
    "alignment": "answer not aligned",
    "prompt": "prompt too long or not encodable",
    "in_prompt": "answer's first token in the prompt",
    "not_answered": "not answered by the model",
    "no_onset": "onset not confirmed",
    "no_partner": "no partner of that length with another answer",
    "corrupted_answered": "the corrupted prompt gives the same answer",
    "head_curve": "no curve of heads: too few facts",
    "direction": "no direction: too few facts",
    "other_question": "answer does not follow another question",
    "language": "cannot be asked in another language",
}
CONCEPT, RANDOM, ADD = "concept", "random", "add"
MOST_ROWS = 400


def write_follow_up(outcome: Outcome, path: Path) -> Path:
    """Write the page of a follow-up; returns the path."""
    summary = outcome.summary
    counts = summary["counts"]
    sections = [_onsets(outcome), _patches(outcome), _heads(summary), _directions(summary)]
    sections += [_mediation(summary), _languages(outcome), _items(outcome), _left_out(outcome)]
    if summary["warnings"]:
        sections.insert(0, Section("Take care", [Text(summary["warnings"])]))
    return write_page(
        path,
        title=f"{summary['model']}: causal follow-up",
        kicker=f"battery {summary['battery']}: {counts['followed']} of {counts['asked']} facts",
        verdict=summary["verdict"],
        sections=sections,
        provenance=outcome.provenance,
    )


def _onsets(outcome: Outcome) -> Section:
    """Compare the observed onset with the causal ones."""
    onsets, items = outcome.summary["onsets"], outcome.tables["items"]
    found = onsets["all"]
    figures = Figures(
        [
            ("observed onset", found["observed"], "median row, confirmed by another lens"),
            ("causal onset", found["causal"], "median row, MLP's or block's"),
            ("difference", found["difference"], "median, causal less observed, in rows"),
            ("within one row", _percent(found["within_one"]), "of all facts"),
            ("MLP by then", _percent(found["mlp_by_then"]), "rank 1 at or before the observed row"),
            (
                "control",
                _percent(found["control"]["share"]),
                f"a third subject's values, {found['control']['facts']} facts",
            ),
        ]
    )
    rows: list[list[Any]] = []
    for group, own in onsets.items():
        row = [group, own["facts"], own["observed"], own["causal"], own["difference"]]
        row += [_percent(own["within_one"]), _percent(own["mlp_by_then"])]
        for site in SITES:
            at = own["sites"][site]
            row += [at["median"], _percent(at["share"])]
        rows.append([*row, _percent(own["control"]["share"])])
    heads = ["facts of", "facts", "observed", "causal", "difference", "within one", "MLP by then"]
    for name in SITES.values():
        heads += [f"{name}: row", "reached"]
    table = Table([*heads, "control"], rows, "Median onsets, in rows of depth")
    counts = items.group_by("observed", "causal").len().drop_nulls().sort("observed", "causal")
    parts: list[Part] = [figures, table]
    if counts.height:
        parts.append(_grid(counts))
    lead = (
        "A patch counts as causal where it gives rank 1 and enough bits. Row k is what block k - 1 "
        "leaves."
    )
    return Section("Onsets", parts, lead)


def _grid(counts: pl.DataFrame) -> HeatMap:
    observed = sorted(set(counts["observed"].to_list()))
    causal = sorted(set(counts["causal"].to_list()))
    at = {(o, c): n for o, c, n in counts.iter_rows()}
    return HeatMap(
        [[at.get((o, c), 0) for c in causal] for o in observed],
        rows=[str(row) for row in observed],
        columns=[str(row) for row in causal],
        caption="Facts by observed and causal onset",
        unit="facts",
        row_title="observed row",
        column_title="causal row",
    )


def _patches(outcome: Outcome) -> Section:
    """Draw what patches gain by row and site, the control beside."""
    table = outcome.tables["patches"]
    means = (
        table.group_by("donor", "site", "row")
        .agg(pl.col("bits").median(), (pl.col("rank") == 1).mean().alias("rank1"))
        .sort("donor", "site", "row")
    )

    def series(column: str) -> dict[str, list[tuple[float, float | None]]]:
        found: dict[str, list[tuple[float, float | None]]] = {}
        for site, name in SITES.items():
            for donor, suffix in (("clean", ""), ("third", ", third subject")):
                own = means.filter((pl.col("site") == site) & (pl.col("donor") == donor))
                if own.height:
                    points = own.select("row", column).iter_rows()
                    found[name + suffix] = [(row, value) for row, value in points]
        return found

    if not means.height:
        return Section("Patches", [Text(["Nothing was patched."])])
    drawings = [
        Lines(series("bits"), "row", "bits", "Median gain of the answer"),
        Lines(series("rank1"), "row", "share", "Share of facts whose answer comes first"),
    ]
    missing = [f"{site}: {reason}" for site, reason in outcome.summary["unavailable"].items()]
    parts: list[Part] = [Multiples(drawings)]
    if missing:
        parts.append(Text(["Not on this model:", *missing]))
    return Section("Patches", parts, "Clean values put into the corrupted run at the answer slot.")


def _heads(summary: Mapping[str, Any]) -> Section:
    """Show the strongest heads, and what the first k do together."""
    parts: list[Part] = []
    for group, found in summary["heads"].items():
        rows = [
            [f"{r['block']}.{r['head']}", r["patch_bits"], r["ablate_bits"], r["facts"]]
            for r in found["top"]
        ]
        names = ["head", "gained when patched", "lost when ablated", "facts"]
        parts.append(Table(names, rows, f"{group}: strongest heads, mean bits"))
        lines = {
            f"{which} heads, {words}": [(row["k"], row[column]) for row in points]
            for which, points in found["curve"].items()
            for column, words in (("patch_bits", "patched"), ("ablate_bits", "ablated"))
            if points
        }
        if lines:
            caption = f"{group}: first k heads together, {found['held_out']} held-out facts"
            parts.append(Lines(lines, "heads", "bits (median)", caption))
    if not parts:
        parts.append(Text(["No head was scanned."]))
    lead = (
        "Heads within reach of each fact's onset, at the answer slot. Patched: clean values in the "
        "corrupted run. Ablated: the relation's mean in the clean run."
    )
    return Section("Heads", parts, lead)


def _directions(summary: Mapping[str, Any]) -> Section:
    """Show doses of each relation's direction on held-out prompts, random ones beside."""
    parts: list[Part] = []
    rows = summary["directions"]
    for relation, fitted in summary["fitted"].items():
        own = [row for row in rows if row["relation"] == relation]
        split_half = fitted["split_half"]
        parts.append(
            Text(
                [
                    f"{relation}: fitted after block {fitted['block']} ({fitted['anchor']} onset) "
                    f"on {fitted['facts']} facts, {fitted['held_out']} held out; its length is "
                    f"{fitted['norm'] / fitted['typical_norm']:.2f} of a typical residual's"
                    + ("" if split_half is None else f", halves agree with cosine {split_half:.2f}")
                    + "."
                ]
            )
        )
        drawings = [
            Lines(dict(_doses(own, name)), "multiples", "bits", name)
            for name in dict.fromkeys(row["set"] for row in own)
        ]
        parts += [Multiples(drawings), _dose_table(relation, own)]
    if not parts:
        parts.append(Text(["No direction was fitted."]))
    lead = (
        "What is asked, not of whom: the mean residual of a relation's questions less that of "
        "other questions about the same subjects. Index: bits gained per mass moved among the "
        "other top tokens, where any moved."
    )
    return Section("Directions", parts, lead)


def _doses(
    rows: Sequence[Mapping[str, Any]], name: str
) -> Iterator[tuple[str, list[tuple[float, float | None]]]]:
    for kind in (CONCEPT, RANDOM):
        own = [r for r in rows if (r["set"], r["direction"], r["operation"]) == (name, kind, ADD)]
        if own:
            points = [(0.0, 0.0), *((row["alpha"], row["bits"]) for row in own)]
            yield f"{kind} direction", sorted(points)


def _dose_table(relation: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = ["prompts", "number", "direction", "operation", "bits", "mass moved", "index"]
    heads += ["first before", "first after", "as wanted"]
    cells = [
        [
            row["set"],
            row["prompts"],
            row["direction"],
            "projected out" if row["alpha"] is None else f"{row['alpha']:+g}",
            row["bits"],
            row["moved"],
            row["index"],
            _percent(row["rank1_before"]),
            _percent(row["rank1"]),
            "yes" if row["as_wanted"] else "",
        ]
        for row in rows
    ]
    return Table(heads, cells, f"{relation}: medians of every set and strength", folded=True)


def _mediation(summary: Mapping[str, Any]) -> Section:
    """Show how much of a patch of the stream runs through the direction."""
    heads = ["relation", "prompts differ in", "direction", "pairs", "whole", "through", "around"]
    rows = [
        [
            row["relation"],
            "what is asked" if row["pair"] == "relation" else "of whom",
            row["direction"],
            row["pairs"],
            row["total_bits"],
            row["through_bits"],
            row["around_bits"],
            _percent(row["share"]),
        ]
        for row in summary["mediation"]
    ]
    if not rows:
        return Section("Mediation", [Text(["No direction was fitted."])])
    lead = (
        "The residual of one prompt put into another at the answer slot: whole, only its part "
        "along the direction, only the rest. Bits of the answer, medians."
    )
    return Section("Mediation", [Table([*heads, "share through"], rows)], lead)


def _languages(outcome: Outcome) -> Section:
    """Show what English MLP outputs do in other languages' prompts."""
    rows = outcome.summary["languages"]
    if not rows:
        return Section("Languages", [Text(["One language only: nothing to cross."])])
    names = {"source": "the fact in the first language", "own": "the fact in the language itself"}
    names["other"] = "a third subject in the first language"
    cells = [
        [
            row["language"],
            "yes" if row["answered"] else "no",
            names[row["donor"]],
            row["facts"],
            row["bits"],
            _percent(row["flip"]),
            _percent(row["same_token"]),
        ]
        for row in rows
    ]
    heads = ["language", "answered there", "MLP output of", "facts", "bits at the best block"]
    heads += ["flipped", "same first token"]
    table = outcome.tables["languages"]
    answered = table.filter("answered")
    drawn = answered if answered.height else table
    means = drawn.group_by("language", "donor", "row").agg(pl.col("bits").median()).sort("row")
    drawings = [
        Lines(
            {
                names[donor]: list(
                    means.filter((pl.col("language") == language) & (pl.col("donor") == donor))
                    .select("row", "bits")
                    .iter_rows()
                )
                for donor in names
                if means.filter(
                    (pl.col("language") == language) & (pl.col("donor") == donor)
                ).height
            },
            "row",
            "bits",
            f"{language}: median gain"
            + ("" if answered.height else " (facts that are not answered there)"),
        )
        for language in sorted(set(means["language"].to_list()))
    ]
    lead = "MLP outputs at the answer slot, put into the language's question about another subject."
    return Section("Languages", [Table([*heads], cells), Multiples(drawings)], lead)


def _items(outcome: Outcome) -> Section:
    items = outcome.tables["items"].head(MOST_ROWS)
    columns = ["item", "subject", "answer", "partner", "observed", "causal", "difference"]
    columns += [f"onset_{site}" for site in SITES] + ["bits_between"]
    table = Table(
        [name.replace("_", " ") for name in columns],
        [list(row) for row in items.select(columns).iter_rows()],
        f"{items.height} facts",
        folded=True,
    )
    return Section("Facts", [table])


def _left_out(outcome: Outcome) -> Section:
    excluded, counts = outcome.tables["excluded"], outcome.summary["counts"]["excluded"]
    if not counts:
        return Section("Left out", [Text(["Nothing was left out."])])
    names: list[str] = [STAGES.get(stage) or str(stage) for stage in counts]
    rows = [
        [row["item"], STAGES.get(row["stage"], row["stage"]), row["reason"]]
        for row in excluded.head(MOST_ROWS).iter_rows(named=True)
    ]
    more = f"the first {MOST_ROWS} of {excluded.height}" if excluded.height > MOST_ROWS else "all"
    return Section(
        "Left out",
        [
            Bars(names, list(counts.values()), "Facts left out, by reason"),
            Table(["item", "stage", "reason"], rows, f"What was left out and why ({more})", True),
        ],
    )


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"
