"""Carry out a heads run: scores on repeated random tokens, then the proof by ablation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from layerscope.errors import ConfigError
from layerscope.experiments import provenance
from layerscope.experiments.attribution.prepare import within
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
from layerscope.interventions.heads import (
    Ablation,
    Repeated,
    ablate_heads,
    head_scores,
    repeated_tokens,
)
from layerscope.interventions.heads.ablation import Kind
from layerscope.interventions.heads.scores import KINDS
from layerscope.models import LanguageModel

NAME = "heads"
FEW = 0.2
"""Accuracy in the second half below which a model does not copy, and has nothing to lose."""
ABLATION_SCHEMA = {
    "what": pl.String,
    "draw": pl.Int64,
    "logprob": pl.Float64,
    "accuracy": pl.Float64,
}


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Settings of a run.

    Attributes:
        sequences: rows of repeated random tokens. length: tokens before they repeat; None takes 25,
            or what fits the context.
        threshold: induction score from which a head is taken as an induction head.
        kind: "mean" or "zero" ablation.
        controls: draws of as many random heads.
        seed: of tokens and draws.
    """

    sequences: int = 8
    length: int | None = None
    threshold: float = 0.3
    kind: Kind = "mean"
    controls: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(
                f"threshold is a mean weight above 0, at most 1; got {self.threshold}"
            )
        if self.kind not in ("mean", "zero"):
            raise ConfigError(f"ablation is {self.kind!r}; use 'zero' or 'mean'")
        if self.sequences < 1 or self.controls < 1:
            raise ConfigError("sequences and controls must be 1 or more")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that is ready to start: the sequences are drawn, nothing is computed."""

    model: LanguageModel
    config: HeadsConfig
    repeated: Repeated


def heads(
    model: LanguageModel,
    config: HeadsConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Score every head of a model, and ablate the induction heads beside random ones.

    Returns:
        tables ``heads`` (one row per head) and ``ablation`` (whole, without, and every control).

    Raises:
        ConfigError: context or vocabulary are too small.
        CapabilityError: the model does not show its attention patterns.
    """
    return execute(plan(model, config), units=units, progress=progress)


def plan(model: LanguageModel, config: HeadsConfig | None = None) -> Plan:
    """Draw the sequences; raises what `heads` raises."""
    config = config or HeadsConfig()
    length = config.length
    if length is None:
        room = 25 if model.n_ctx is None else (model.n_ctx - 2) // 2
        length = max(2, min(25, room))
    repeated = repeated_tokens(model, n_sequences=config.sequences, length=length, seed=config.seed)
    return Plan(model, config, repeated)


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan: one work unit for the scores, one for the ablation."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = {
        "model": model.provenance(),
        "versions": provenance.versions(),
        "config": config.to_dict(),
    }

    def unit(name: str, do: Any, number: int, content: Any = None) -> Piece:
        tell = within(progress, done=number, total=2)
        works = [Work(work_key(NAME, identity, name, content), do)]
        (piece,) = run_units(works, units=units, progress=tell)
        watch.lap(name)
        return piece

    scored = unit("scores", lambda: _scores(planned), 0)
    table = scored.rows
    above = table.filter(pl.col("induction") >= config.threshold)
    found = [
        (layer, head)
        for layer, head in above.sort("induction", descending=True).select("layer", "head").rows()
    ]
    tables = {"heads": table}
    if 0 < 2 * len(found) <= table.height:
        ablated = unit("ablation", lambda: _ablation(planned, found), 1, found)
        tables["ablation"] = ablated.rows
    summary = _summary(planned, table, found, tables.get("ablation"), scored.payload)
    return Outcome(tables, summary, describe_run(NAME, model, config.to_dict(), watch))


def _scores(planned: Plan) -> Piece:
    scores = head_scores(planned.model, planned.repeated)
    uniform = {kind: float(value) for kind, value in scores.uniform.items()}
    return Piece(scores.table(), {"uniform": uniform, "notes": list(scores.notes)})


def _ablation(planned: Plan, found: Sequence[tuple[int, int]]) -> Piece:
    config = planned.config
    result = ablate_heads(
        planned.model,
        planned.repeated,
        found,
        kind=config.kind,
        n_controls=config.controls,
        seed=config.seed,
    )
    rows = [("whole", None, *result.whole), ("without", None, *result.without)]
    rows += [("random", draw, *values) for draw, values in enumerate(result.controls)]
    return Piece(pl.DataFrame(rows, schema=ABLATION_SCHEMA, orient="row"))


def ablation_of(table: pl.DataFrame, found: Sequence[tuple[int, int]]) -> Ablation:
    """Return the ablation that a table holds."""

    def values(what: str) -> list[tuple[float, float]]:
        return list(table.filter(what=what).select("logprob", "accuracy").iter_rows())

    whole, without = values("whole")[0], values("without")[0]
    return Ablation(tuple(found), whole, without, tuple(values("random")))


def _summary(
    planned: Plan,
    table: pl.DataFrame,
    found: Sequence[tuple[int, int]],
    ablation: pl.DataFrame | None,
    payload: dict[str, Any],
) -> dict[str, Any]:
    kinds = [kind for kind in (*KINDS, "copying") if kind in table.columns]
    summary: dict[str, Any] = {
        "induction_heads": [f"{layer}.{head}" for layer, head in found],
        "threshold": planned.config.threshold,
        "sequences": len(planned.repeated.batch),
        "length": planned.repeated.length,
        "uniform": payload["uniform"],
        "top": {kind: _top(table, kind) for kind in kinds},
        "warnings": list(payload["notes"]),
    }
    if ablation is None:
        reason = (
            f"no head reaches an induction score of {planned.config.threshold:g}"
            if not found
            else f"{len(found)} of {table.height} heads reach the threshold, too many to compare "
            "with random others"
        )
        summary["ablation"] = {"status": "skipped", "reason": reason}
        return summary
    result = ablation_of(ablation, found)
    summary["ablation"] = {
        "kind": planned.config.kind,
        "accuracy": result.whole[1],
        "accuracy_without": result.without[1],
        "drop": result.drop,
        "random_drops": list(result.control_drops),
        "ratio": result.ratio,
        "worst_ratio": result.worst_ratio,
    }
    if result.whole[1] < FEW:
        summary["warnings"].append(
            f"the model continues only {result.whole[1]:.0%} of repeated random tokens: its heads "
            "have little copying to do"
        )
    if result.ratio is not None and result.ratio < 2:
        summary["warnings"].append(
            f"without these heads copying falls only {result.ratio:.1f} times as much as without "
            "random ones: their patterns are not what does the copying"
        )
    return summary


def _top(table: pl.DataFrame, kind: str, limit: int = 5) -> list[dict[str, Any]]:
    known = table.filter(pl.col(kind).is_not_null())
    rows = known.sort(kind, descending=True, maintain_order=True).head(limit)
    return [
        {"head": f"{layer}.{head}", "score": score}
        for layer, head, score in rows.select("layer", "head", kind).iter_rows()
    ]
