"""Stages in their order: skipped when fresh, stopped when one fails, resumed when killed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerscope.errors import ConfigError, DictionaryError, LayerscopeError
from layerscope.experiments import provenance
from layerscope.experiments.pathways.audit import audit
from layerscope.experiments.pathways.discover import run_discover
from layerscope.experiments.pathways.findings import Findings
from layerscope.experiments.pathways.integrate import run_integrate
from layerscope.experiments.pathways.manifest import (
    Chunks,
    StageRecord,
    StageResult,
    forget,
    is_fresh,
    read_record,
    stage_key,
    write_parquet,
    write_record,
)
from layerscope.experiments.pathways.memory import begin_stage, peak_bytes
from layerscope.experiments.pathways.prototype import run_prototype
from layerscope.experiments.pathways.replay import run_replay
from layerscope.experiments.pathways.select import run_select
from layerscope.experiments.pathways.tokens import run_tokens
from layerscope.experiments.pathways.workspace import (
    CAUSAL,
    CHUNKS,
    DISCOVERED,
    EDGES,
    FEATURE_FIGURES,
    FEATURES,
    OVER_PROMPTS,
    PROMPTS,
    RUN,
    TOKENS,
    VALIDATION,
    Workspace,
    hash_path,
    read_json,
)
from layerscope.experiments.units import Progress
from layerscope.files import remove_temporaries, write_json

_log = logging.getLogger(__name__)

RUN_SCHEMA = 1


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    Attributes:
        after: stages that must have been done without errors.
        reads: configuration fields that decide its outputs.
        inputs: hashes of what it reads.
        run: does it; given the workspace, its key, and whom to tell of progress.
    """

    name: str
    after: tuple[str, ...]
    reads: tuple[str, ...]
    inputs: Callable[[Workspace], Mapping[str, Any]]
    run: Callable[[Workspace, str, Progress | None], StageResult]


@dataclass(frozen=True)
class StageRun:
    """A stage that was run, or found fresh."""

    record: StageRecord
    skipped: bool
    seconds: float
    peak_memory_bytes: int | None


def run_audit(work: Workspace, inputs: Mapping[str, str]) -> StageResult:
    """Write ``data_validation.json`` and the table of unique features."""
    universe, problem = None, None
    try:
        universe = work.universe
    except (DictionaryError, OSError) as error:
        problem = str(error)
    found = audit(work.config, universe)
    if problem is not None:
        found.findings.error("dictionaries", f"ids cannot be checked: {problem}")
    files = {name: value for name, value in inputs.items() if name != "dictionaries"}
    write_parquet(work.path(FEATURES), found.features)
    write_json(work.path(VALIDATION), {**found.to_dict(), "inputs": files})
    for error in found.findings.of("error"):
        _log.error("%s (%d)", error["message"], error["count"])
    counts = {name: found.counts[name] for name in ("files", "join", "sampled")}
    brief = {**counts, "checkpoints": found.counts["checkpoints"]}
    return StageResult(
        brief, (VALIDATION, FEATURES), found.findings.exit_code, _lines(found.findings)
    )


def _lines(findings: Findings) -> tuple[str, ...]:
    return tuple(
        f"{finding.severity}: {finding.message} ({finding.count}"
        + (f"; first: {_where(finding.examples[0])})" if finding.examples else ")")
        for finding in findings
    )


def _where(example: Mapping[str, Any]) -> str:
    named = [
        f"{name} {example[name]}"
        for name in ("file", "record", "byte", "feature")
        if name in example
    ]
    return ", ".join(named) or ", ".join(f"{name} {value}" for name, value in example.items())


def _data(work: Workspace) -> dict[str, Any]:
    dictionaries = {"dictionaries": work.identities["dictionaries"]}
    return {**work.data_hashes("checkpoints", "responses"), **dictionaries}


def _with_model(*names: str) -> Callable[[Workspace], Mapping[str, Any]]:
    return lambda work: {**work.hashes(*names), **work.identities}


def _tokens_inputs(work: Workspace) -> dict[str, Any]:
    from pathlib import Path

    texts = work.config.texts
    more = {"texts": hash_path(Path(texts))} if texts else {}
    return {
        **work.hashes(CAUSAL, PROMPTS),
        **work.identities,
        **work.data_hashes("responses"),
        **more,
    }


_AUDITED = (
    "checkpoints",
    "responses",
    "conditions",
    "aliases",
    "sample",
    "seed",
    "empty_rate",
    "min_trials",
    "expected_trials",
    "min_coverage",
    "min_parse_rate",
    "min_unique",
    "duplicates",
    "allow_mismatch",
    "model",
)
_EDGES = (
    "position",
    "top_k_pathways",
    "variant",
    "error",
    "positions",
    "order",
    "min_share",
    "gradient_threshold",
    "layer0",
    "batch_size",
    "device",
    "dtype",
    "allow_mismatch",
)

