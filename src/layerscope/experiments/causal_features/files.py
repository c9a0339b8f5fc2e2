"""A run as the files that the pathways audit reads: checkpoints, response logs, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from layerscope.errors import OutputError
from layerscope.experiments.causal_features.answers import Parsed
from layerscope.experiments.causal_features.task import SIDES
from layerscope.experiments.units import Outcome
from layerscope.files import write_json

SHARED = "baseline"
"""Name under which answers without a patch stand, since they count for every feature."""

_WORDS = {
    "safe": "gives risky prompts the safe group's decisions",
    "risky": "gives safe prompts the risky group's decisions",
    "mixed": "moves decisions in both directions",
    "none": "no effect beyond chance and random controls",
    "unparsed": "too few answers could be parsed",
}


def write_data(outcome: Outcome, folder: Path, *, stamp: str | None = None) -> list[Path]:
    """Write ``checkpoint_*.json``, ``responses_*.json`` and ``prompts.json`` into a folder.

    The same outcome gives the same bytes. Answers under controls stay in the run's own tables.

    Args:
        outcome: of a causal-feature run.
        folder: made if absent.
        stamp: time stamp in the names, ``YYYYMMDD_HHMMSS``; by default when the run started.

    Raises:
        OutputError: there is nothing to write, or the folder cannot be written.
    """
    features, responses = outcome.tables["features"], outcome.tables["responses"]
    if not len(features):
        raise OutputError("the run patched no feature: there is no checkpoint to write")
    config, summary = outcome.provenance["config"], outcome.summary
    stamp = stamp or _stamp(outcome.provenance)
    first, last = summary["layers"][0], summary["layers"][-1]
    name = f"L{first}_{last}_0_{stamp}"
    checkpoint = {
        "timestamp": stamp,
        "gpu_id": None,
        "process_id": 0,
        "layer_range": [first, last],
        "features_tested": len(features),
        "n_trials_per_condition": config["trials"],
        "model": outcome.provenance["model_name"],
        "space": outcome.provenance["space"],
        "results": [_result(row) for row in features.iter_rows(named=True)],
    }
    log = [
        _response(row)
        for row in responses.filter(responses["kind"] != "control").iter_rows(named=True)
    ]
    prompts = [
        {"id": f"{side}-{number}", "text": game["prompt"], "origin": outcome.summary["task"]}
        for side in SIDES
        for number, game in enumerate(outcome.provenance["task"]["patched"][side])
    ]
    return [
        write_json(folder / f"checkpoint_{name}.json", checkpoint),
        write_json(folder / f"responses_{name}.json", log, indent=None),
        write_json(folder / "prompts.json", {"prompts": prompts}),
    ]


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    verdict = row["verdict"]
    return {
        "feature": f"L{row['layer']}-{row['feature_id']}",
        "layer": row["layer"],
        "feature_id": row["feature_id"],
        "cohen_d": row["cohen_d"],
        "causality": {
            **{f"is_causal_{side}": verdict in (side, "mixed") for side in SIDES},
            **{f"{side}_effect_size": row[f"{side}_effect"] for side in SIDES},
            **{f"{side}_p_value": row[f"{side}_p"] for side in SIDES},
            **{f"{side}_q_value": row[f"{side}_q"] for side in SIDES},
            "interpretation": f"{verdict}: {_WORDS[verdict]}",
        },
    }


def _response(row: Mapping[str, Any]) -> dict[str, Any]:
    parsed = Parsed(row["action"], row["bet"], row["reason"])
    shared = row["kind"] == "baseline"
    return {
        "feature": SHARED if shared else f"L{row['layer']}-{row['feature_id']}",
        "condition": row["condition"],
        "trial": row["trial"],
        "response": row["response"],
        "parsed": parsed.to_dict(row["response"]),
        "prompt": f"{row['condition'].split('_')[0]}-{row['prompt']}",
        "seed": row["seed"],
    }


def _stamp(provenance: Mapping[str, Any]) -> str:
    started = datetime.fromisoformat(provenance["timing"]["started"])
    return started.strftime("%Y%m%d_%H%M%S")
