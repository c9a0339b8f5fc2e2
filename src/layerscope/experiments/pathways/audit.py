"""The audit: is the causal-feature data what it says it is, and does it hang together?

Nothing raises and nothing stops early: every fault is counted, named with file and record, and the
rest is audited all the same. Records stream; what is held are the features, not the responses.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from layerscope.experiments.pathways.config import PathwaysConfig
from layerscope.experiments.pathways.findings import Findings
from layerscope.experiments.pathways.records import CausalRecord, causal_record
from layerscope.experiments.pathways.responses import ResponseTally, read_responses
from layerscope.experiments.pathways.streams import RecordStream, StreamError

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_IDS_SUSPICIOUS = 1e-3  # chance that honest ids would all be below d_model


@dataclass(frozen=True)
class Universe:
    """What ids may name: the feature space, and the width of the residual stream.

    Attributes:
        space: name of the feature space.
        sizes: features by layer. d_model: width of what the dictionaries read.
        model: name of the model.
    """

    space: str
    sizes: Mapping[int, int]
    d_model: int
    model: str


@dataclass(eq=False)
class Audit:
    """What an audit found.

    Attributes:
        findings: all faults. counts: of files, records, features, joins.
        features: one row per unique feature, newest verdict.
    """

    findings: Findings
    counts: dict[str, Any] = field(default_factory=lambda: {})
    features: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=FEATURES))

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values: one schema whatever happened."""
        return {
            "schema_version": SCHEMA_VERSION,
            "validated": self.findings.exit_code < 2,
            "exit_code": self.findings.exit_code,
            "errors": self.findings.of("error"),
            "warnings": self.findings.of("warning"),
            **self.counts,
        }


FEATURES: dict[str, Any] = {
    "space": pl.String(),
    "layer": pl.Int64(),
    "feature_id": pl.Int64(),
    "feature": pl.String(),
    "cohen_d": pl.Float64(),
    "is_causal": pl.Boolean(),
    "side": pl.String(),
    "safe_effect_size": pl.Float64(),
    "risky_effect_size": pl.Float64(),
    "safe_p_value": pl.Float64(),
    "risky_p_value": pl.Float64(),
    "safe_q_value": pl.Float64(),
    "risky_q_value": pl.Float64(),
    "p_value": pl.Float64(),
    "q_value": pl.Float64(),
    "n_responses": pl.Int64(),
    "file": pl.String(),
    "record": pl.Int64(),
}


