"""Everything joined by typed feature id: features, edges, tokens, summaries, graphs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.errors import TableError
from layerscope.experiments.pathways.graph import SUPPORTED, build, graphml
from layerscope.experiments.pathways.manifest import (
    StageResult,
    read_partitions,
    write_jsonl,
    write_parquet,
)
from layerscope.experiments.pathways.neuronpedia import viewer_graph
from layerscope.experiments.pathways.targets import selected
from layerscope.experiments.pathways.workspace import (
    EDGES,
    FEATURE_FIGURES,
    INTEGRATED,
    OVER_PROMPTS,
    TOKENS,
    Workspace,
)
from layerscope.features.spaces import KEYS, join
from layerscope.files import safe_name, write_json, write_text

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def run_integrate(work: Workspace) -> StageResult:
    """Write ``features``, ``edges``, ``tokens``, ``feature_summary``, and the graphs."""
    causal = pl.DataFrame(selected(work), infer_schema_length=None)
    edges = read_partitions(work.need(EDGES, "replay"))
    pathways = pl.read_parquet(work.need(OVER_PROMPTS, "replay"))
    tokens = pl.read_parquet(work.need(TOKENS, "tokens"))
    figures = pl.read_parquet(work.need(FEATURE_FIGURES, "tokens"))
    features = join(causal, figures, how="left")
    summary = summarise(features, pathways, tokens, top=work.config.top_tokens, fdr=work.config.fdr)
    if summary.height != causal.height:
        raise TableError(
            f"integration gave {summary.height} rows for {causal.height} causal features; the "
            "tables hold a feature twice: run tokens and select again"
        )
    outputs: list[str] = []
    for name, table in (
        ("features", features),
        ("edges", edges),
        ("pathways", pathways),
        ("tokens", tokens),
        ("feature_summary", summary),
    ):
        parquet, lines = f"{INTEGRATED}/{name}.parquet", f"{INTEGRATED}/{name}.jsonl"
        stamped = table.with_columns(schema_version=pl.lit(SCHEMA_VERSION))
        write_parquet(work.path(parquet), stamped)
        write_jsonl(work.path(lines), stamped.to_dicts())
        outputs += [parquet, lines]
    known = {(row["layer"], row["feature_id"]): row for row in causal.to_dicts()}
    graph = build(pathways, known)
    write_json(
        work.path(f"{INTEGRATED}/graph.json"), {"schema_version": 1, **graph.to_dict()}, indent=None
    )
    write_text(work.path(f"{INTEGRATED}/graph.graphml"), graphml(graph))
    outputs += [f"{INTEGRATED}/graph.json", f"{INTEGRATED}/graph.graphml"]
    outputs += _viewer_files(work, edges, _labels(tokens, work.config.fdr))
    driven = set(pathways.select("target_layer", "target_id").iter_rows())
    told = set(tokens.select("layer", "feature_id").iter_rows())
    counts: dict[str, Any] = {
        "causal_features": causal.height,
        "rows": summary.height,
        "without_edges": sum(1 for key in known if key not in driven),
        "without_tokens": sum(1 for key in known if key not in told),
        "graph_nodes": len(graph.nodes),
        "graph_edges": len(graph.edges),
        "pathways": pathways.height,
        "edges": edges.height,
    }
    if work.config.source_compat:
        outputs += _earlier_names(work, edges, summary)
    write_json(
        work.path(f"{INTEGRATED}/summary.json"), {"schema_version": SCHEMA_VERSION, **counts}
    )
    outputs.append(f"{INTEGRATED}/summary.json")
    _log.info("%d features, %d edges in the graph", summary.height, len(graph.edges))
    notes: tuple[str, ...] = ()
    if not graph.edges:
        notes = ("no pathway was confirmed, so the graph has no edges",)
    return StageResult(counts, tuple(outputs), 1 if notes else 0, notes)


def summarise(
    features: pl.DataFrame, pathways: pl.DataFrame, tokens: pl.DataFrame, *, top: int, fdr: float
) -> pl.DataFrame:
    """Return one row per causal feature: its edges in and out, and its tokens.

    Raises:
        DictionaryError: the tables speak of different feature spaces.
    """
    supported = pl.col("verdict").is_in(SUPPORTED)
    ends: dict[str, pl.DataFrame] = {}
    for end, other in (("target", "source"), ("source", "target")):
        name = {"target": "in", "source": "out"}[end]
        strongest = pl.struct(
            feature=pl.format("L{}-{}", f"{other}_layer", f"{other}_id"),
            attribution="attribution",
            verdict="verdict",
        )
        ends[name] = (
            pathways.with_columns(strongest.alias("edge"), size=pl.col("attribution").abs())
            .sort(["size", f"{other}_layer", f"{other}_id"], descending=[True, False, False])
            .group_by("space", f"{end}_layer", f"{end}_id", maintain_order=True)
            .agg(
                pl.len().alias(f"edges_{name}"),
                supported.sum().alias(f"supported_{name}"),
                pl.col("size").filter(supported).sum().alias(f"strength_{name}"),
                pl.col("edge").filter(supported).head(top).alias(f"top_{name}"),
            )
            .rename({f"{end}_layer": "layer", f"{end}_id": "feature_id"})
        )
    best = (
        tokens.filter(pl.col("q") < fdr)
        .sort(["p", "logodds_z", "token_id"], descending=[False, True, False])
        .group_by(*KEYS, maintain_order=True)
        .agg(top_tokens=pl.struct("token", "corpus", "lift", "q").head(top), n_tokens=pl.len())
    )
    table = features
    for part in (ends["in"], ends["out"], best):
        table = join(table, part, how="left") if part.height else table
    counted = [name for name in table.columns if name.startswith(("edges_", "supported_", "n_tok"))]
    return table.with_columns(pl.col(counted).fill_null(0)).sort("layer", "rank")


def _labels(tokens: pl.DataFrame, fdr: float) -> dict[tuple[int, int], str]:
    """Return a feature's foremost tokens, to be shown where it is drawn."""
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    ranked = tokens.filter(pl.col("q") < fdr).sort(
        ["p", "logodds_z", "token_id"], descending=[False, True, False]
    )
    for layer, feature, token in ranked.select("layer", "feature_id", "token").iter_rows():
        if len(found[layer, feature]) < 3 and token not in found[layer, feature]:
            found[layer, feature].append(token)
    return {key: " ".join(words) for key, words in found.items()}


