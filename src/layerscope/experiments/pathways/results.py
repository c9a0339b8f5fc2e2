"""What a run found, read back from its folder; stages that were not run are None."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.errors import ConfigError
from layerscope.experiments.pathways.manifest import read_partitions
from layerscope.experiments.pathways.workspace import (
    CAUSAL,
    DOSES,
    EDGES,
    FEATURE_FIGURES,
    INTEGRATED,
    OVER_PROMPTS,
    PROMPTS,
    PROTOTYPE,
    REPLAY,
    RUN,
    TOKENS,
    TOKENS_JSON,
    VALIDATION,
    WORDS,
    read_json,
)


@dataclass(frozen=True, eq=False)
class Results:
    """Files of a run.

    Attributes:
        run: configuration, versions, time and memory of every stage.
        audit: the audit's findings and counts. causal: selected features. prompts: with their ids.
        prototype: of one feature. edges: one row per edge and prompt, with replay and verdict.
        doses: one row per edge and dose. pathways: one row per pair of features, over prompts.
        replay: how well predictions agree with replays.
        tokens: associations; words: those of words.
        token_notes: per feature, with drivers and logit weights.
        figures: density, norm and neighbour of every feature.
        graph: nodes and edges. summary: one row per causal feature.
    """

    folder: Path
    run: dict[str, Any]
    audit: dict[str, Any] | None
    causal: dict[str, Any] | None
    prompts: dict[str, Any] | None
    prototype: dict[str, Any] | None
    edges: pl.DataFrame | None
    doses: pl.DataFrame | None
    pathways: pl.DataFrame | None
    replay: dict[str, Any] | None
    tokens: pl.DataFrame | None
    token_notes: dict[str, Any] | None
    figures: pl.DataFrame | None
    graph: dict[str, Any] | None
    summary: pl.DataFrame | None
    words: pl.DataFrame | None = None


def open_results(folder: str | Path) -> Results:
    """Read what a run has written so far.

    Raises:
        ConfigError: the folder is no run, or a file is damaged.
    """
    folder = Path(folder)
    if not (folder / RUN).is_file():
        raise ConfigError(
            f"{folder} holds no run of `layerscope pathways`: name the folder given as --out"
        )

    def content(name: str) -> dict[str, Any] | None:
        path = folder / name
        return read_json(path) if path.is_file() else None

    def table(name: str) -> pl.DataFrame | None:
        path = folder / name
        if path.is_dir():
            return read_partitions(path)
        return pl.read_parquet(path) if path.is_file() else None

    return Results(
        folder=folder,
        run=read_json(folder / RUN),
        audit=content(VALIDATION),
        causal=content(CAUSAL),
        prompts=content(PROMPTS),
        prototype=content(PROTOTYPE),
        edges=table(EDGES),
        doses=table(DOSES),
        pathways=table(OVER_PROMPTS),
        replay=content(REPLAY),
        tokens=table(TOKENS),
        token_notes=content(TOKENS_JSON),
        figures=table(FEATURE_FIGURES),
        graph=content(f"{INTEGRATED}/graph.json"),
        summary=table(f"{INTEGRATED}/feature_summary.parquet"),
        words=table(WORDS),
    )
