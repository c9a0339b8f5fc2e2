"""The drivers of every selected feature on every prompt, by gradient."""

from __future__ import annotations

import logging
from typing import Any

import polars as pl

from layerscope.experiments.pathways.manifest import Chunks, StageResult, write_parquet
from layerscope.experiments.pathways.targets import (
    Group,
    States,
    discover_options,
    groups,
    selected,
    targets_of,
)
from layerscope.experiments.pathways.workspace import CHUNKS, DISCOVERED, Workspace
from layerscope.experiments.units import Piece, Progress, Work, run_units, work_key
from layerscope.features.pathways import discover
from layerscope.products import choose

_log = logging.getLogger(__name__)

ORDER = ("prompt_id", "target_layer", "target_id", "target_position", "rank")


def run_discover(work: Workspace, key: str, progress: Progress | None = None) -> StageResult:
    """Write the edges of every prompt; a killed run goes on after its last finished chunk."""
    features = selected(work)
    targets = targets_of(work, features)
    states = States(work, targets)
    options = discover_options(work)

    def one(group: Group) -> Piece:
        state = states.of(group)
        edges = discover(state, options)
        inactive = [str(t.target.feature) for t in state.targets if not t.active]
        return Piece(edges, {"targets": len(state.targets), "inactive": inactive})

    prompts = work.sampled_prompts()
    works = [
        Work(work_key(key, group.name), lambda group=group: one(group), group.stop - group.first)
        for group in groups(work, prompts, len(targets))
    ]
    pieces = run_units(works, units=Chunks(work.path(f"{CHUNKS}/discover")), progress=progress)
    edges = pl.concat([piece.rows for piece in pieces]).sort(ORDER)
    write_parquet(work.path(DISCOVERED), edges)
    inactive = sum(len(piece.payload["inactive"]) for piece in pieces)
    tried = len(targets) * len(prompts)
    reached = edges.select("prompt_id", "target_layer", "target_id").unique().height
    summary: dict[str, Any] = {
        "edges": edges.height,
        "targets": len(targets),
        "prompts": len(prompts),
        "targets_with_edges": reached,
        "ceiling": work.config.top_k_pathways * tried,
        "inactive_targets": inactive,
        "variant": options.variant,
        "error_mode": options.error,
        "products": choose(options.products, device=work.model.device).to_dict(),
        "bytes_read": states.bytes_read,
    }
    _log.info("%d edges into %d of %d targets", edges.height, reached, tried)
    notes = ()
    if inactive:
        notes = (
            f"{inactive} of {tried} targets are inactive on their prompt; their edges are about "
            "the pre-activation",
        )
    code = 2 if edges.is_empty() else 1 if notes else 0
    if edges.is_empty():
        notes = (*notes, "no edge was found: the thresholds leave nothing, or no target has layers")
    return StageResult(summary, (DISCOVERED,), code, notes)
