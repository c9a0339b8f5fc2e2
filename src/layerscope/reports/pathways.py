"""The page of a pathways run: audit, ranked edges, predicted against replayed, and the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from layerscope.experiments.pathways.results import Results
from layerscope.reports.page import (
    Bars,
    Figures,
    HeatMap,
    Lines,
    Multiples,
    Part,
    Reasons,
    Section,
    Table,
    Text,
    Widget,
    write_page,
)

_EDGES = 200  # ranked edges in the table
_POINTS = 1200  # of the scatter, drawn by lot beyond it
_TOKENS = 5
_LONG = 160  # characters of an offender
_SEVERITY = {"errors": "high", "warnings": "medium"}
_EDGE = (
    "prompt", "source", "at", "target", "attribution", "share", "predicted", "actual", "ratio",
    "random 95%", "q", "verdict",
)  # fmt: skip


def write_pathways(results: Results, path: Path) -> Path:
    """Write the page of what a run has found so far; raises OutputError when it cannot be written.

    Stages that were not run are left out.
    """
    sections = [_stages(results)]
    if results.audit is not None:
        sections.append(_audit(results.audit, results.causal))
    if results.graph is not None and results.graph["edges"]:
        sections.append(_graph(results.graph, results.summary, results.tokens))
    if results.edges is not None and results.edges.height:
        sections += [_replay(results), _edges(results)]
    if results.tokens is not None and results.tokens.height:
        sections.append(_tokens(results.tokens))
    return write_page(
        path,
        title="Feature pathways",
        kicker=Path(str(results.run["config"]["model"])).name,
        verdict=_verdict(results),
        sections=sections,
        provenance={name: value for name, value in results.run.items() if name != "stages"},
    )


def _verdict(results: Results) -> str:
    if results.audit is not None and not results.audit["validated"]:
        count = sum(each["count"] for each in results.audit["errors"])
        return f"The audit failed with {count} errors: nothing else was done."
    if results.replay is None:
        return "No edge has been replayed yet: what follows is what the stages so far found."
    verdicts, agreement = results.replay["verdicts"], results.replay["agreement"]
    if not agreement["n"]:
        return "No edge could be replayed."
    low, high = agreement["sign_agreement_interval"]
    return (
        f"Of {results.replay['edges']} edges that gradients proposed, replay confirmed "
        f"{verdicts.get('confirmed', 0)}, found {verdicts.get('nonlinear', 0)} nonlinear and "
        f"refuted {verdicts.get('refuted', 0)}. Signs agree in {agreement['sign_agreement']:.1%} "
        f"({low:.1%} to {high:.1%})."
    )


def _stages(results: Results) -> Section:
    stages: Mapping[str, Any] = results.run.get("stages", {})
    rows = [
        (
            name,
            of.get("seconds"),
            None if of.get("peak_memory_bytes") is None else of["peak_memory_bytes"] / 2**20,
            of.get("exit_code"),
            "kept from before" if of.get("skipped") else "done",
        )
        for name, of in stages.items()
    ]
    parts: list[Part] = []
    if results.causal is not None:
        prompts = results.prompts["prompts"] if results.prompts else []
        graph = results.graph or {"edges": [], "nodes": []}
        parts.append(
            Figures(
                [
                    ("causal features followed", results.causal["selected"], "targets"),
                    ("prompts", len(prompts), ""),
                    ("edges in the graph", len(graph["edges"]), "confirmed or nonlinear"),
                    ("features in the graph", len(graph["nodes"]), ""),
                ]
            )
        )
    columns = ("stage", "seconds", "peak memory, MiB", "exit code", "")
    parts.append(Table(columns, rows, "Stages"))
    return Section("The run", parts)


def _audit(audit: Mapping[str, Any], causal: Mapping[str, Any] | None) -> Section:
    parts: list[Part] = []
    found = [
        {
            "severity": _SEVERITY[kind],
            "message": f"{each['message']} ({each['count']}){_first(each['examples'])}",
            "action": "",
        }
        for kind in ("errors", "warnings")
        for each in audit[kind]
    ]
    if found:
        parts.append(Reasons(found))
    else:
        parts.append(Text(["The audit found nothing to object to."]))
    checkpoints, responses = audit.get("checkpoints", {}), audit.get("responses", {})
    join = audit.get("join", {})
    parts.append(
        Figures(
            [
                ("records in checkpoints", checkpoints.get("records"), ""),
                ("unique features", checkpoints.get("unique_features"), ""),
                ("causal", checkpoints.get("causal_features"), ""),
                ("responses", responses.get("records"), ""),
                ("parsed", responses.get("parse_rate"), "share"),
                ("distinct", responses.get("unique_share"), "share of the trials of a cell"),
                ("causal features with responses", join.get("coverage_of_causal"), "share"),
            ]
        )
    )
    conditions = responses.get("conditions", {})
    if conditions:
        parts.append(Bars(list(conditions), list(conditions.values()), "Responses by condition"))
    by_layer = checkpoints.get("causal_by_layer", {})
    if by_layer:
        chosen = (causal or {}).get("per_layer", {})
        rows = [(int(layer), count, chosen.get(layer, 0)) for layer, count in by_layer.items()]
        parts.append(
            Table(("layer", "causal features", "followed"), rows, "Causal features by layer")
        )
    if audit.get("inputs"):
        rows = [(name, value) for name, value in audit["inputs"].items()]
        parts.append(Table(("file", "SHA-256"), rows, "Files audited", folded=True))
    return Section("Audit of the causal features", parts, "Whether the data is what it says it is.")


def _graph(
    graph: Mapping[str, Any], summary: pl.DataFrame | None, tokens: pl.DataFrame | None
) -> Section:
    words = _words(summary, tokens)
    data = {
        "nodes": [
            {**node, "tokens": words.get((node["layer"], node["feature_id"]), [])}
            for node in graph["nodes"]
        ],
        "edges": list(graph["edges"]),
    }
    options = "".join(
        f'<option value="{value}">{label}</option>'
        for value, label in (
            ("all", "confirmed and nonlinear"),
            ("confirmed", "confirmed"),
            ("nonlinear", "nonlinear"),
        )
    )
    html = (
        '<div id="pathway-view"><div class="pathway-controls">'
        '<label>from <select data-control="low"></select></label>'
        '<label>to <select data-control="high"></select></label>'
        '<label>strongest edges <input type="range" min="1" data-control="count"></label>'
        f'<label>verdict <select data-control="verdict">{options}</select></label>'
        '<label><input type="checkbox" data-control="several"> in several prompts</label>'
        '<label><input type="checkbox" data-control="only"> only of the clicked feature</label>'
        '<button type="button" data-control="reset">arrange anew</button>'
        '<span data-status></span></div>'
        '<div class="pathway-panel" data-panel></div>'
        '<svg role="img" aria-label="graph of feature pathways"></svg></div>'
    )  # fmt: skip
    style = (
        ".pathway-controls{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;align-items:center;"
        "font-size:.86rem;margin:.6rem 0}"
        ".pathway-panel{min-height:7.6em;font-size:.86rem;border:1px solid var(--line);"
        "border-radius:4px;padding:.4rem .7rem;background:var(--panel);overflow-wrap:anywhere}"
        "#pathway-view svg{width:100%;touch-action:none;user-select:none}"
        "#pathway-view .edge.up{stroke:var(--pos)}#pathway-view .edge.down{stroke:var(--neg)}"
        "#pathway-view .edge.bent{stroke-dasharray:5 3}#pathway-view .edge:hover{opacity:1}"
        "#pathway-view .node{cursor:grab}#pathway-view .node rect{fill:var(--panel);"
        "stroke:var(--muted)}#pathway-view .node.causal rect{fill:var(--low);stroke:var(--accent)}"
        "#pathway-view .node.chosen rect{stroke:var(--ink);stroke-width:2.5}"
        "#pathway-view .node text{fill:var(--ink);font-size:11px}"
    )
    script = (Path(__file__).parent / "templates" / "pathways.js").read_text(encoding="utf-8")
    return Section(
        "The graph of pathways",
        [
            Widget("pathway-graph", data, script, html, style),
            Text(
                [
                    "Early blocks are at the bottom. Blue edges raise their target, orange ones "
                    "lower it, dashed ones are nonlinear; width is the attribution. Filled boxes "
                    "are the causal features that were followed, the others drive them.",
                ]
            ),
        ],
        "Only edges whose replay agreed in sign and went beyond random directions.",
    )


def _replay(results: Results) -> Section:
    assert results.edges is not None
    edges = results.edges.filter(pl.col("predicted").is_not_null() & pl.col("actual").is_not_null())
    parts: list[Part] = []
    if results.replay is not None and results.replay["agreement"]["n"]:
        agreement = results.replay["agreement"]
        low, high = agreement["sign_agreement_interval"]
        slope = agreement.get("slope_interval")
        between = f"{slope[0]:.2f} to {slope[1]:.2f}" if slope else ""
        parts.append(
            Figures(
                [
                    ("edges", agreement["n"], "at the strongest dose"),
                    ("signs agree", agreement["sign_agreement"], f"{low:.3f} to {high:.3f}"),
                    ("Pearson", agreement["pearson"], ""),
                    ("Spearman", agreement["spearman"], ""),
                    ("slope", agreement["slope"], between),
                    (
                        "beyond random directions",
                        results.replay["above_random_null"],
                        "share above what 95% of them stay below",
                    ),
                ]
            )
        )  # fmt: skip
    rows = edges.select("predicted", "actual", "null_quantile", "verdict").rows()
    if len(rows) > _POINTS:
        rows = Random(0).sample(rows, _POINTS)
    series: dict[str, list[tuple[float, float | None]]] = {}
    for predicted, actual, _, verdict in rows:
        series.setdefault(str(verdict), []).append((predicted, actual))
    drawings: list[HeatMap | Lines | Bars] = [
        Lines(
            dict(sorted(series.items())),
            "predicted change of the target",
            "replayed change",
            "Every edge: a right prediction lies on the diagonal",
            points=True,
        ),
        Lines(
            {
                "edges": [(abs(p), abs(a)) for p, a, _, _ in rows],
                "random null, 95%": [(abs(p), null) for p, _, null, _ in rows if null is not None],
            },
            "size of the prediction",
            "size of the replayed change",
            "The same beside what random directions of equal length do",
            points=True,
        ),
    ]
    if rows:
        parts.append(Multiples(drawings))
    parts += _agreements(results.replay)
    return Section(
        "Predicted against replayed",
        parts,
        "Gradients rank, replays prove: each edge was carried out by editing its source.",
    )


def _agreements(replay: Mapping[str, Any] | None) -> list[Part]:
    parts: list[Part] = []
    for key, name, title in (
        ("agreement_by_dose", "value of the source, times", "By dose"),
        ("agreement_by_layer_distance", "blocks between", "By distance"),
    ):
        rows = [
            (
                float(label), of["n"], of["sign_agreement"], *of["sign_agreement_interval"],
                of["pearson"], of["slope"],
            )
            for label, of in ((replay or {}).get(key) or {}).items()
            if of["n"]
        ]  # fmt: skip
        columns = (name, "edges", "signs agree", "low", "high", "Pearson", "slope")
        if rows:
            parts.append(Table(columns, rows, title))
    return parts


def _edges(results: Results) -> Section:
    assert results.edges is not None
    ranked = results.edges.sort(
        pl.col("attribution").abs(), "target_layer", "target_id", "source_layer", "source_id",
        descending=[True, False, False, False, False],
    ).head(_EDGES)  # fmt: skip
    rows = [
        (
            row["prompt_id"],
            f"L{row['source_layer']}-{row['source_id']}",
            f"{row['source_position']} {row['source_token']!r}",
            f"L{row['target_layer']}-{row['target_id']}",
            *(row[name] for name in ("attribution", "share", "predicted", "actual", "ratio")),
            row["null_quantile"],
            row["q"],
            row["verdict"],
        )
        for row in ranked.iter_rows(named=True)
    ]
    parts: list[Part] = [
        Table(_EDGE, rows, f"The {len(rows)} strongest of {results.edges.height} edges")
    ]
    pathways = results.pathways
    if pathways is not None and pathways.height:
        top = pathways.sort(pl.col("attribution").abs(), descending=True).head(_EDGES)
        columns = ("source", "target", "prompts", "attribution", "sign consistency", "p", "q")
        listed = [
            (
                f"L{row['source_layer']}-{row['source_id']}",
                f"L{row['target_layer']}-{row['target_id']}",
                row["n_prompts"],
                row["attribution"],
                row["sign_consistency"],
                row["p"],
                row["q"],
                row["verdict"],
            )
            for row in top.iter_rows(named=True)
        ]
        parts.append(
            Table((*columns, "verdict"), listed, "Pairs of features over all prompts", folded=True)
        )
    return Section(
        "Edges, ranked",
        parts,
        "Attribution is gradient times activation, in units of the target before its gate.",
    )


def _tokens(tokens: pl.DataFrame) -> Section:
    found = tokens.filter(pl.col("q") < 0.05).sort(
        "layer", "feature_id", "p", "logodds_z", descending=[False, False, False, True]
    )
    columns = ("feature", "corpus", "token", "n", "mean", "lift", "pmi", "p", "q")
    rows = [
        (f"L{row['layer']}-{row['feature_id']}", row["corpus"], repr(row["token"]),
         *(row[name] for name in columns[3:]))
        for row in found.iter_rows(named=True)
    ]  # fmt: skip
    return Section(
        "Tokens",
        [Table(columns, rows, f"{len(rows)} of {tokens.height} pairs have q < 0.05", folded=True)],
        "Tokens on which a feature is more active than on others, by a test that shuffles within "
        "prompts.",
    )


def _words(
    summary: pl.DataFrame | None, tokens: pl.DataFrame | None
) -> dict[tuple[int, int], list[str]]:
    """Return the foremost tokens of every feature that has some."""
    found: dict[tuple[int, int], list[str]] = {}
    if tokens is not None and tokens.height:
        for row in tokens.filter(pl.col("q") < 0.05).sort("p", "token").iter_rows(named=True):
            words = found.setdefault((row["layer"], row["feature_id"]), [])
            if row["token"] not in words and len(words) < _TOKENS:
                words.append(row["token"])
    if summary is not None and "top_tokens" in summary.columns:
        for row in summary.iter_rows(named=True):
            listed: Sequence[Mapping[str, Any]] = row["top_tokens"] or ()
            words = list(dict.fromkeys(each["token"] for each in listed))[:_TOKENS]
            if words:
                found[row["layer"], row["feature_id"]] = words
    return found


def _first(examples: Sequence[Mapping[str, Any]]) -> str:
    """Return the first offender, shortened."""
    if not examples:
        return ""
    words = ", ".join(f"{key} {value}" for key, value in examples[0].items())
    return f"; first: {words}" if len(words) <= _LONG else f"; first: {words[:_LONG]}…"
