"""Two runs side by side: what was asked differently, and where their milestones lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from layerscope.measures.runs_described import differing_options
from layerscope.store.info import RunInfo

_PASS_KEY = ("prompt_id", "fact_key", "prompt_variant", "lens")
_MOMENTS = ("first", "stable", "fraction")


def compare_runs(
    a: RunInfo, summary_a: Mapping[str, Any], b: RunInfo, summary_b: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the differences of two runs from their saved summaries.

    The keys are "a" and "b" (who they are), "config" (options that differ), "passes" (per pass
    found in both: milestone -> first, stable and fraction in a and in b, and b - a), "only_a" and
    "only_b" (passes of one run). Rows of models with different depths are compared by "fraction".
    """
    passes_a, passes_b = _passes(summary_a), _passes(summary_b)
    return {
        "a": _who(a, summary_a),
        "b": _who(b, summary_b),
        "config": _config_differences(a.config, b.config),
        "same_content": a.key == b.key,
        "passes": [
            {**_pass_labels(key), "milestones": _milestones(passes_a[key], passes_b[key])}
            for key in passes_a
            if key in passes_b
        ],
        "only_a": [_pass_labels(key) for key in passes_a if key not in passes_b],
        "only_b": [_pass_labels(key) for key in passes_b if key not in passes_a],
    }


def _who(run: RunInfo, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": run.id,
        "model": run.model,
        "status": run.status,
        "created_at": run.created_at,
        "n_layers": summary.get("n_layers"),
        "norm_choice": summary.get("norm_choice"),
    }


def _passes(summary: Mapping[str, Any]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
    # Several control passes may carry the same labels; they are told apart by their order.
    seen: Counter[tuple[Any, ...]] = Counter()
    passes: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for entry in summary.get("passes", ()):
        labels = tuple(entry.get(name) for name in _PASS_KEY)
        passes[(*labels, seen[labels])] = entry
        seen[labels] += 1
    return passes


def _pass_labels(key: tuple[Any, ...]) -> dict[str, Any]:
    return {**dict(zip(_PASS_KEY, key, strict=False)), "occurrence": key[-1]}


def _milestones(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found_a, found_b = a.get("milestones", {}), b.get("milestones", {})
    names = list(dict.fromkeys([*found_a, *found_b]))
    return {name: _moments(found_a.get(name) or {}, found_b.get(name) or {}) for name in names}


def _moments(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    side_by_side: dict[str, Any] = {}
    for moment in _MOMENTS:
        left, right = a.get(moment), b.get(moment)
        delta = None if left is None or right is None else right - left
        side_by_side[moment] = {"a": left, "b": right, "delta": delta}
    return side_by_side


def _config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"option": name, "a": values[0], "b": values[1]}
        for name, values in differing_options((a, b))
    ]
