"""One temperature per row for the norm lens: from a fitted lens, or from this run's own prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.decode import BatchDecoder
from layerscope.experiments.layers.prepare import PreparedPass
from layerscope.experiments.units import UnitStore, work_key
from layerscope.lenses.base import Lens
from layerscope.lenses.find import FoundLens, beside_tuned, find_lens
from layerscope.lenses.fitted import TemperatureLens
from layerscope.models import LanguageModel

IN_RUN, ARTIFACT = "in_run", "artifact"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where the temperatures of the norm lens come from, before anything is computed.

    Attributes:
        source: "artifact" (fitted on other text) or "in_run" (fitted on `passes`, so that their own
            tempered figures flatter the temperature).
        lens: the fitted lens; None with "in_run".
        passes: the prompts that "in_run" fits on: a fact, the same without its filler, a control.
        identity: what decides the temperatures, JSON-able; part of every work unit's key.
        fitted_with: which fit the artifact belongs to; None with "in_run".
    """

    source: str
    lens: Lens | None
    passes: tuple[PreparedPass, ...]
    identity: Mapping[str, Any]
    fitted_with: str | None = None


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The temperatures of a run: the lens that applies them, and what is recorded of them."""

    lens: Lens
    record: dict[str, Any]


def plan_calibration(
    prepared: Sequence[PreparedPass],
    found: Sequence[FoundLens],
    model: LanguageModel,
    config: LayersConfig,
) -> Calibration | None:
    """Choose where the temperatures come from; None without a norm lens to apply them to.

    A temperature lens of the run comes first, then one whose folder was given, then the one that
    was fitted beside the run's tuned lens; else the run's own prompts.
    """
    ready = {entry.name: entry for entry in found if entry.lens is not None}
    if "norm" not in ready:
        return None
    chosen = ready.get("temperature")
    if chosen is None and "temperature" in config.artifacts:
        given = {"temperature": Path(config.artifacts["temperature"])}
        chosen = find_lens("temperature", model, norm=config.norm_choice, given=given)
    if chosen is None and "tuned" in ready:
        chosen = beside_tuned("temperature", ready["tuned"], model, norm=config.norm_choice)
    if chosen is not None:
        return Calibration(
            ARTIFACT,
            chosen.lens,
            (),
            {"source": ARTIFACT, **chosen.identity},
            fitted_with=str(chosen.facts.get("fitted_with")),
        )
    passes = calibrating(prepared)
    hashes = [item.prompt_sha256 for item in passes]
    return Calibration(IN_RUN, None, passes, {"source": IN_RUN, "prompts": hashes})


def calibrating(prepared: Sequence[PreparedPass]) -> tuple[PreparedPass, ...]:
    """Return the passes to fit on: the first fact, it without its filler, the first control."""
    base = next((item for item in prepared if item.source.prompt_id == "pos"), prepared[0])
    ablated = next(
        (
            item
            for item in prepared
            if item.source.prompt_id == "pos"
            and item.source.variant != base.source.variant
            and item.source.fact_key == base.source.fact_key
        ),
        None,
    )
    control = next((item for item in prepared if item.source.prompt_id == "ctl"), None)
    chosen = {item.source.index: item for item in (base, ablated, control) if item is not None}
    return tuple(chosen.values())


def calibrate(
    calibration: Calibration,
    decoder: BatchDecoder,
    identity: Mapping[str, Any],
    units: UnitStore | None,
) -> Calibrated:
    """Return the temperatures, fitted now, or as a killed run left them."""
    record: dict[str, Any] = {"source": calibration.source}
    if calibration.lens is not None:
        record["fitted_with"] = calibration.fitted_with
        lens = calibration.lens
    else:
        rows = _fitted(calibration, decoder, identity, units)
        unsettled = rows.filter(~pl.col("settled"))["layer"].to_list()
        record |= {
            "prompts": [item.source.index for item in calibration.passes],
            "not_settled": unsettled,
        }
        inverse = torch.tensor(rows["inverse_temperature"].to_list(), dtype=torch.float32)
        lens = TemperatureLens(
            decoder.model, {"inverse_temperature": inverse}, norm=decoder.config.norm_choice
        )
    return Calibrated(lens, record | {"tau": temperatures(lens)})


def temperatures(lens: Lens) -> list[float | None]:
    """Return tau of row 0 to n_layers, None where it is infinite; the last row's is 1."""
    assert isinstance(lens, TemperatureLens)
    inverse = lens.tensors()["inverse_temperature"].double().tolist()
    return [None if value == 0.0 else 1.0 / value for value in inverse] + [1.0]


def _fitted(
    calibration: Calibration,
    decoder: BatchDecoder,
    identity: Mapping[str, Any],
    units: UnitStore | None,
) -> pl.DataFrame:
    key = work_key("layers.temperatures", dict(identity), decoder.config.content())
    kept = units.get_unit(key) if units is not None else None
    if kept is not None:
        return kept[0]
    fit = decoder.fit_temperatures(calibration.passes)
    rows = pl.DataFrame(
        {
            "layer": list(range(len(fit.settled))),
            "inverse_temperature": fit.inverse_temperature.double().tolist(),
            "settled": fit.settled,
        }
    )
    if units is not None:
        units.put_unit(key, rows, {})
    return rows
