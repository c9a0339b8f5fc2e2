"""Every lens of a run beside the norm lens: how near to the model, how early, and thanks to what.

KL at a depth is that of row round(n q), halves to the even row. Gains are KL of the norm lens -
KL of the other, in bits: positive where the other is nearer to the model. Two directions are kept
apart: KL(lens || model), which the milestones use, and KL(model || lens), which fits minimise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import percentile_row
from layerscope.measures.distribution import DEPTHS
from layerscope.measures.pass_summary import PassSummary
from layerscope.measures.rows import PassRows
from layerscope.measures.sidecar import attribution, sidecar_metrics
from layerscope.measures.table import TableMeta

NORM, TUNED, BIAS, TEMPERED = "norm", "tuned", "bias", "norm_temp"
DIRECTIONS = ("kl_to_final_bits", "kl_from_final_bits")
COMPARED = (
    *("L_copy", "first_rank_le_5", "L_semantic", "L_semantic_strong"),
    *("L_surface_to_meaning", "first_kl_below_1.0"),
)
# One fact's passes through every lens, by lens.
Fact = Mapping[str, PassRows]


def compare_lenses(
    facts: Sequence[Fact],
    summaries: Sequence[Mapping[str, PassSummary]],
    meta: TableMeta,
) -> dict[str, Any]:
    """Return medians over facts of what each lens gives, and how far the lenses agree.

    `facts` and `summaries` hold, for each fact, the rows and what was measured on them, by lens.
    """
    names = list(dict.fromkeys(name for fact in facts for name in fact))
    depths = {name: percentile_row(meta.n_layers, q) for name, q in DEPTHS.items()}
    tables = {
        direction: _tempered(facts, depths, direction)
        | {
            name: {
                depth: _median([fact[name].at(direction, row) for fact in facts if name in fact])
                for depth, row in depths.items()
            }
            for name in names
        }
        for direction in DIRECTIONS
    }
    return {
        "baseline": NORM if NORM in names else names[0],
        "facts": len(facts),
        "depths": depths,
        **tables,
        "milestones": {name: _milestones(summaries, name) for name in names},
        "onset_spread": _spread(summaries),
        "not_run": {
            name: {key: entry.get(key) for key in ("status", "reason")}
            for name, entry in meta.lenses.items()
            if entry.get("status") != "ready"
        },
        "warnings": {
            name: list(entry["warnings"])
            for name, entry in meta.lenses.items()
            if entry.get("warnings")
        },
    }


def beside_norm(name: str, base: Fact, meta: TableMeta) -> dict[str, Any]:
    """Return the baseline fact through one lens beside the norm lens, or why there is none."""
    if name not in base or NORM not in base:
        entry = meta.lenses.get(name) or {}
        absent = name if name not in base else NORM
        return {
            "status": str(entry.get("status") or "skipped"),
            "reason": str(entry.get("reason") or f"the {absent} lens was not run"),
        }
    return {"status": "ok", "metrics": sidecar_metrics(base[NORM], base[name])}


def attribute(facts: Sequence[Fact], meta: TableMeta, config: MeasureConfig) -> dict[str, Any]:
    """Say what the tuned lens's gain over the norm lens is owed to, as medians over facts.

    At each depth and in both directions: the gain of the tuned lens; of one temperature per row; of
    a bias per row where one was run; and what is left of the first over each and over both (over
    the norm lens itself where neither gains). `explained_by` is "nothing" where the tuned lens
    gains nothing at half the depth, "calibration" or "bias" where that alone gives 80% of the gain
    and less than 0.2 bits are left, else "rotation", or "not_separated" where temperature or bias
    are not known. A fact prefers the tuned lens where it gains
    at half the depth and meets the criterion of `attribution`; `prefer_tuned` needs most facts, and
    more than calibration. Held-out figures of the fit stand beside those of the run: its prompts
    may be unlike the text that the lens was fitted on.
    """
    both = [fact for fact in facts if NORM in fact and TUNED in fact]
    if not both:
        return {"status": "skipped", "reason": "needs the norm and the tuned lens"}
    gains = {
        direction: {
            depth: _gains(both, percentile_row(meta.n_layers, q), direction)
            for depth, q in DEPTHS.items()
        }
        for direction in DIRECTIONS
    }
    parts = [attribution(fact[NORM], fact[TUNED], config) for fact in both]
    wanted = sum(
        part["prefer_tuned"] and (part["percentiles"]["p50"]["ΔKL_tuned"] or 0.0) > 0.0
        for part in parts
    )
    explained = _explained(gains["kl_to_final_bits"]["p50"], config)
    temperature = dict(meta.norm_temperature or {})
    temperature.pop("tau", None)
    return {
        "status": "ok",
        "facts": len(both),
        "percentiles": parts[0]["percentiles"],
        "gains": gains,
        "explained_by": explained,
        "facts_that_prefer_tuned": wanted,
        "prefer_tuned": 2 * wanted > len(both) and explained not in ("nothing", "calibration"),
        "temperature": temperature or None,
        "held_out": held_out_gains(meta),
    }


def held_out_gains(meta: TableMeta) -> dict[str, Any]:
    """Return the same gains in KL(model || lens) on the text that the fit held out."""
    fitted = cast("Mapping[str, Any]", meta.lenses.get(TUNED) or {})
    held_out = cast("Mapping[str, Any] | None", fitted.get("held_out"))
    if not held_out:
        return {"status": "skipped", "reason": "the tuned lens carries no held-out figures"}
    table = cast("Mapping[str, Sequence[float | None]]", held_out["kl_bits"])
    found: dict[str, Any] = {"status": "ok", "positions": held_out.get("positions")}
    for depth, q in DEPTHS.items():
        row = percentile_row(meta.n_layers, q)
        at = {name: values[row] for name, values in table.items() if row < len(values)}
        found[depth] = _parts(
            _less(at.get(NORM), at.get(TUNED)),
            _less(at.get(NORM), at.get("temperature")),
            _less(at.get(NORM), at.get(BIAS)),
        )
    return found


def preferred_lens(found: Mapping[str, Any], meta: TableMeta, primary: str) -> dict[str, Any]:
    """Say which lens to report, with the reason; `found` is what `attribute` returned."""

    def prefer(lens: str, hint: str, reason: str) -> dict[str, Any]:
        return {"lens": lens, "hint": hint, "reason": reason}

    if found.get("status") != "ok":
        return prefer(primary, primary, "no tuned lens was run beside it")
    warned = (meta.lenses.get(TUNED) or {}).get("warnings")
    if warned:
        return prefer(NORM, NORM, f"the fit of the tuned lens warns: {warned[0]}")
    explained, held = found["explained_by"], found["held_out"]
    if explained == "nothing":
        gained = held.get("status") == "ok" and (held["p50"]["tuned"] or 0.0) > 0.0
        why = "; on the text held out by its fit it is, so these prompts are unlike that text"
        return prefer(
            NORM, NORM, f"on these prompts the tuned lens is no nearer to the model{why * gained}"
        )
    if explained == "calibration":
        return prefer(
            NORM,
            "tuned_for_calibration_only",
            "one temperature per row explains the tuned lens's gain",
        )
    if found["prefer_tuned"]:
        return prefer(
            TUNED,
            TUNED,
            f"in {found['facts_that_prefer_tuned']} of {found['facts']} facts it is nearer to the "
            "model beyond calibration, or earlier",
        )
    return prefer(NORM, NORM, "the tuned lens is neither much nearer to the model nor earlier")


def tau_section(meta: TableMeta) -> dict[str, Any]:
    """Return the temperature of every row of the norm lens, or why there is none."""
    if meta.norm_temperature is None:
        return {"status": "skipped", "reason": "no temperature per row was fitted"}
    found = dict(meta.norm_temperature)
    return {"status": "ok", "values": list(found.pop("tau")), **found}


def _gains(facts: Sequence[Fact], row: int, direction: str) -> dict[str, float | None]:
    """Medians over facts of gains and of what is left, each difference taken within its fact."""
    parts = [
        _parts(
            _less(norm := fact[NORM].at(direction, row), fact[TUNED].at(direction, row)),
            _less(norm, fact[NORM].at(f"{direction}_norm_temp", row)),
            _less(norm, fact[BIAS].at(direction, row)) if BIAS in fact else None,
        )
        for fact in facts
    ]
    return {name: _median([part[name] for part in parts]) for name in parts[0]}


def _parts(
    tuned: float | None, temperature: float | None, bias: float | None
) -> dict[str, float | None]:
    known = [value for value in (temperature, bias) if value is not None]
    best = max(known, default=0.0)
    return {
        "tuned": tuned,
        "temperature": temperature,
        "bias": bias,
        "beyond_temperature": _less(tuned, temperature),
        "beyond_bias": _less(tuned, bias),
        "beyond_both": _less(tuned, max(best, 0.0)) if len(known) == 2 else None,
    }


def _explained(gain: Mapping[str, float | None], config: MeasureConfig) -> str | None:
    tuned = gain["tuned"]
    if tuned is None:
        return None
    if tuned <= 0.0:
        return "nothing"
    for name, part in (("calibration", "temperature"), ("bias", "bias")):
        alone, left = gain[part], gain[f"beyond_{part}"]
        if (
            alone is not None
            and left is not None
            and left < config.tuned_rotation_bits
            and alone >= config.tuned_temperature_share * tuned
        ):
            return name
    known = gain["temperature"] is not None and gain["bias"] is not None
    return "rotation" if known else "not_separated"


def _tempered(
    facts: Sequence[Fact], depths: Mapping[str, int], direction: str
) -> dict[str, dict[str, float | None]]:
    column = f"{direction}_norm_temp"
    known = [fact[NORM] for fact in facts if NORM in fact and fact[NORM].has(column)]
    if not known:
        return {}
    return {
        TEMPERED: {
            depth: _median([part.at(column, row) for part in known])
            for depth, row in depths.items()
        }
    }


def _milestones(summaries: Sequence[Mapping[str, PassSummary]], lens: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in COMPARED:
        layers = [
            entry[lens].milestones[name].first
            for entry in summaries
            if lens in entry and name in entry[lens].milestones
        ]
        reached = [layer for layer in layers if layer is not None]
        if layers:
            found[name] = {"median": _median(reached), "missing": len(layers) - len(reached)}
    return found


def _spread(summaries: Sequence[Mapping[str, PassSummary]]) -> dict[str, Any] | None:
    """Return how many rows apart the lenses first have the answer on top, over facts."""
    spreads: list[int] = []
    for entry in summaries:
        firsts = [item.milestones["L_semantic"].first for item in entry.values()]
        reached = [layer for layer in firsts if layer is not None]
        if len(reached) > 1:
            spreads.append(max(reached) - min(reached))
    if not spreads:
        return None
    return {"median": _median(spreads), "max": max(spreads), "facts": len(spreads)}


def _median(values: Sequence[float | int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _less(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two
