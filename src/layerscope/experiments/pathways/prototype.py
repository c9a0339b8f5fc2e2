"""One target on one prompt before all others: does it fit into memory, does it find anything?"""

from __future__ import annotations

import logging
from typing import Any

import polars as pl

from layerscope.errors import ConfigError
from layerscope.experiments.pathways.manifest import StageResult
from layerscope.experiments.pathways.memory import peak_bytes
from layerscope.experiments.pathways.targets import (
    Group,
    States,
    discover_options,
    selected,
    targets_of,
)
from layerscope.experiments.pathways.workspace import PROTOTYPE, Workspace
from layerscope.features.pathways import discover
from layerscope.files import write_json

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PER_LAYER = 10
_EVERY = 1_000_000


def run_prototype(work: Workspace) -> StageResult:
    """Write ``single_feature_test.json``: candidates of every layer below one target."""
    feature = _feature(work)
    prompt = work.sampled_prompts()[0]
    below = [layer for layer in work.dictionaries.layers if layer <= feature["layer"]]
    dictionaries = work.layers(below)
    states = States(work, targets_of(work, [feature]), dictionaries=dictionaries)
    error: str | None = None
    candidates: list[dict[str, Any]] = []
    recorded: list[int] = []
    target: dict[str, Any] = {}
    try:
        state = states.of(Group(prompt, 0, 1))
        recorded = sorted(state.layers)
        one = state.targets[0]
        target = {
            "target_position": one.target.position,
            "target_token": state.tokens[one.target.position],
            "target_pre_activation": one.pre_activation,
            "target_activation": one.activation,
            "target_margin": one.margin,
            "target_active": one.active,
        }
        edges = discover(state, discover_options(work, top_k=_EVERY, min_gradient=0.0))
        candidates = _candidates(edges)
    except MemoryError as failure:
        error = f"out of memory: {failure}"
    except RuntimeError as failure:  # torch's out-of-memory errors are runtime errors
        if "out of memory" not in str(failure).lower():
            raise
        error = str(failure).splitlines()[0]
    peak = peak_bytes(work.config.device)
    success = {
        "no_oom": error is None,
        "layers_recorded": recorded == below,
        "has_candidates": bool(candidates),
        "peak_below_limit": peak is not None and peak / 1e9 < work.config.memory_limit_gb,
    }
    summary: dict[str, Any] = {
        "feature": feature["feature"],
        "prompt_id": prompt.id,
        "layers": recorded,
        **target,
        "upstream_candidates": candidates,
        "order": work.config.order,
        "success": success,
        "error": error,
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        **summary,
        "memory_usage_gb": None if peak is None else round(peak / 1e9, 3),
    }
    write_json(work.path(PROTOTYPE), content)
    failed = [name for name, good in success.items() if not good]
    _log.info("%s: %d candidates below it", feature["feature"], len(candidates))
    # A target of the lowest layer has nothing below it; that is no failure.
    only = len(below) == 1 and failed == ["has_candidates"]
    notes = tuple(f"{feature['feature']}: {name} does not hold" for name in failed)
    code = 0 if not failed else 1 if only else 2
    brief = {"feature": feature["feature"], "candidates": len(candidates), "success": success}
    return StageResult(brief, (PROTOTYPE,), code, notes)


def _feature(work: Workspace) -> dict[str, Any]:
    features = selected(work)
    wanted = work.config.prototype_feature
    if wanted is not None:
        for feature in features:
            if feature["feature"] == wanted:
                return feature
        raise ConfigError(f"{wanted} is not among the {len(features)} selected features")
    return max(features, key=lambda f: (f["layer"], abs(f["cohen_d"]), -f["feature_id"]))


def _candidates(edges: pl.DataFrame) -> list[dict[str, Any]]:
    """Return the first sources of every layer, highest layer first."""
    chosen = (
        edges.sort("rank")
        .group_by("source_layer", maintain_order=True)
        .head(PER_LAYER)
        .sort(["source_layer", "rank"], descending=[True, False])
    )
    return [
        {
            "source": f"L{row['source_layer']}-{row['source_id']}",
            "source_layer": row["source_layer"],
            "activation": row["source_activation"],
            "position": row["source_position"],
            "token": row["source_token"],
            "gradient": row["gradient"],
            "attribution": row["attribution"],
            "share": row["share"],
        }
        for row in chosen.iter_rows(named=True)
    ]
