"""The causal tracing experiment: facts under noise, and where clean states bring them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from layerscope.errors import ConfigError, LayerscopeError, PromptError
from layerscope.experiments import provenance
from layerscope.experiments.patching.facts import Fact
from layerscope.experiments.patching.gather import finite, speed_of
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
from layerscope.interventions.patching import (
    DEFAULT_BUDGET,
    NO_COST,
    Cell,
    Cost,
    Patch,
    Speed,
    batch_of,
    check_budget,
    cost_of_cells,
    metric_of,
)
from layerscope.interventions.patching.pairs import place_of
from layerscope.interventions.patching.tracing import (
    NOISE_FACTOR,
    RESTORED,
    SEEDS,
    WINDOW,
    Restore,
    Subject,
    embedding_noise,
    trace,
    trace_cells,
)
from layerscope.models import LanguageModel, Site, align_answer
from layerscope.models.vocabulary import decode_tokens
from layerscope.products import Products

# Where a token stands: the rows of the averaged grids.
ROLES = (
    "before",
    "first subject",
    "middle subject",
    "last subject",
    "first after",
    "further",
    "last token",
)
TRACE_SCHEMA = {
    "fact": pl.String,
    "restore": pl.String,
    "layer": pl.Int64,
    "position": pl.Int64,
    "token": pl.String,
    "role": pl.String,
    "clean": pl.Float64,
    "noisy": pl.Float64,
    "restored": pl.Float64,
    "indirect": pl.Float64,
    "deviation": pl.Float64,
}


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Settings of a tracing run.

    Attributes:
        restore: kinds of grids: single block "state"s, windows of "mlp" or "attn" outputs.
        window: layers of a window.
        noise: standard deviation of the noise; None takes `factor` times that of the embeddings of
            all subjects' tokens of the set.
        seeds: noisy rows per fact.
        metric: "prob", "logit", "logprob", ... of the answer's first token.
        keep_wrong: also trace facts that the model does not answer.
        max_seconds, max_bytes: refuse a run that is predicted to take more.
    """

    restore: tuple[Restore, ...] = ("state", "mlp", "attn")
    window: int = WINDOW
    noise: float | None = None
    factor: float = NOISE_FACTOR
    seeds: int = SEEDS
    seed: int = 0
    metric: str = "prob"
    keep_wrong: bool = False
    products: Products = "default"
    budget_bytes: int = DEFAULT_BUDGET
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        metric = metric_of(self.metric)
        if metric.foils:
            raise ConfigError(f"tracing has no foils for '{self.metric}'; use prob, logit, logprob")
        if not self.restore or self.seeds < 1:
            raise ConfigError("a trace needs a kind of state to restore, and at least one seed")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class TracePlan:
    """A run that is ready: subjects found, answers checked, noise and cost known.

    Attributes:
        facts: those that take part, with their tokens. left_out: the others' reasons, by key.
    """

    model: LanguageModel
    config: TraceConfig
    given: tuple[Fact, ...]
    facts: tuple[tuple[Fact, Subject], ...]
    left_out: Mapping[str, str]
    noise: float
    cost: Cost
    speed: Speed | None

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of all grids."""
        return None if self.speed is None else self.speed.seconds(self.cost, self.model.n_layers)

    def describe(self) -> str:
        """Return the plan in one line."""
        cost = self.cost
        saved = cost.naive_block_tokens / max(cost.block_tokens, 1)
        time = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        return (
            f"{len(self.facts)} of {len(self.given)} facts, {cost.cells} runs in {cost.passes} "
            f"passes{time} and {cost.bytes / 2**20:.0f} MiB; {saved:.1f} times less computed than "
            f"with one full pass each; noise {self.noise:.3g}"
        )


def plan_trace(
    model: LanguageModel,
    facts: Sequence[Fact],
    config: TraceConfig | None = None,
    *,
    timed: bool = True,
) -> TracePlan:
    """Find subjects, see which facts the model knows, and predict the cost.

    Args:
        timed: measure this machine for the prediction (a few short passes).

    Raises:
        PromptError: no fact can be traced; says why the first cannot.
    """
    config = config or TraceConfig()
    found: list[tuple[Fact, Subject]] = []
    left_out: dict[str, str] = {}
    for fact in facts:
        try:
            subject = subject_of(model, fact)
        except LayerscopeError as error:
            left_out[fact.key] = str(error)
            continue
        if not config.keep_wrong:
            top = model.run(batch_of([subject.ids]), logits="last").logits
            assert top is not None
            best = int(top[0, -1].argmax())
            if best != subject.answer:
                text = model.decode_token(best)
                left_out[fact.key] = f"the model answers {text!r}, not {fact.answer!r}"
                continue
        found.append((fact, subject))
    if not found:
        raise PromptError(
            "no fact can be traced: "
            + next(iter(left_out.values()), "there is none; give at least one")
        )
    noise = config.noise
    if noise is None:
        tokens = [[one.ids[at] for at in one.positions] for _, one in found]
        noise = embedding_noise(model, tokens, factor=config.factor)
    cost = NO_COST
    for _, subject in found:
        for restore in config.restore:
            cost += _cost(model, subject, restore, config)
    speed = speed_of(model, found[0][1].ids, products=config.products) if timed else None
    planned = TracePlan(model, config, tuple(facts), tuple(found), left_out, noise, cost, speed)
    check_budget(
        planned.seconds or 0.0, cost, most_seconds=config.max_seconds, most_bytes=config.max_bytes
    )
    return planned


def subject_of(model: LanguageModel, fact: Fact) -> Subject:
    """Return a fact as tokens.

    Raises:
        PromptError: the subject is not in the prompt. AlignmentError: the answer has no token.
    """
    batch = model.tokenize([fact.prompt])
    positions = place_of(batch, fact.prompt, fact.subject, "subject", fact.key)
    answer = align_answer(model.tokenizer, fact.prompt, fact.answer).first_id
    assert answer is not None
    return Subject(batch.row_ids(0), positions, answer)


def execute_trace(
    planned: TracePlan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan, one work unit per fact and kind of state."""
    watch = provenance.Stopwatch()
    model, config = planned.model, planned.config
    identity = [model.provenance(), provenance.versions()]
    settings = {**config.to_dict(), "max_seconds": None, "max_bytes": None}
    works = [
        Work(
            work_key("trace", settings, restore, planned.noise, fact.to_dict(), *identity),
            _TraceUnit(planned, fact, subject, restore),
            size=len(subject.ids) * model.n_layers,
        )
        for fact, subject in planned.facts
        for restore in config.restore
    ]
    pieces = run_units(works, units=units, progress=progress)
    watch.lap("trace")
    cells = pl.concat([piece.rows for piece in pieces])
    facts = pl.DataFrame(
        [
            {**fact.to_dict(), "used": fact.key not in planned.left_out}
            | {"reason": planned.left_out.get(fact.key, "")}
            for fact in planned.given
        ]
    )
    return Outcome(
        {"cells": cells, "facts": facts},
        _summarise(cells, planned),
        describe_run(
            "trace",
            model,
            config.to_dict(),
            watch,
            read=[subject.ids for _, subject in planned.facts],
            model_name=model.name,
            plan={**planned.cost.to_dict(), "text": planned.describe()},
            noise=planned.noise,
        ),
    )