def _viewer_files(
    work: Workspace, edges: pl.DataFrame, labels: Mapping[tuple[int, int], str]
) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(work.config.model, trust_remote_code=False)
    scan = safe_name(work.config.model)
    names: list[str] = []
    for index, prompt in enumerate(work.sampled_prompts()):
        content = viewer_graph(
            edges,
            prompt_id=prompt.id,
            prompt=prompt.text,
            tokens=[tokenizer.decode([each]) for each in prompt.ids],
            scan=scan,
            labels=labels,
        )
        name = f"{INTEGRATED}/neuronpedia/{index:03d}-{safe_name(prompt.id)}.json"
        write_json(work.path(name), content, indent=None)
        names.append(name)
    return names


def _earlier_names(work: Workspace, edges: pl.DataFrame, summary: pl.DataFrame) -> list[str]:
    """Write the two JSON files under the names and keys of earlier work."""
    pathways = [
        {
            "source": f"L{row['source_layer']}-{row['source_id']}",
            "target": f"L{row['target_layer']}-{row['target_id']}",
            "source_layer": row["source_layer"],
            "target_layer": row["target_layer"],
            "activation": row["source_activation"],
            "gradient": row["gradient"],
            "predicted_change": row["predicted"],
            "actual_change": row["actual"],
            "validated": row["verdict"] in SUPPORTED,
        }
        for row in edges.iter_rows(named=True)
    ]
    names = ("results/pathways/validated_pathways.json", f"{INTEGRATED}/integrated_results.json")
    rows: Sequence[dict[str, Any]] = summary.to_dicts()
    write_json(work.path(names[0]), {"pathways": pathways}, indent=None)
    write_json(work.path(names[1]), {"features": rows}, indent=None)
    return list(names)
