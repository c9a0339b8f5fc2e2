"""The battery experiment: hundreds of facts, each asked in many ways, and one roll-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from layerscope.errors import PromptError
from layerscope.experiments import provenance
from layerscope.experiments.battery.config import BatteryConfig
from layerscope.experiments.battery.decode import LastReader, kernels_for
from layerscope.experiments.battery.guidance import evaluation_pack, guidance
from layerscope.experiments.battery.items import Battery
from layerscope.experiments.battery.milestones import KEPT_ROWS, describe, measure
from layerscope.experiments.battery.prepare import (
    Asked,
    Control,
    Prepared,
    batches,
    content,
    prepare_battery,
)
from layerscope.experiments.battery.rollup import by_language, rollup_table, summary
from layerscope.experiments.battery.summarise import items_table, with_margins
from layerscope.experiments.units import (
    Outcome,
    Piece,
    Progress,
    UnitStore,
    Work,
    describe_run,
    run_units,
    work_key,
)
from layerscope.lenses.find import FoundLens, find_lenses
from layerscope.models import LanguageModel
from layerscope.products import choose
from layerscope.readout import describe_kernels
from layerscope.readout.fused import Kernels

EXPERIMENT = "battery"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked and tokenised, nothing computed."""

    model: LanguageModel
    battery: Battery
    config: BatteryConfig
    prepared: Prepared
    found: tuple[FoundLens, ...]
    identity: Mapping[str, Any]
    kernels: Kernels

    @property
    def lenses(self) -> tuple[str, ...]:
        """Names of the lenses that are ready."""
        return tuple(entry.name for entry in self.found if entry.lens is not None)

    def prompts(self) -> list[dict[str, Any]]:
        """Return what is asked, JSON-able: the content of the run."""
        asked: list[dict[str, Any]] = [
            {
                "item": entry.question.item.key,
                "variant": entry.question.variant,
                "prompt_sha256": entry.prepared.prompt_sha256,
                "answer": entry.question.answer,
                "foil": entry.prepared.source.foil,
            }
            for entry in self.prepared.asked
        ]
        return asked + [asdict(entry) for entry in self.prepared.excluded]


