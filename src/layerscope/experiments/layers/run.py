"""The layers experiment: prompts through a model, every layer through lenses, into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.allocator import peak_memory_bytes
from layerscope.errors import ConfigError
from layerscope.experiments import provenance
from layerscope.experiments.layers.asking import Asked, ask
from layerscope.experiments.layers.calibrate import (
    Calibrated,
    Calibration,
    calibrate,
    plan_calibration,
)
from layerscope.experiments.layers.config import LayersConfig
from layerscope.experiments.layers.decode import BatchDecoder
from layerscope.experiments.layers.prepare import WorkUnit, chosen_format, work_units
from layerscope.experiments.layers.prompts import PromptSet
from layerscope.experiments.units import Progress, UnitStore
from layerscope.lenses.base import Lens
from layerscope.lenses.find import FoundLens, find_lenses
from layerscope.lenses.fitting.text import TextSource
from layerscope.measures.copy import with_copy_flags
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable, PromptInfo, TableMeta, conform, prompt_from_dict
from layerscope.models import LanguageModel, load
from layerscope.models.vocabulary import ignore_mask
from layerscope.products import choose
from layerscope.readout import describe_kernels

IGNORED_SAMPLE = 16


@dataclass(frozen=True)
class LayersResult:
    """What the experiment found: the typed table, its summary, and where both come from."""

    table: LayersTable
    summary: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def left_out(self) -> list[dict[str, Any]]:
        """The prompts that could not be asked: prompt, variant, stage and reason of each."""
        return list((self.summary.get("prompts") or {}).get("left_out") or ())

    def milestones(self) -> pl.DataFrame:
        """Return one row per pass and lens with its main milestones (row indices)."""
        names = ("L_copy", "L_semantic", "first_kl_below_0.5", "first_kl_below_1.0")
        keys = ("fact_key", "prompt_id", "prompt_variant", "lens")
        return pl.DataFrame(
            [{name: entry.get(name) for name in keys + names} for entry in self.summary["passes"]],
            infer_schema_length=None,
        )


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked, nothing computed.

    `prompts` is what was given, `asked` what of it can be asked of this model.
    """

    model: LanguageModel
    prompts: PromptSet
    asked: Asked
    config: LayersConfig
    units: tuple[WorkUnit, ...]
    identity: Mapping[str, Any]
    found: tuple[FoundLens, ...] = ()
    calibration: Calibration | None = None

    @property
    def lenses(self) -> tuple[Lens, ...]:
        """The lenses of the run, ready to use."""
        return tuple(entry.lens for entry in self.found if entry.lens is not None)


