"""Causal-feature data in the schema that the pipeline reads, small and made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerscope.experiments.pathways.config import CONDITIONS

WORDS = ("stop now", "bet ten", "spin again", "keep the money", "one more", "walk away")


def result(layer: int, feature: int, d: float = 1.0, /, **changes: Any) -> dict[str, Any]:
    """Return one record of a checkpoint, as experiment 2 writes it."""
    made: dict[str, Any] = {
        "feature": f"L{layer}-{feature}",
        "layer": layer,
        "feature_id": feature,
        "cohen_d": d,
        "causality": {
            "is_causal_safe": True,
            "is_causal_risky": False,
            "safe_effect_size": 0.3,
            "risky_effect_size": 0.05,
            "safe_p_value": 0.001,
            "risky_p_value": 0.4,
            "interpretation": "safe side",
        },
    }
    return {**made, **changes}


def checkpoint(
    folder: Path,
    results: Iterable[Mapping[str, Any]],
    name: str = "checkpoint_L1_2_77_20251111_120000.json",
    **fields: Any,
) -> Path:
    """Write a checkpoint file."""
    content = {
        "timestamp": "2025-11-11T12:00:00",
        "gpu_id": 0,
        "process_id": 77,
        "layer_range": [1, 2],
        "features_tested": 2,
        "n_trials_per_condition": 20,
        "results": list(results),
    }
    path = folder / name
    path.write_text(json.dumps({**content, **fields}))
    return path


def responses(
    features: Iterable[str], *, trials: int = 20, conditions: Iterable[str] = CONDITIONS
) -> list[dict[str, Any]]:
    """Return records of a response log, all different."""
    return [
        {
            "feature": feature,
            "condition": condition,
            "trial": trial,
            "response": f"{WORDS[trial % len(WORDS)]} {trial} {condition}",
            "parsed": {"action": "stop", "bet": 0, "valid": True, "response": ""},
        }
        for feature in features
        for condition in conditions
        for trial in range(trials)
    ]


def log(folder: Path, records: Any, name: str = "responses_L1_2_77_20251111_120000.json") -> Path:
    """Write a response log."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path
