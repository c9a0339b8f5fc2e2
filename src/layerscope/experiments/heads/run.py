"""Carry out a heads run: scores on repeated random tokens, then the proof by ablation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import polars as pl

from layerscope.errors import CapabilityError, ConfigError
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
    direct_scores,
    drops_alone,
    head_scores,
    repeated_tokens,
)
from layerscope.interventions.heads.ablation import KINDS as ABLATIONS
from layerscope.interventions.heads.ablation import Kind
from layerscope.interventions.heads.scores import KINDS
from layerscope.measures.agreement import spearman
from layerscope.models import LanguageModel, Site

NAME = "heads"
MEASURES = ("induction", "direct", "drop_alone")
"""Where a head looks, what it writes itself, and what is lost without it."""
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
        kind: "mean", "zero" or "resample" ablation.
        alone: also ablate every head by itself, and say how far where a head looks, what it writes
            and what is lost without it agree.
        controls: draws of as many random heads.
        seed: of tokens and draws.
    """

    sequences: int = 8
    length: int | None = None
    threshold: float = 0.3
    kind: Kind = "mean"
    alone: bool = True
    controls: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(
                f"threshold is a mean weight above 0, at most 1; got {self.threshold}"
            )
        if self.kind not in ABLATIONS:
            raise ConfigError(f"ablation is {self.kind!r}; use {', '.join(ABLATIONS)}")
        if self.kind == "resample" and self.sequences < 2:
            raise ConfigError("resample takes values of another sequence; use 2 sequences or more")
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
    """Carry out a plan: work units for the scores, each block's heads alone, and the ablation."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = {
        "model": model.provenance(),
        "versions": provenance.versions(),
        "config": config.to_dict(),
    }

    layers = _with_heads(model) if config.alone else []
    total = 2 + len(layers)

    def stage(name: str, do: Sequence[Callable[[], Piece]], number: int, content: Any) -> Any:
        tell = within(progress, done=number, total=total)
        works = [
            Work(work_key(NAME, identity, name, at, content), one) for at, one in enumerate(do)
        ]
        pieces = run_units(works, units=units, progress=tell)
        watch.lap(name)
        return pieces

    (scored,) = stage("scores", [lambda: _scores(planned)], 0, None)
    table = scored.rows
    if layers:
        alone = stage("alone", [partial(_alone, planned, layer) for layer in layers], 1, layers)
        drops = pl.concat([piece.rows for piece in alone])
        table = table.join(drops, on=["layer", "head"], how="left", maintain_order="left")
    above = table.filter(pl.col("induction") >= config.threshold)
    found = [
        (layer, head)
        for layer, head in above.sort("induction", descending=True).select("layer", "head").rows()
    ]
    tables = {"heads": table}
    if 0 < 2 * len(found) <= table.height:
        (ablated,) = stage("ablation", [lambda: _ablation(planned, found)], total - 1, found)
        tables["ablation"] = ablated.rows
    summary = _summary(planned, table, found, tables.get("ablation"), scored.payload)
    account = describe_run(
        NAME, model, config.to_dict(), watch, read=planned.repeated.batch.ids.tolist()
    )
    return Outcome(tables, summary, account)


def _scores(planned: Plan) -> Piece:
    scores = head_scores(planned.model, planned.repeated)
    uniform = {kind: float(value) for kind, value in scores.uniform.items()}
    table, notes = scores.table(), list(scores.notes)
    try:
        direct = direct_scores(planned.model, planned.repeated).flatten()
    except CapabilityError as error:
        notes.append(f"no direct shares: {error}")
    else:
        values = pl.Series("direct", direct.tolist(), dtype=pl.Float64).fill_nan(None)
        table = table.with_columns(values)
    return Piece(table, {"uniform": uniform, "notes": notes})


def _with_heads(model: LanguageModel) -> list[int]:
    """Return the blocks whose heads can be ablated."""
    return [
        layer
        for layer in range(model.n_layers)
        if model.backend.why_not_edit(Site("attn.z", layer)) is None
        and model.backend.why_not(Site("attn.z", layer)) is None
    ]


def _alone(planned: Plan, layer: int) -> Piece:
    drops = drops_alone(planned.model, planned.repeated, layer, kind=planned.config.kind)
    rows = {
        "layer": [layer] * len(drops),
        "head": list(range(len(drops))),
        "drop_alone": drops.tolist(),
    }
    schema = {"layer": pl.Int64, "head": pl.Int64, "drop_alone": pl.Float64}
    return Piece(pl.DataFrame(rows, schema=schema))


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
    kinds = [kind for kind in (*KINDS, "copying", "direct", "drop_alone") if kind in table.columns]
    summary: dict[str, Any] = {
        "induction_heads": [f"{layer}.{head}" for layer, head in found],
        "threshold": planned.config.threshold,
        "sequences": len(planned.repeated.batch),
        "length": planned.repeated.length,
        "uniform": payload["uniform"],
        "top": {kind: _top(table, kind) for kind in kinds},
        "agreement": agreement(table),
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


def agreement(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Return how far the three measures of an induction head agree, pair by pair.

    ``spearman``: rank correlation over all heads that have both. ``shared``: of the top heads of
    one, those that are also top of the other; the top are a fifth of all heads, at most 10.
    """
    measures = [name for name in MEASURES if name in table.columns]
    found: list[dict[str, Any]] = []
    for first, second in combinations(measures, 2):
        both = table.drop_nulls([first, second])
        number = min(10, max(both.height // 5, 1))
        tops = [
            set(
                both.sort(name, descending=True, maintain_order=True)
                .head(number)
                .select("layer", "head")
                .rows()
            )
            for name in (first, second)
        ]
        found.append(
            {
                "first": first,
                "second": second,
                "spearman": spearman(both[first].to_list(), both[second].to_list()),
                "top": number,
                "shared": len(tops[0] & tops[1]),
            }
        )
    return found


def _top(table: pl.DataFrame, kind: str, limit: int = 5) -> list[dict[str, Any]]:
    known = table.filter(pl.col(kind).is_not_null())
    rows = known.sort(kind, descending=True, maintain_order=True).head(limit)
    return [
        {"head": f"{layer}.{head}", "score": score}
        for layer, head, score in rows.select("layer", "head", kind).iter_rows()
    ]