def roles_of(subject: Subject) -> list[str]:
    """Return where each token of a prompt stands."""
    first, last = subject.positions[0], subject.positions[-1]
    end = len(subject.ids) - 1
    roles: list[str] = []
    for at in range(len(subject.ids)):
        if at < first:
            role = "before"
        elif at == last:
            role = "last subject"
        elif at == first:
            role = "first subject"
        elif at < last:
            role = "middle subject"
        elif at == end:
            role = "last token"
        else:
            role = "first after" if at == last + 1 else "further"
        roles.append(role)
    return roles


@dataclass(frozen=True)
class _TraceUnit:
    planned: TracePlan
    fact: Fact
    subject: Subject
    restore: Restore

    def __call__(self) -> Piece:
        model, config, subject = self.planned.model, self.planned.config, self.subject
        grid = trace_cells(model, len(subject.ids), self.restore, window=config.window)
        found = trace(
            model,
            subject,
            grid,
            noise=self.planned.noise,
            seeds=config.seeds,
            seed=config.seed,
            metric=config.metric,
            products=config.products,
            budget=config.budget_bytes,
        )
        tokens = decode_tokens(model.tokenizer, list(subject.ids))
        roles = roles_of(subject)
        noisy = float(found.noisy.mean())
        rows = [
            {
                "fact": self.fact.key,
                "restore": self.restore,
                "layer": cell.layer,
                "position": cell.position,
                "token": tokens[cell.position],
                "role": roles[cell.position],
                "clean": finite(found.clean),
                "noisy": finite(noisy),
                "restored": finite(float(values.mean())),
                "indirect": finite(float(values.mean()) - noisy),
                "deviation": finite(float(values.std(unbiased=False))),
            }
            for cell, values in zip(found.cells, found.restored, strict=True)
        ]
        return Piece(pl.DataFrame(rows, schema=TRACE_SCHEMA))


def _summarise(cells: pl.DataFrame, planned: TracePlan) -> dict[str, Any]:
    means = cells.group_by(["restore", "role", "layer"]).agg(
        pl.col("indirect").mean().alias("indirect"), pl.col("fact").n_unique().alias("facts")
    )
    best = means.sort(
        ["indirect", "restore", "role", "layer"], descending=[True, False, False, False]
    )
    ends = cells.unique(subset=["fact"], maintain_order=True)
    total = (ends["clean"] - ends["noisy"]).mean()
    return {
        "metric": planned.config.metric,
        "facts": {
            "given": len(planned.given),
            "used": len(planned.facts),
            "left_out": [
                {"fact": key, "reason": reason} for key, reason in planned.left_out.items()
            ],
        },
        "noise": planned.noise,
        "total_effect": total,
        "unmoved": ends.filter((pl.col("clean") - pl.col("noisy")).abs() < 1e-6)["fact"].to_list(),
        "top": best.head(20).to_dicts(),
        "cost": planned.cost.to_dict(),
    }


def _cost(model: LanguageModel, subject: Subject, restore: Restore, config: TraceConfig) -> Cost:
    import torch

    n_columns = len(subject.ids)
    cells: list[Cell] = []
    for cell in trace_cells(model, n_columns, restore, window=config.window):
        if cell.position < subject.positions[0]:
            continue
        patches = tuple(
            Patch(Site(RESTORED[restore], layer), (cell.position,), torch.zeros(1))
            for layer in cell.layers
        )
        cells += [Cell(patches)] * config.seeds
    return cost_of_cells(
        model,
        cells,
        n_columns,
        recorded=n_columns * (config.seeds + 1),
        budget=config.budget_bytes,
        whole=metric_of(config.metric).whole,
    )
