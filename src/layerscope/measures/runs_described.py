"""Who a compared run is, what its guidance says, and what was done differently between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from layerscope.measures.readings import LensReading, Reading

GUIDANCE = ("prefer_ranks", "suppress_abs_probs", "preferred_lens_for_reporting")


def differing_options(
    configs: Sequence[Mapping[str, Any]],
) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the options that differ between configurations, nested names joined by dots."""
    flat = [dict(_flatten(config)) for config in configs]
    names = sorted({name for entry in flat for name in entry})
    found = [(name, tuple(entry.get(name) for entry in flat)) for name in names]
    return [(name, values) for name, values in found if any(v != values[0] for v in values)]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class Change:
    """Options that differ between runs of one model; `values` in the order of `runs`."""

    model: str
    runs: tuple[int, ...]
    options: tuple[tuple[str, tuple[Any, ...]], ...]


def changed(readings: Sequence[Reading]) -> list[Change]:
    """Return, for every model that was run more than once, what was done differently."""
    groups: dict[tuple[str, str | None], list[int]] = {}
    for run, reading in enumerate(readings):
        groups.setdefault((reading.model, reading.weights), []).append(run)
    return [
        Change(
            model,
            tuple(runs),
            tuple(
                differing_options(
                    [
                        {
                            **readings[run].config,
                            "experiment": readings[run].experiment,
                            "dtype": readings[run].dtype,
                            "prompts": readings[run].prompts_sha256,
                        }
                        for run in runs
                    ]
                )
            ),
        )
        for (model, _), runs in groups.items()
        if len(runs) > 1
    ]


def describe(reading: Reading) -> dict[str, Any]:
    """Return who a run is, and what its guidance says."""
    reasons = reading.guidance.get("reasons") or ()
    return {
        **{
            name: getattr(reading, name)
            for name in (
                *("label", "run", "experiment", "model", "n_layers", "d_vocab", "norm_choice"),
                *("dtype", "weights", "tokenizer", "prompts_sha256"),
            )
        },
        "row_depth": 1.0 / reading.n_layers,
        "chance_of_rank_le_10": min(1.0, 10 / reading.d_vocab),
        "facts": len(reading.facts),
        "lenses": list(
            dict.fromkeys(name for fact in reading.facts.values() for name in fact.lenses)
        ),
        "tiers": _counts([_tier(fact.lenses) for fact in reading.facts.values()]),
        "confirmed_sources": _counts([_source(fact.lenses) for fact in reading.facts.values()]),
        "trust": reading.guidance.get("trust"),
        **{name: reading.guidance.get(name) for name in GUIDANCE},
        "reasons": [
            {name: entry.get(name) for name in ("code", "severity", "message")} for entry in reasons
        ],
    }


def _tier(lenses: Mapping[str, LensReading]) -> str:
    return next((entry.tier for entry in lenses.values() if entry.tier), "unknown")


def _source(lenses: Mapping[str, LensReading]) -> str:
    return next((entry.source for entry in lenses.values() if entry.source), "unknown")


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
