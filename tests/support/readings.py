"""Readings made by hand: runs that agree in everything, to be changed in one thing at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerscope.measures.readings import KINDS, FactReading, LensReading, Reading

CORPUS = {"corpus": {"text_sha256": "a" * 64}, "norm": "final"}


def lens_reading(row: int | None, *, n_layers: int = 4, **changes: Any) -> LensReading:
    """Return a lens in which every milestone lies at one row."""
    layers = tuple(range(n_layers + 1))
    fields: dict[str, Any] = {
        "milestones": dict.fromkeys(KINDS, row),
        "tier": "low",
        "source": "raw",
        "confirming": ("raw",),
        "layers": layers,
        "ranks": tuple(1 if row is not None and layer >= row else 9 for layer in layers),
        "kl_bits": tuple(float(n_layers - layer) for layer in layers),
    }
    return LensReading(**(fields | changes))


def fact_reading(key: str, lenses: Mapping[str, LensReading], **changes: Any) -> FactReading:
    """Return a fact that is asked in the same way everywhere."""
    fields: dict[str, Any] = {
        "text": f"The capital of {key} is",
        "form": "raw, template completion/1",
        "answer": f"City of {key}",
        "first_piece": f" {key}",
        "n_pieces": 1,
        "final_rank": 1,
        "final_p": 0.5,
        "final_entropy_bits": 2.0,
    }
    return FactReading(key=key, lenses=lenses, **(fields | changes))


def reading(
    label: str,
    rows: Sequence[int | None],
    *,
    n_layers: int = 4,
    lenses: Sequence[str] = ("norm", "raw"),
    **changes: Any,
) -> Reading:
    """Return a run whose facts A, B, ... have all their milestones at the given rows."""
    facts = {
        key: fact_reading(key, {lens: lens_reading(row, n_layers=n_layers) for lens in lenses})
        for key, row in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", rows, strict=False)
    }
    fields: dict[str, Any] = {
        "facts": facts,
        "run": f"id of {label}",
        "experiment": "layers",
        "model": label,
        "d_vocab": 1000,
        "norm_choice": "final",
        "lenses": {lens: CORPUS if lens not in ("norm", "raw") else {} for lens in lenses},
        "weights": f"weights of {label}",
        "tokenizer": "one tokenizer",
        "dtype": "float32",
        "prompts_sha256": "p",
        "thresholds": {"semantic_gap": 0.5, "confirm_window": 2},
        "guidance": {"trust": "high", "reasons": [], "prefer_ranks": False},
    }
    return Reading(label=label, n_layers=n_layers, **(fields | changes))


def with_fact(run: Reading, key: str, **changes: Any) -> Reading:
    """Return a run with one fact changed."""
    return replace(run, facts={**run.facts, key: replace(run.facts[key], **changes)})


def with_lenses(run: Reading, name: str, **changes: Any) -> Reading:
    """Return a run in which one lens of every fact is changed."""
    facts = {
        key: replace(fact, lenses={**fact.lenses, name: replace(fact.lenses[name], **changes)})
        for key, fact in run.facts.items()
    }
    return replace(run, facts=facts)
