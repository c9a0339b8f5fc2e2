"""Every edge carried out, and what that says of it; then edges of one pair over all prompts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from layerscope.experiments.pathways.aggregate import over_prompts, settle
from layerscope.experiments.pathways.discover import ORDER
from layerscope.experiments.pathways.manifest import (
    Chunks,
    StageResult,
    write_jsonl,
    write_parquet,
    write_partitions,
)
from layerscope.experiments.pathways.targets import (
    GROUP,
    Group,
    States,
    replay_options,
    selected,
    targets_of,
    thresholds_of,
)
from layerscope.experiments.pathways.workspace import (
    CHUNKS,
    DISCOVERED,
    DOSES,
    EDGES,
    EDGES_JSONL,
    OVER_PROMPTS,
    REPLAY,
    SampledPrompt,
    Workspace,
)
from layerscope.experiments.units import Piece, Progress, Work, run_units, work_key
from layerscope.features.pathways import agreement, judge, replay
from layerscope.files import write_json

_log = logging.getLogger(__name__)

_PLACE = ("source_position", "source_layer")


@dataclass(frozen=True, eq=False)
class Share:
    """Some edges of one prompt: what one chunk does.

    All edges from one layer and position are in one share: an edit serves all its targets, and
    the nulls of a place stand together.
    """

    prompt: SampledPrompt
    number: int
    edges: pl.DataFrame

    @property
    def name(self) -> str:
        """What the chunk is called in keys."""
        return f"{self.prompt.id}:{self.number}"


def shares(found: pl.DataFrame, prompts: Sequence[SampledPrompt], size: int) -> list[Share]:
    """Cut edges into shares of about `size`, prompt by prompt and between places of sources."""
    cut: list[Share] = []
    for prompt in prompts:
        edges = found.filter(pl.col("prompt_id") == prompt.id).sort(*_PLACE, *ORDER)
        counts = edges.group_by(*_PLACE, maintain_order=True).len()
        # A place belongs to the share in which its first edge falls.
        first = counts["len"].cum_sum() - counts["len"]
        named = counts.select(*_PLACE).with_columns(chunk=first // size)
        edges = edges.join(named, on=list(_PLACE), how="left", maintain_order="left")
        for number, part in enumerate(edges.partition_by("chunk", maintain_order=True)):
            cut.append(Share(prompt, number, part.drop("chunk").sort(ORDER)))
    return cut


def run_replay(work: Workspace, key: str, progress: Progress | None = None) -> StageResult:
    """Write edges with verdicts, their doses, and the pathways over all prompts."""
    found = pl.read_parquet(work.need(DISCOVERED, "discover"))
    targets = targets_of(work, selected(work))
    states = States(work, targets)
    options = replay_options(work)

    def one(share: Share) -> Piece:
        state = states.of(Group(share.prompt, 0, len(targets)))
        measured = replay(state, share.edges, options)
        judged, doses = judge(
            state, share.edges, measured, doses=options.doses, thresholds=thresholds_of(state)
        )
        return Piece(judged, {"doses": doses.to_dicts()})

    size = (work.config.batch_size or GROUP) * work.config.top_k_pathways
    works = [
        Work(work_key(key, share.name), lambda share=share: one(share), share.edges.height)
        for share in shares(found, work.sampled_prompts(), size)
    ]
    pieces = run_units(works, units=Chunks(work.path(f"{CHUNKS}/replay")), progress=progress)
    judged = pl.concat([piece.rows for piece in pieces])
    doses = pl.concat([pl.DataFrame(piece.payload["doses"]) for piece in pieces])
    edges = settle(judged, doses, fdr=work.config.fdr).sort("target_layer", *ORDER)
    pathways = over_prompts(edges, dedup=work.config.dedup, seed=work.config.seed)
    write_partitions(work.path(EDGES), edges, "target_layer")
    write_jsonl(work.path(EDGES_JSONL), edges.to_dicts())
    write_parquet(work.path(DOSES), doses.sort(*ORDER[:-1], "source_layer", "source_id", "dose"))
    write_parquet(work.path(OVER_PROMPTS), pathways)
    summary = _summary(found, edges, doses, pathways)
    write_json(work.path(REPLAY), {"schema_version": 1, **summary})
    _log.info("%d edges replayed: %s", edges.height, summary["verdicts"])
    missing = summary["not_replayed"]
    notes = (f"{missing} edges were not replayed",) if missing else ()
    outputs = (EDGES, EDGES_JSONL, DOSES, OVER_PROMPTS, REPLAY)
    return StageResult(summary, outputs, 2 if missing else 0, notes)


def _summary(
    found: pl.DataFrame, edges: pl.DataFrame, doses: pl.DataFrame, pathways: pl.DataFrame
) -> dict[str, Any]:
    changed = doses.filter(pl.col("dose") != 1.0)
    by_dose = {
        f"{dose:g}": agreement(changed.filter(pl.col("dose") == dose))
        for dose in sorted(changed["dose"].unique().to_list())
    }
    apart = edges.with_columns(distance=pl.col("target_layer") - pl.col("source_layer"))
    by_distance = {
        str(distance): agreement(apart.filter(pl.col("distance") == distance))
        for distance in sorted(apart["distance"].unique().to_list())
    }
    kept = edges.filter(pl.col("null_quantile").is_not_null())
    above = kept.filter(pl.col("actual").abs() > pl.col("null_quantile")).height
    return {
        "edges": edges.height,
        "not_replayed": found.height - edges.height,
        "verdicts": dict(sorted(Counter(edges["verdict"].to_list()).items())),
        "agreement": agreement(edges),
        "agreement_by_dose": by_dose,
        "agreement_by_layer_distance": by_distance,
        "above_random_null": above / kept.height if kept.height else None,
        "pathways_over_prompts": pathways.height,
        "seen_in_one_prompt": pathways.filter("single_prompt").height,
    }