def plan(
    model: LanguageModel, battery: Battery | None = None, config: BatteryConfig | None = None
) -> Plan:
    """Tokenise, align and check everything.

    Args:
        model: the model that is asked.
        battery: facts; the shipped ones by default.
        config: lenses, controls, seed.

    Raises:
        LensError: a fitted lens is missing, or does not fit the model.
        PromptError: no item at all can be asked; the first reason is given.
    """
    battery, config = battery or Battery.builtin(), config or BatteryConfig()
    found = find_lenses(config.lenses, model, norm=config.norm_choice, artifacts=config.artifacts)
    prepared = prepare_battery(model, battery, config)
    if not prepared.asked:
        reason = prepared.excluded[0].reason if prepared.excluded else "the battery is empty"
        raise PromptError(f"no item of {battery.name!r} can be asked of {model.name}: {reason}")
    ready = [entry for entry in found if entry.lens is not None]
    kernels = kernels_for(len(prepared.asked), model, n_lenses=len(ready))
    identity = {
        "model": model.provenance(),
        "versions": provenance.versions(),
        "lenses": {entry.name: dict(entry.identity) for entry in ready},
        "kernels": kernels,
    }
    return Plan(model, battery, config, prepared, found, identity, kernels)


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Ask everything, batch by batch, and roll it up.

    Tables: `rows` (question x lens x row, last position), `prompts` (question x lens: milestones),
    `items` (item x lens: milestones and every control), `rollup` (lens x group x measure),
    `excluded`. A batch is reduced to its rows and milestones before the next one runs.
    """
    watch = provenance.Stopwatch()
    ready = [entry.lens for entry in planned.found if entry.lens is not None]
    reader = LastReader(planned.model, ready, planned.config, kernels=planned.kernels)
    groups = batches(planned.prepared.asked, planned.model, planned.config, n_lenses=len(ready))
    works = [_batch(planned, reader, group) for group in groups]
    works += [_control(planned, reader, control) for control in planned.prepared.controls]
    pieces = run_units(works, units=units, progress=progress)
    watch.lap("ask")
    records = [record for piece in pieces for record in piece.payload.get("prompts", ())]
    prompts = _prompts(planned, records)
    order = ["prompt_index", "lens", "layer"]
    rows = pl.concat([piece.rows for piece in pieces[: len(groups)]]).sort(order)
    controls = [piece.rows for piece in pieces[len(groups) :]]
    rows = with_margins(rows, prompts, pl.concat([_NO_CONTROLS, *controls]))
    items = items_table(prompts, rows, n_layers=planned.model.n_layers)
    sampling = {"seed": planned.config.seed, "resamples": planned.config.resamples}
    rollup = rollup_table(items, **sampling)
    excluded = _excluded(planned)
    found = _summary(planned, items, rollup, excluded)
    watch.lap("measure")
    tables = {
        "rows": rows,
        "prompts": prompts,
        "items": items,
        "rollup": rollup,
        "excluded": excluded,
    }
    advice = guidance(found, items)
    found |= {
        "measurement_guidance": advice,
        "evaluation_pack": evaluation_pack(found, advice, tables),
    }
    return Outcome(tables, found, _provenance(planned, watch))


_NO_CONTROLS = pl.DataFrame(
    schema={
        "item": pl.String,
        "lens": pl.String,
        "layer": pl.Int32,
        "p_control": pl.Float64,
        "p_item": pl.Float64,
    }
)


def _batch(planned: Plan, reader: LastReader, group: Sequence[Asked]) -> Work:
    model, config = planned.model, planned.config

    def do() -> Piece:
        rows, heads = reader.read(group)
        records = measure(
            rows, group, config.measures, n_layers=model.n_layers, d_vocab=model.d_vocab
        )
        by_index = dict(zip([entry.index for entry in group], heads, strict=True))
        records = [record | by_index[record["prompt_index"]] for record in records]
        return Piece(rows.rename({"token": "top1"}).select(KEPT_ROWS), {"prompts": records})

    key = work_key(EXPERIMENT, SCHEMA_VERSION, planned.identity, config.content(), content(group))
    return Work(key, do, size=len(group))


def _control(planned: Plan, reader: LastReader, control: Control) -> Work:
    def do() -> Piece:
        return Piece(reader.control(control))

    key = work_key(
        EXPERIMENT,
        SCHEMA_VERSION,
        planned.identity,
        planned.config.content(),
        ["control", control.prepared.prompt_sha256, list(control.items)],
    )
    return Work(key, do)


def _prompts(planned: Plan, records: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Join the milestones with what was known of every question before."""
    described = pl.DataFrame(
        [describe(entry, planned.battery.wordings) for entry in planned.prepared.asked],
        infer_schema_length=None,
        schema_overrides={"frequency": pl.String, "foil": pl.String, "prompt_index": pl.Int64},
    )
    whole = {name: pl.Int64 for name in records[0] if name.startswith(("L_", "first_"))}
    measured = pl.DataFrame(
        list(records),
        infer_schema_length=None,
        schema_overrides=whole
        | {
            "prompt_index": pl.Int64,
            "foil_rank_at_onset": pl.Int64,
            "answer_rank_last": pl.Int64,
            "artifact_tier": pl.String,
            "confirmed_source": pl.String,
            **dict.fromkeys(("onset", "delta_hat", "artifact_score"), pl.Float64),
            **dict.fromkeys(("p_answer_at_onset", "p_answer_last"), pl.Float64),
        },
    ).sort("prompt_index", "lens")
    joined = described.join(measured, on="prompt_index", how="inner", maintain_order="right")
    return joined.with_columns(pl.col("prompt_index").cast(pl.Int32))


def _excluded(planned: Plan) -> pl.DataFrame:
    names = ("item", "relation", "language", "variant", "stage", "reason")
    return pl.DataFrame(
        [asdict(entry) for entry in planned.prepared.excluded],
        schema=dict.fromkeys(names, pl.String),
    )


def _summary(
    planned: Plan, items: pl.DataFrame, rollup: pl.DataFrame, excluded: pl.DataFrame
) -> dict[str, Any]:
    model, prepared, config = planned.model, planned.prepared, planned.config
    return {
        "model": model.name,
        "n_layers": model.n_layers,
        "d_vocab": model.d_vocab,
        "battery": planned.battery.name,
        "lenses": list(planned.lenses),
        "parts": list(config.parts),
        "counts": {
            "items": items.filter(~pl.col("invented"))["item"].n_unique(),
            "invented": items.filter(pl.col("invented"))["item"].n_unique(),
            "prompts": len(prepared.asked) + len(prepared.controls),
            "excluded": dict(sorted(Counter(entry.stage for entry in prepared.excluded).items())),
        },
        "languages": by_language(items, excluded, dict(prepared.tried)),
        "by_lens": summary(
            items,
            rollup,
            d_vocab=model.d_vocab,
            seed=config.seed,
            resamples=config.resamples,
            lenses=planned.lenses,
        ),
    }


def _provenance(planned: Plan, watch: provenance.Stopwatch) -> dict[str, Any]:
    config, device = planned.config, planned.model.device
    return describe_run(
        EXPERIMENT,
        planned.model,
        config.to_dict(),
        watch,
        battery={"name": planned.battery.name, "sha256": planned.battery.digest()},
        lenses={entry.name: {**entry.to_dict(), "folder": entry.folder} for entry in planned.found},
        readout_products=choose(
            config.products, device=device, compiled=planned.kernels == "fused"
        ).to_dict(),
        readout_kernels={**describe_kernels(), "used": planned.kernels},
        run_products=choose(config.run_products, device=device).to_dict(),
    )