STAGES: tuple[Stage, ...] = (
    Stage("audit", (), _AUDITED, _data, lambda work, _key, _progress: run_audit(work, _data(work))),
    Stage(
        "select",
        ("audit",),
        ("top_n_per_layer", "layer0", "n_prompts"),
        lambda work: {
            **work.hashes(FEATURES),
            **work.identities,
            "prompts": hash_path(work.prompts_path),
        },
        lambda work, _key, _progress: run_select(work),
    ),
    Stage(
        "prototype",
        ("audit", "select"),
        ("prototype_feature", "memory_limit_gb", *_EDGES),
        _with_model(CAUSAL, PROMPTS),
        lambda work, _key, _progress: run_prototype(work),
    ),
    Stage("discover", ("audit", "select"), _EDGES, _with_model(CAUSAL, PROMPTS), run_discover),
    Stage(
        "replay",
        ("audit", "select", "discover"),
        ("doses", "nulls", "dedup", "fdr", "seed", *_EDGES),
        _with_model(CAUSAL, PROMPTS, DISCOVERED),
        run_replay,
    ),
    Stage(
        "tokens",
        ("audit", "select"),
        (
            "responses",
            "aliases",
            "max_texts",
            "min_count",
            "min_joint",
            "permutations",
            "fdr",
            "drivers",
            "top_tokens",
            "seed",
            "device",
            "dtype",
            "allow_mismatch",
        ),
        _tokens_inputs,
        run_tokens,
    ),
    Stage(
        "integrate",
        ("audit", "select", "replay", "tokens"),
        ("top_tokens", "source_compat"),
        lambda work: {
            **work.hashes(CAUSAL, PROMPTS, FEATURES, EDGES, OVER_PROMPTS, TOKENS, FEATURE_FIGURES),
            **work.identities,
        },
        lambda work, _key, _progress: run_integrate(work),
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def run_stage(
    work: Workspace, name: str, *, resume: bool = True, progress: Progress | None = None
) -> StageRun:
    """Run one stage, or find it fresh; its record, time and peak memory go to ``run.json``.

    Args:
        work: the run.
        name: of the stage.
        resume: skip it when fresh, and go on after the last finished chunk; False does it anew.
        progress: called with (work done, work in all).

    Raises:
        ConfigError: an earlier stage is missing or failed, or what it reads is not there.
    """
    stage = STAGES[NAMES.index(name)]
    for earlier in stage.after:
        _require(work, earlier, name)
    remove_temporaries(work.out) if work.out.exists() else None
    if not resume:
        forget(work, name)
    inputs = dict(stage.inputs(work))
    key = stage_key(name, work.config.part(stage.reads), inputs)
    fresh = is_fresh(work, name, key)
    if fresh is not None:
        _log.info("%s: fresh, skipped", name)
        _note_run(work, name, {"skipped": True, "exit_code": fresh.exit_code})
        return StageRun(fresh, True, 0.0, None)
    _log.info("%s: begins", name)
    begin_stage(work.config.device)
    started = time.perf_counter()
    result = stage.run(work, key, progress)
    seconds = time.perf_counter() - started
    peak = peak_bytes(work.config.device)
    record = write_record(work, name, key, inputs, result)
    Chunks(work.path(f"{CHUNKS}/{name}")).clear()
    done = {
        "skipped": False,
        "exit_code": result.exit_code,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak,
        "key": key,
        "notes": list(result.notes),
        "summary": result.summary,
    }
    _note_run(work, name, done)
    _log.info("%s: done in %.1f s", name, seconds)
    return StageRun(record, False, seconds, peak)


def run_all(
    work: Workspace,
    *,
    stages: Sequence[str] = NAMES,
    resume: bool = True,
    progress: Callable[[str], Progress | None] | None = None,
) -> tuple[int, dict[str, StageRun]]:
    """Run stages in order until one fails; return the worst exit code and what was run."""
    worst = 0
    done: dict[str, StageRun] = {}
    for name in stages:
        told = progress(name) if progress is not None else None
        done[name] = run_stage(work, name, resume=resume, progress=told)
        worst = max(worst, done[name].record.exit_code)
        if done[name].record.exit_code >= 2:
            _log.error("%s failed; the stages after it are not run", name)
            break
    return worst, done


def _require(work: Workspace, earlier: str, name: str) -> None:
    record = read_record(work, earlier)
    if record is None:
        raise ConfigError(
            f"{name} needs {earlier}: run `layerscope pathways {earlier}` first, or "
            "`layerscope pathways run` for all"
        )
    if record.exit_code >= 2:
        first = next((note for note in record.notes if note.startswith("error")), None)
        why = first or next(iter(record.notes), "see its output")
        raise ConfigError(f"{name} is not run because {earlier} failed: {why}")


def _note_run(work: Workspace, name: str, done: Mapping[str, Any]) -> None:
    """Add a stage to ``run.json``; a skipped stage keeps the figures of when it was done."""
    path = work.path(RUN)
    stages: dict[str, Any] = {}
    if path.exists():
        try:
            stages = dict(read_json(path).get("stages", {}))
        except LayerscopeError:
            _log.warning("%s was damaged and is written anew", path)
    stages[name] = {**stages.get(name, {}), **done} if done["skipped"] else dict(done)
    content = {
        "schema_version": RUN_SCHEMA,
        "config": work.config.to_dict(),
        "seed": work.config.seed,
        "identities": work.identities,
        "space": _space(work),
        "allow_mismatch": work.config.allow_mismatch,
        "source_compat": work.config.source_compat,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "git_commit": provenance.git_commit(),
        "stages": {each: stages[each] for each in NAMES if each in stages},
        "seconds": round(sum(stage.get("seconds", 0.0) for stage in stages.values()), 3),
    }
    write_json(path, content)


def _space(work: Workspace) -> str | None:
    try:
        return work.every_dictionary.space.name
    except LayerscopeError:
        return None