def analyze(
    model: LanguageModel | str | Path,
    prompts: PromptSet | str | Path | Sequence[Mapping[str, str]] | None = None,
    config: LayersConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> LayersResult:
    """Read every layer of a model on a set of prompts.

    Args:
        model: a loaded model, a Hugging Face id or a local folder.
        prompts: a PromptSet, a CSV or YAML file, or mappings with key, prompt, answer and optional
            foil, control, ablated; the built-in suite by default.
        config: lenses, norm choice, thresholds.
        units: where finished work is kept; nowhere by default.
        progress: called with (passes done, passes in all).

    Raises:
        ConfigError: the text for the diagnostics cannot be read.
        LensError: a fitted lens is missing, or does not fit the model.
        PromptError: no prompt can be asked: the first is empty or too long. AlignmentError: the
            first one's answer does not follow it in whole tokens. Both before anything is computed;
            where only some prompts cannot be asked, they are in `LayersResult.left_out`.
    """
    loaded = model if isinstance(model, LanguageModel) else load(str(model))
    return execute(plan(loaded, _prompt_set(prompts), config), units=units, progress=progress)


def plan(
    model: LanguageModel, prompts: PromptSet | None = None, config: LayersConfig | None = None
) -> Plan:
    """Align, tokenise and cut into work units; raises what `analyze` raises."""
    prompts = prompts or PromptSet.builtin()
    config = config or LayersConfig()
    if config.text is not None and next(TextSource(config.text).documents(), None) is None:
        raise ConfigError(f"{config.text} holds no text; give text for the diagnostics to read")
    asked = ask(model, prompts, config)
    found = find_lenses(config.lenses, model, norm=config.norm_choice, artifacts=config.artifacts)
    calibration = plan_calibration(asked.passes, found, model, config)
    identity = {
        "model": model.provenance(),
        "versions": provenance.versions(),
        "lenses": {entry.name: dict(entry.identity) for entry in found if entry.lens is not None},
        "norm_temperature": None if calibration is None else calibration.identity,
    }
    units = work_units(
        asked.passes, config, n_layers=model.n_layers, d_model=model.d_model, identity=identity
    )
    return Plan(model, prompts, asked, config, tuple(units), identity, found, calibration)


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> LayersResult:
    """Carry out a plan unit by unit and measure the whole table."""
    watch = provenance.Stopwatch()
    decoder = BatchDecoder(planned.model, planned.lenses, planned.config)
    calibrated = None
    if planned.calibration is not None:
        calibrated = calibrate(planned.calibration, decoder, planned.identity, units)
        decoder.tempered = calibrated.lens
    frames: list[pl.DataFrame] = []
    infos: list[PromptInfo] = []
    total, done = sum(len(unit.passes) for unit in planned.units), 0
    for unit in planned.units:
        frame, found = _unit(decoder, unit, units)
        frames.append(frame)
        infos += found
        done += len(unit.passes)
        if progress is not None:
            progress(done, total)
    watch.lap("decode")
    table = with_copy_flags(
        LayersTable(rows=conform(pl.concat(frames)), meta=_meta(planned, infos, calibrated)),
        planned.config.measures,
    )
    watch.lap("table")
    diagnostics = _diagnostics(planned, table, units)
    watch.lap("diagnose")
    given = planned.asked.to_dict()
    summary = summarise(
        table,
        planned.config.measures,
        diagnostics=diagnostics,
        left_out=given["left_out"],
    ).to_dict()
    summary["prompts"] = given
    watch.lap("measure")
    return LayersResult(table, summary, _provenance(planned, watch))


def _diagnostics(planned: Plan, table: LayersTable, units: UnitStore | None) -> dict[str, Any]:
    """Return the checks that need the model again, by name; none unless they were asked for."""
    if planned.config.diagnostics == "none":
        return {}
    from layerscope.experiments.layers.diagnostics import diagnose

    level, text = planned.config.diagnostics, planned.config.text
    return diagnose(planned, planned.lenses, table, level=level, text=text, units=units)


def _unit(
    decoder: BatchDecoder, unit: WorkUnit, units: UnitStore | None
) -> tuple[pl.DataFrame, list[PromptInfo]]:
    kept = units.get_unit(unit.key) if units is not None else None
    if kept is not None and kept[1] is not None:
        return kept[0], [prompt_from_dict(entry) for entry in kept[1]["prompts"]]
    frame, infos = decoder.decode(unit.passes)
    if units is not None:
        units.put_unit(unit.key, frame, {"prompts": [asdict(info) for info in infos]})
    return frame, infos


def _prompt_set(
    prompts: PromptSet | str | Path | Sequence[Mapping[str, str]] | None,
) -> PromptSet | None:
    if prompts is None or isinstance(prompts, PromptSet):
        return prompts
    if isinstance(prompts, str | Path):
        return PromptSet.from_file(prompts)
    return PromptSet.from_records("given", prompts)


def _meta(planned: Plan, infos: Sequence[PromptInfo], calibrated: Calibrated | None) -> TableMeta:
    model = planned.model
    strings = model.token_strings()
    ignored = ignore_mask(model.tokenizer, model.d_vocab).nonzero()[0]
    bias = model.unembedding.bias
    return TableMeta(
        model=model.name,
        n_layers=model.n_layers,
        d_vocab=model.d_vocab,
        d_model=model.d_model,
        n_heads=model.n_heads,
        n_ctx=model.n_ctx,
        architecture=model.architecture,
        norm_choice=planned.config.norm_choice,
        softcap=model.unembedding.softcap,
        logit_scale=None if model.unembedding.scale == 1.0 else model.unembedding.scale,
        unembed_bias={
            "present": bias is not None and bool(bias.any()),
            "l2_norm": 0.0 if bias is None else float(bias.float().norm()),
            "max_abs": 0.0 if bias is None else float(bias.float().abs().max()),
        },
        ignored_token_count=len(ignored),
        ignored_token_sample=tuple(strings[token] for token in ignored[:IGNORED_SAMPLE]),
        prompts=tuple(infos),
        lenses={entry.name: entry.to_dict() for entry in planned.found},
        norm_temperature=None if calibrated is None else calibrated.record,
        provenance={"prompts_sha256": planned.asked.prompts.digest()},
    )


def _format_reason(planned: Plan) -> str:
    if planned.config.format != "auto":
        return f"format={planned.config.format!r} was asked for"
    return planned.model.tuning.reason


def _provenance(planned: Plan, watch: provenance.Stopwatch) -> dict[str, Any]:
    model = planned.model
    return {
        "experiment": "layers",
        "config": planned.config.to_dict(),
        "prompts": {
            "name": planned.prompts.name,
            "facts": len(planned.prompts.facts),
            "passes": sum(len(unit.passes) for unit in planned.units),
            "sha256": planned.prompts.digest(),
            "left_out": planned.asked.to_dict()["left_out"],
            "format": chosen_format(model, planned.config),
            "format_reason": _format_reason(planned),
        },
        "lenses": {
            entry.name: {**entry.to_dict(), "folder": entry.folder} for entry in planned.found
        },
        "model": model.provenance(),
        "readout_products": choose(
            planned.config.products, device=model.device, compiled=False
        ).to_dict(),
        "readout_kernels": describe_kernels(),
        "run_products": choose(planned.config.run_products, device=model.device).to_dict(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "git_commit": provenance.git_commit(),
        "timing": watch.to_dict(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
