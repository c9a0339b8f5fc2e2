"""Carry out a function-vector run: means, effects head by head, then the sweep over layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import polars as pl

from layerscope.experiments import provenance
from layerscope.experiments.function_vectors.config import FunctionVectorConfig
from layerscope.experiments.function_vectors.judge import accuracies, in_texts, summarise
from layerscope.experiments.function_vectors.sweep import Sweep
from layerscope.experiments.units import (
    Outcome,
    Piece,
    Progress,
    UnitStore,
    Work,
    describe_run,
    run_units,
    shifted,
    work_key,
)
from layerscope.interventions.function_vectors.effects import (
    Means,
    bootstrap_mean,
    indirect_effects,
    mean_heads,
)
from layerscope.interventions.function_vectors.suffix import LastToken, attention_layers
from layerscope.interventions.function_vectors.tasks import Task, Trial, make_trials
from layerscope.models import LanguageModel, align_answer

NAME = "function_vectors"
HARDLY_HURT = 0.8  # prompts answered at this share of the clean ones still show the task


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: prompts written and checked, nothing computed."""

    model: LanguageModel
    task: Task
    config: FunctionVectorConfig
    training: tuple[Trial, ...]
    validation: tuple[Trial, ...]
    test: tuple[Trial, ...]
    layers: tuple[int, ...]
    texts: dict[str, tuple[Trial, ...]]