def find_files(data: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files below a folder that match any pattern, sorted by their relative path."""
    found = {path for pattern in patterns for path in data.rglob(pattern) if path.is_file()}
    return sorted(found, key=lambda path: path.relative_to(data).as_posix())


def audit(config: PathwaysConfig, universe: Universe | None) -> Audit:
    """Audit checkpoints and response logs.

    Args:
        config: where they are and what is asked of them.
        universe: which ids exist; None leaves ids unchecked (which is an error of the caller).
    """
    data = Path(config.data)
    findings = Findings()
    chosen: dict[str, list[Path]] = {}
    found: dict[str, int] = {}
    for kind, patterns in (("checkpoints", config.checkpoints), ("responses", config.responses)):
        files = find_files(data, patterns)
        found[kind] = len(files)
        if not files:
            names = ", ".join(patterns)
            findings.error(f"no_{kind}", f"no file matches {names} below {data.name or data}")
        chosen[kind] = _sample(files, config, kind)
    records, models = _read_checkpoints(data, chosen["checkpoints"], findings)
    kept, duplicates = _unique(records, config, findings)
    if universe is not None:
        _check_models(models, universe, config, findings)
        _check_ids(kept, universe, config, findings)
    tally = read_responses(data, chosen["responses"], config, findings)
    sampled = config.sample is not None and any(len(chosen[k]) < found[k] for k in chosen)
    result = Audit(findings)
    join = _join(kept, tally, config, findings, sampled=sampled)
    result.features = _table(kept, tally, universe)
    causal = result.features.filter("is_causal")
    result.counts = {
        "sampled": sampled,
        "files": {kind: {"found": found[kind], "read": len(chosen[kind])} for kind in chosen},
        "checkpoints": {
            "records": len(records),
            "unique_features": len(kept),
            "duplicates": duplicates,
            "causal_features": causal.height,
            "causal_by_layer": _by_layer(causal),
            "causal_by_side": dict(sorted(Counter(causal["side"].to_list()).items())),
        },
        "responses": tally.to_dict(config.conditions),
        "join": join,
    }
    _log.info(
        "%d checkpoint files with %d records of %d features, %d of them causal",
        len(chosen["checkpoints"]),
        len(records),
        len(kept),
        causal.height,
    )
    _log.info(
        "%d response files with %d records; %d of %d causal features have responses",
        len(chosen["responses"]),
        tally.records,
        join["causal_with_responses"],
        join["causal"],
    )
    return result


def causal_records(config: PathwaysConfig) -> list[CausalRecord]:
    """Return the causal features of the checkpoints that have an effect size; faults are ignored.

    For estimates before a run: the audit says what is wrong with them.
    """
    data, unheard = Path(config.data), Findings()
    files = _sample(find_files(data, config.checkpoints), config, "checkpoints")
    records, _ = _read_checkpoints(data, files, unheard)
    kept, _ = _unique(records, config, unheard)
    return [record for record in kept if record.is_causal and math.isfinite(record.cohen_d)]


def _sample(files: list[Path], config: PathwaysConfig, kind: str) -> list[Path]:
    if config.sample is None or len(files) <= config.sample:
        return files
    return sorted(Random(f"{config.seed}:{kind}").sample(files, config.sample))


def _read_checkpoints(
    data: Path, files: Sequence[Path], findings: Findings
) -> tuple[list[CausalRecord], dict[str, str]]:
    """Return all usable records, and the model that each file names."""
    models: dict[str, str] = {}
    records: list[CausalRecord] = []
    for path in files:
        name = path.relative_to(data).as_posix()
        stream = RecordStream(path)
        raw: list[Any] = []
        try:
            raw.extend(stream)
        except StreamError as error:
            findings.error(
                "unreadable_json",
                "a checkpoint is no whole JSON; write it again or remove it",
                file=name,
                byte=error.offset,
                detail=error.reason,
            )
        if not raw and not stream.fields:
            continue
        if not raw:
            findings.error("no_results", "a checkpoint holds no results", file=name)
        for index, each in enumerate(raw):
            made, faults = causal_record(each, file=name, index=index, fields=stream.fields)
            for fault in faults:
                findings.error(
                    fault.code, fault.message, file=name, record=index, **_detail(fault.detail)
                )
            if made is not None:
                records.append(made)
        if isinstance(stream.fields.get("model"), str):
            models[name] = stream.fields["model"]
    return records, models


def _check_models(
    models: Mapping[str, str], universe: Universe, config: PathwaysConfig, findings: Findings
) -> None:
    own = _short(universe.model)
    for name, model in models.items():
        if _short(model) != own:
            say = findings.warn if config.allow_mismatch else findings.error
            say(
                "other_model",
                f"a checkpoint is of another model than '{own}'; allow_mismatch stamps the results "
                "and goes on",
                file=name,
                model=model,
            )


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


def _unique(
    records: Sequence[CausalRecord], config: PathwaysConfig, findings: Findings
) -> tuple[list[CausalRecord], int]:
    """Keep the newest record of every feature; say where records of one feature disagree."""
    newest: dict[tuple[str | None, int, int], CausalRecord] = {}
    conflicts: dict[tuple[str | None, int, int], list[CausalRecord]] = {}
    for record in records:
        key = (record.space, record.layer, record.feature_id)
        other = newest.get(key)
        if other is not None and other.verdict != record.verdict:
            conflicts.setdefault(key, [other]).append(record)
        if other is None or record.stamp >= other.stamp:
            newest[key] = record
    say = findings.error if config.duplicates == "error" else findings.warn
    for key, group in conflicts.items():
        say(
            "conflicting_duplicates",
            "checkpoints disagree about a feature (effect or verdict)"
            + ("" if config.duplicates == "error" else "; the newest counts"),
            feature=group[0].feature,
            files=sorted({record.file for record in group})[:4],
            kept=newest[key].file,
        )
    kept = sorted(newest.values(), key=lambda r: (r.layer, r.feature_id, r.space or ""))
    undefined = [record for record in kept if record.is_causal and math.isnan(record.cohen_d)]
    for record in undefined:
        findings.warn(
            "undefined_effect",
            "a causal feature has no Cohen's d (NaN); it cannot be ranked and will be left out",
            file=record.file,
            record=record.index,
            feature=record.feature,
        )
    return kept, len(records) - len(kept)


def _check_ids(
    records: Sequence[CausalRecord],
    universe: Universe,
    config: PathwaysConfig,
    findings: Findings,
) -> None:
    for record in records:
        where: dict[str, Any] = {
            "file": record.file,
            "record": record.index,
            "feature": record.feature,
        }
        size = universe.sizes.get(record.layer)
        if size is None:
            findings.error("layer_out_of_range", "a feature's layer has no dictionary", **where)
        elif not 0 <= record.feature_id < size:
            findings.error(
                "id_out_of_range",
                "a feature_id is beyond the dictionary of its layer",
                **where,
                features=size,
            )
        if record.space is not None and record.space != universe.space:
            say = findings.warn if config.allow_mismatch else findings.error
            say(
                "other_space",
                f"ids belong to another feature space than '{universe.space}': the same number "
                "means another feature there",
                **where,
                space=record.space,
            )
    without = [record for record in records if record.space is None]
    if without:
        findings.warn(
            "no_space",
            f"ids carry no feature space; they are taken to be of '{universe.space}'",
            count=len(without),
            file=without[0].file,
        )
        _check_coordinates(without, universe, findings)


def _check_coordinates(
    records: Sequence[CausalRecord], universe: Universe, findings: Findings
) -> None:
    """Warn where all ids are so small that they look like coordinates of the residual stream."""
    inside = [record for record in records if record.layer in universe.sizes]
    if not inside or any(record.feature_id >= universe.d_model for record in inside):
        return
    chance = math.prod(
        min(1.0, universe.d_model / universe.sizes[record.layer]) for record in inside
    )
    if chance < _IDS_SUSPICIOUS:
        largest = max(record.feature_id for record in inside)
        findings.warn(
            "residual_coordinates",
            "ids look like residual coordinates, not features of a dictionary: all are below the "
            "width of the residual stream; such ids name nothing here",
            count=len(inside),
            largest_id=largest,
            d_model=universe.d_model,
        )


def _join(
    records: Sequence[CausalRecord],
    tally: ResponseTally,
    config: PathwaysConfig,
    findings: Findings,
    *,
    sampled: bool,
) -> dict[str, Any]:
    causal = {record.feature for record in records if record.is_causal}
    tested = {record.feature for record in records}
    heard = set(tally.features)
    both = causal & heard
    if records and not causal:
        findings.warn("no_causal_features", "no feature is causal; there is nothing to select")
    coverage = len(both) / len(causal) if causal else None
    if coverage is not None and coverage < config.min_coverage and tally.records:
        say = findings.warn if sampled else findings.error
        say(
            "low_coverage",
            f"less than {config.min_coverage:.0%} of the causal features have responses",
            count=len(causal - heard),
            coverage=round(coverage, 4),
            missing=sorted(causal - heard)[:10],
        )
    strangers = heard - tested
    if strangers and tested:
        findings.warn(
            "unknown_features",
            "responses speak of features that no checkpoint names",
            count=len(strangers),
            features=sorted(strangers)[:10],
        )
    return {
        "causal": len(causal),
        "with_responses": len(heard),
        "causal_with_responses": len(both),
        "coverage_of_causal": coverage,
        "coverage_of_responses": len(heard & tested) / len(heard) if heard else None,
    }


def _table(
    records: Sequence[CausalRecord], tally: ResponseTally, universe: Universe | None
) -> pl.DataFrame:
    rows = [
        {
            "space": record.space or (universe.space if universe is not None else None),
            "layer": record.layer,
            "feature_id": record.feature_id,
            "feature": record.feature,
            "cohen_d": record.cohen_d,
            "is_causal": record.is_causal,
            "side": record.side,
            **record.effects,
            "n_responses": tally.features.get(record.feature, 0),
            "file": record.file,
            "record": record.index,
        }
        for record in records
    ]
    return pl.DataFrame(rows, schema=FEATURES)


def _by_layer(features: pl.DataFrame) -> dict[str, int]:
    counted = features.group_by("layer").len().sort("layer")
    return {str(layer): count for layer, count in counted.iter_rows()}


def _detail(value: Any) -> dict[str, Any]:
    return {} if value is None else {"detail": value}
