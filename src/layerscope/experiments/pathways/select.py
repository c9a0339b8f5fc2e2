"""Which causal features are followed, and on which prompts."""

from __future__ import annotations

import logging
from typing import Any

import polars as pl

from layerscope.errors import PromptError
from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.experiments.pathways.manifest import StageResult
from layerscope.experiments.pathways.workspace import (
    CAUSAL,
    FEATURES,
    PROMPTS,
    Workspace,
    read_prompts,
)
from layerscope.files import canonical_json, sha256_text, write_json
from layerscope.models import Prompt
from layerscope.models.prompts import tokenize

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_COLUMNS = (
    "space",
    "layer",
    "feature_id",
    "feature",
    "cohen_d",
    "side",
    "safe_effect_size",
    "risky_effect_size",
    "safe_p_value",
    "risky_p_value",
    "safe_q_value",
    "risky_q_value",
    "p_value",
    "q_value",
    "n_responses",
)


def choose(features: pl.DataFrame, *, top_n: int) -> tuple[pl.DataFrame, int]:
    """Return the causal features with the largest effects of every layer, and how many had none.

    Ties in absolute Cohen's d go to the lower (layer, feature_id). A layer with fewer features
    gives fewer.

    Args:
        features: table of the audit. top_n: per layer.
    """
    causal = features.filter("is_causal")
    defined = causal.filter(pl.col("cohen_d").is_finite())
    ranked = defined.with_columns(size=pl.col("cohen_d").abs()).sort(
        ["layer", "size", "feature_id", "space"], descending=[False, True, False, False]
    )
    chosen = ranked.group_by("layer", maintain_order=True).head(top_n)
    kept = chosen.select(_COLUMNS).with_columns(
        rank=pl.int_range(1, pl.len() + 1).over("layer", order_by=None)
    )
    return kept, causal.height - defined.height


def run_select(work: Workspace) -> StageResult:
    """Write ``causal_features.json`` and ``prompts_sample.json``."""
    config = work.config
    features = pl.read_parquet(work.need(FEATURES, "audit"))
    allowed = set(work.dictionaries.layers)
    inside = features.filter(pl.col("layer").is_in(sorted(allowed)))
    chosen, undefined = choose(inside, top_n=config.top_n_per_layer)
    outside = features.filter("is_causal").height - inside.filter("is_causal").height
    per_layer = {str(n): count for n, count in chosen.group_by("layer").len().sort("layer").rows()}
    short = {layer: n for layer, n in per_layer.items() if n < config.top_n_per_layer}
    missing = [layer for layer in sorted(allowed) if str(layer) not in per_layer]
    notes: list[str] = []
    if short or missing:
        notes.append(
            f"{len(short)} layers have fewer than {config.top_n_per_layer} causal features, "
            f"{len(missing)} have none"
        )
    if undefined:
        notes.append(f"{undefined} causal features have no effect size (NaN) and are left out")
    summary: dict[str, Any] = {
        "selected": chosen.height,
        "per_layer": per_layer,
        "layers_without": missing,
        "dropped_undefined": undefined,
        "dropped_outside_layers": outside,
        "ceiling": config.top_n_per_layer * len(allowed),
    }
    content = {
        "schema_version": SCHEMA_VERSION,
        "space": work.every_dictionary.space.name,
        "top_n_per_layer": config.top_n_per_layer,
        **summary,
        "features": chosen.to_dicts(),
    }
    write_json(work.path(CAUSAL), content, indent=None)
    prompts = sample_prompts(work, config)
    write_json(work.path(PROMPTS), prompts)
    summary["prompts"] = len(prompts["prompts"])
    _log.info("%d features of %d layers selected", chosen.height, len(per_layer))
    code = 2 if chosen.is_empty() else 1 if notes else 0
    if chosen.is_empty():
        notes.append("no causal feature with an effect size is left; nothing can be followed")
    return StageResult(summary, (CAUSAL, PROMPTS), code, tuple(notes))


def sample_prompts(work: Workspace, config: PathwaysConfig) -> dict[str, Any]:
    """Return the prompts with the ids that every later stage must see.

    Raises:
        PromptError: a prompt does not begin with exactly one BOS where the tokenizer has one.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    found = read_prompts(work.prompts_path)[: config.n_prompts]
    entries: list[dict[str, Any]] = []
    for name, text, origin in found:
        batch = tokenize(tokenizer, Prompt(text, format="raw"))
        ids = batch.ids[0].tolist()
        bos = tokenizer.bos_token_id
        count = ids.count(bos) if bos is not None else 0
        if count > 1:
            raise PromptError(
                f"prompt '{name}' begins with {count} BOS tokens; remove the one in its text"
            )
        entries.append(
            {
                "id": name,
                "text": text,
                "origin": origin,
                "n_tokens": len(ids),
                "bos": count,
                "ids": ids,
                "sha256": sha256_text(canonical_json(ids)),
            }
        )
    whole = sha256_text(canonical_json([entry["sha256"] for entry in entries]))
    return {"schema_version": SCHEMA_VERSION, "sha256": whole, "prompts": entries}