def function_vectors(
    model: LanguageModel,
    task: Task,
    config: FunctionVectorConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Find the heads that carry a task, and measure what their vector does.

    Returns:
        tables ``heads`` (average indirect effects with intervals, and the same of means over
        shuffled prompts as control), ``effects`` (by head and prompt), ``sweep`` (accuracies by
        part, setting, kind of vector, number of heads and layer), ``queries`` (every answer) and
        ``vector`` (the one chosen).

    Raises:
        PromptError, ConfigError, AlignmentError: the task does not give the prompts asked for.
        CapabilityError: this model offers no heads.
    """
    return execute(plan(model, task, config), units=units, progress=progress)


def plan(model: LanguageModel, task: Task, config: FunctionVectorConfig | None = None) -> Plan:
    """Split the task and write every prompt; raises what `function_vectors` raises."""
    config = config or FunctionVectorConfig()
    layers = attention_layers(model)
    parts = task.split(validation=config.validation, test=config.test, seed=config.seed)
    draw = partial(make_trials, model, shots=config.shots, layout=config.layout)
    count = max(config.means, config.prompts)
    training = draw(parts.train, parts.train, count=count, seed=config.seed)
    chosen = parts.validation or parts.train
    validation = draw(
        chosen, parts.train, count=min(config.trials, len(chosen)), seed=config.seed + 1
    )
    test = draw(
        parts.test, parts.train, count=min(config.trials, len(parts.test)), seed=config.seed + 2
    )
    texts = {text: _in_text(model, text, test) for text in config.texts}
    every = (*training, *validation, *test, *(trial for some in texts.values() for trial in some))
    model.tokenize([trial.clean for trial in every])  # all fit, or refuse
    return Plan(model, task, config, training, validation, test, layers, texts)


def _in_text(model: LanguageModel, text: str, test: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the test queries as a natural text asks them."""
    found: list[Trial] = []
    for trial in test:
        prompt = text.replace("{input}", trial.query)
        target = align_answer(model.tokenizer, prompt, trial.answer).first_id
        assert target is not None
        found.append(Trial(trial.query, trial.answer, prompt, prompt, prompt, target))
    return tuple(found)


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan; a work unit is one layer of one stage."""
    watch = provenance.Stopwatch()
    run = _Run(planned)
    model, config = planned.model, planned.config
    identity = {
        "model": model.provenance(),
        "versions": provenance.versions(),
        "task": planned.task.to_dict(),
        "config": config.to_dict(),
    }
    total = 2 + len(planned.layers) + model.n_layers + bool(planned.texts)

    def stage(
        name: str, do: Callable[[int], Piece], layers: Sequence[int], done: int
    ) -> list[Piece]:
        works = [Work(work_key(NAME, identity, name, at), partial(do, at)) for at in layers]
        tell = shifted(progress, done, total)
        return run_units(works, units=units, progress=tell)

    (first,) = stage("baselines", lambda _: run.baselines(), (0,), 0)
    baselines = first.payload
    found = stage("effects", partial(run.effects, baselines["corruption"]), planned.layers, 1)
    watch.lap("effects")
    effects = pl.concat([piece.rows for piece in found])
    heads = head_table(effects, config.seed)
    ranking = {
        (layer, head): value for layer, head, value in heads.select("layer", "head", "aie").rows()
    }
    sets = run.sweep.head_sets(ranking)
    begun = 1 + len(planned.layers)
    swept = stage("sweep", lambda at: run.sweep.at_layer(at, sets), range(model.n_layers), begun)
    own = stage("in place", lambda _: run.sweep.in_place(sets), (0,), begun + model.n_layers)
    watch.lap("sweep")
    queries = pl.concat([piece.rows for piece in (first, *swept, *own)])
    sweep = accuracies(queries)
    summary = summarise(sweep, heads, baselines, config, sets)
    if planned.texts:
        size, layer = len(summary["chosen"]["heads"]), summary["chosen"]["layer"]
        of_size = [one for one in sets if len(one.heads) == size]
        (told,) = stage(
            "texts", lambda _: run.sweep.in_texts(planned.texts, of_size, layer), (0,), total - 1
        )
        queries = pl.concat([queries, told.rows])
        sweep = accuracies(queries)
    summary["texts"] = in_texts(sweep)
    vector = run.sweep.vector([(layer, head) for layer, head in summary["chosen"]["heads"]])
    tables = {
        "heads": heads,
        "effects": effects,
        "sweep": sweep,
        "queries": queries,
        "vector": pl.DataFrame({"value": vector.double().cpu().numpy()}),
    }
    account = describe_run(
        NAME,
        model,
        config.to_dict(),
        watch,
        read=_rows_read(planned),
        model_name=model.name,
        task={"name": planned.task.name, "pairs": len(planned.task.pairs)},
    )
    return Outcome(tables, {"task": planned.task.name, **summary}, account)


def _rows_read(planned: Plan) -> list[Sequence[int]]:
    """Return the tokens of every prompt as it was written, with and without examples."""
    trials = [*planned.training, *planned.validation, *planned.test]
    trials += [trial for some in planned.texts.values() for trial in some]
    texts = [text for one in trials for text in (one.clean, one.shuffled, one.zero_shot)]
    return [planned.model.tokenize([text]).row_ids(0) for text in texts]


class _Run:
    """What several units need, computed when the first of them asks."""

    def __init__(self, planned: Plan) -> None:
        self._model, self._config = planned.model, planned.config
        self._shown = planned.training[: self._config.means]
        self._tried = planned.training[: self._config.prompts]
        parts = {"validation": planned.validation, "test": planned.test}
        self.sweep = Sweep(planned.model, planned.config, parts, lambda: self._means.heads)

    def baselines(self) -> Piece:
        """Measure how the prompts are answered, and settle how they are to be corrupted."""
        clean = sum(self._means.answered) / len(self._means.answered)
        shuffled = sum(self._shuffled_means.answered) / len(self._shuffled_means.answered)
        corruption = self._config.corruption
        if corruption == "auto":
            corruption = "zero_shot" if shuffled >= HARDLY_HURT * clean else "shuffled"
        payload = {
            "clean_top1": clean,
            "shuffled_top1": shuffled,
            "corruption": corruption,
            "hardly_hurt": HARDLY_HURT,
        }
        return Piece(self.sweep.untouched().rows, payload)

    def effects(self, corruption: str, layer: int) -> Piece:
        """Measure the effect of every head of a layer in every corrupted prompt."""
        read = self._read(corruption)
        targets = [trial.target for trial in self._tried]
        own = indirect_effects(read, self._means.heads, layer, targets)
        control = indirect_effects(read, self._shuffled_means.heads, layer, targets)
        count = len(own)
        rows = {
            "layer": [layer] * count * len(targets),
            "head": [head for head in range(count) for _ in targets],
            "prompt": list(range(len(targets))) * count,
            "query": [trial.query for trial in self._tried] * count,
            "effect": own.flatten().tolist(),
            "control": control.flatten().tolist(),
        }
        return Piece(pl.DataFrame(rows))

    def _read(self, corruption: str) -> LastToken:
        if corruption not in self._corrupted:
            prompts = [getattr(trial, corruption) for trial in self._tried]
            self._corrupted[corruption] = LastToken(self._model, prompts)
        return self._corrupted[corruption]

    @cached_property
    def _corrupted(self) -> dict[str, LastToken]:
        return {}

    @cached_property
    def _means(self) -> Means:
        targets = [trial.target for trial in self._shown]
        return mean_heads(self._model, [trial.clean for trial in self._shown], targets)

    @cached_property
    def _shuffled_means(self) -> Means:
        targets = [trial.target for trial in self._shown]
        prompts = [trial.shuffled for trial in self._shown]
        return mean_heads(self._model, prompts, targets, only_answered=False)


def head_table(effects: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Return one row per head: its average indirect effect, a 95% interval, and its control."""
    rows: list[dict[str, Any]] = []
    for (layer, head), of_head in effects.group_by(["layer", "head"], maintain_order=True):
        values = of_head["effect"].to_numpy()
        low, high = bootstrap_mean(values, seed=seed)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "aie": float(values.mean()),
                "low": float(low),
                "high": float(high),
                "control": float(of_head["control"].to_numpy().mean()),
            }
        )
    table = pl.DataFrame(rows)
    rank = pl.col("aie").rank("ordinal", descending=True).cast(pl.Int64).alias("rank")
    return table.with_columns(rank)
