"""Carry out a steering run: directions, choice of the layer, dose and response, texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import polars as pl

from layerscope.errors import PromptError, SiteError
from layerscope.experiments import provenance
from layerscope.experiments.steering.config import SteeringConfig
from layerscope.experiments.steering.judge import TEXTS, choose_layer, summarise
from layerscope.experiments.steering.strength import calibration, damage
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
from layerscope.interventions.steering.contrasts import ContrastSet
from layerscope.interventions.steering.dose import (
    Dose,
    Example,
    examples_of,
    fit_response,
    prompted,
    propensities,
    random_directions,
)
from layerscope.interventions.steering.estimators import Estimates, bootstrap_cone, estimate
from layerscope.interventions.steering.states import States, read_states
from layerscope.interventions.steering.texts import BagOfWords, steered_texts
from layerscope.interventions.steering.vector import SteeringVector
from layerscope.models import LanguageModel

NAME = "steering"


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked, nothing computed."""

    model: LanguageModel
    contrasts: ContrastSet
    config: SteeringConfig
    prompts: tuple[str, ...]
    layers: tuple[int, ...]
    train: ContrastSet
    others: tuple[ContrastSet, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    left_out: int


def steering(
    model: LanguageModel,
    contrasts: ContrastSet,
    prompts: Sequence[str] = (),
    config: SteeringConfig | None = None,
    *,
    evaluate: ContrastSet | None = None,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make a steering vector from contrasts and measure what it does, beside its controls.

    Args:
        model: the model.
        contrasts: texts with and without the property.
        prompts: to be continued under every strength; none gives no texts.
        config: settings.
        evaluate: choices after a prompt that the effect is measured on; the contrasts kept for
            validation and test by default.
        units: where finished work is kept.
        progress: called with (units done, units in all).

    Returns:
        tables ``layers`` (directions, agreement of estimators, effect on validation examples),
        ``responses`` (propensity by direction, alpha and test example), ``slopes``, ``texts``,
        ``damage`` (bits per token by which neutral texts change), ``vector``, and ``calibration``
        where a strength was to be found.

    Raises:
        PromptError: there are too few contrasts, or none that is a choice after a prompt.
        SiteError: a layer does not exist.
    """
    planned = plan(model, contrasts, prompts, config, evaluate=evaluate)
    return execute(planned, units=units, progress=progress)


def plan(
    model: LanguageModel,
    contrasts: ContrastSet,
    prompts: Sequence[str] = (),
    config: SteeringConfig | None = None,
    *,
    evaluate: ContrastSet | None = None,
) -> Plan:
    """Split the contrasts and align every continuation; raises what `steering` raises."""
    config = config or SteeringConfig()
    layers = tuple(range(model.n_layers)) if config.layers is None else config.layers
    for layer in layers:
        if not 0 <= layer < model.n_layers:
            raise SiteError(f"there is no layer {layer}; this model has 0 to {model.n_layers - 1}")
    train, *kept = contrasts.split(validation=config.validation, test=config.test, seed=config.seed)
    asked = kept
    if evaluate is not None:
        half = ContrastSet.split(evaluate, validation=0.4, test=0.0, seed=config.seed)
        asked = [half[1], half[0]]
    parts = [examples_of(model, () if part is None else part.contrasts) for part in asked]
    if not all(found for found, _ in parts):
        raise PromptError(
            f"contrast set {contrasts.name!r} leaves no choice after a prompt for validation or "
            "test: give contrasts with a prompt or a common beginning, or such contrasts to "
            "evaluate on"
        )
    for contrast in contrasts.contrasts:
        model.tokenize(list(contrast.texts))
    model.tokenize(list(config.neutral))
    if prompts:
        model.tokenize(list(prompts))
    return Plan(
        model,
        contrasts,
        config,
        tuple(prompts),
        layers,
        train,
        tuple(part for part in kept if part is not None),
        parts[0][0],
        parts[1][0],
        sum(left for _, left in parts),
    )


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan; a work unit is one layer of the sweep, one direction, or one strength."""
    watch = provenance.Stopwatch()
    run = _Run(planned)
    config = planned.config
    identity = {
        "model": planned.model.provenance(),
        "versions": provenance.versions(),
        "contrasts": planned.contrasts.to_dict(),
        "config": config.to_dict(),
        "prompts": list(planned.prompts),
        "examples": [
            [list(one.prompt), list(one.positive), list(one.negative)]
            for one in (*planned.validation, *planned.test)
        ],
    }
    n_texts = len(config.alphas) if planned.prompts else 0
    asked = config.kl_bits is not None
    total = len(planned.layers) + config.random_directions + 4 + n_texts + asked

    def pieces(
        name: str, do: Callable[[Any], Piece], keys: Sequence[Any], done: int
    ) -> list[Piece]:
        works = [Work(work_key(NAME, identity, name, key), partial(do, key)) for key in keys]
        return run_units(works, units=units, progress=shifted(progress, done, total))

    def stage(
        name: str, do: Callable[[Any], Piece], keys: Sequence[Any], done: int
    ) -> pl.DataFrame:
        found = pieces(name, do, keys, done)
        return pl.concat([piece.rows for piece in found]) if found else pl.DataFrame(schema=TEXTS)

    layers = stage("layers", run.layer, planned.layers, 0)
    watch.lap("layers")
    chosen = choose_layer(layers)
    kinds = ["vector", *range(config.random_directions), "prompting"]
    responses = stage("dose", partial(run.dose, chosen), kinds, len(planned.layers))
    watch.lap("dose")
    begun = len(planned.layers) + len(kinds)
    neutral = stage("damage", partial(run.damage, chosen), ("vector", "random"), begun)
    strengths = pieces("calibration", run.calibration, [chosen] if asked else [], begun + 2)
    watch.lap("damage")
    begun += 2 + asked
    alphas = list(config.alphas) if planned.prompts else []
    texts = stage("texts", partial(run.texts, chosen), alphas, begun)
    watch.lap("texts")
    slopes = _slopes(responses)
    vector = run.vector(chosen)
    summary = summarise(
        planned.contrasts.name, layers, chosen, slopes, responses, texts, config,
        left_out=planned.left_out, warnings=run.warnings(chosen), classifier=run.classifier_error,
        neutral=neutral, calibration=strengths[0].payload if strengths else None,
        per_side=len(planned.contrasts), judged=2 * len(planned.train.contrasts),
    )  # fmt: skip
    tables = {
        "layers": layers,
        "responses": responses,
        "slopes": slopes,
        "texts": texts,
        "damage": neutral,
        **({"calibration": strengths[0].rows} if strengths else {}),
        "vector": pl.DataFrame({"value": vector.vector.double().cpu().numpy()}),
    }
    about = {"name": planned.contrasts.name, "contrasts": len(planned.contrasts)}
    texts_read = [
        *(text for one in planned.contrasts.contrasts for text in one.texts),
        *planned.prompts,
        *config.neutral,
    ]
    chosen_from = (*planned.validation, *planned.test)
    read = [
        *(planned.model.tokenize([text]).row_ids(0) for text in texts_read),
        *(ids for one in chosen_from for ids in (one.prompt, one.positive, one.negative)),
    ]
    account = describe_run(
        NAME, planned.model, config.to_dict(), watch,
        read=read, contrasts=about, model_name=planned.model.name,
    )  # fmt: skip
    return Outcome(tables, summary, account)


class _Run:
    """What several units need, computed when the first of them asks."""

    def __init__(self, planned: Plan) -> None:
        self._planned, self._config = planned, planned.config
        self._model = planned.model
        self._estimates: dict[int, Estimates] = {}

    @cached_property
    def _states(self) -> States:
        train, config = self._planned.train, self._config
        layers = self._planned.layers
        return read_states(self._model, train.contrasts, layers, at=config.read_at)

    def _estimate(self, layer: int) -> Estimates:
        if layer not in self._estimates:
            index = self._planned.layers.index(layer)
            self._estimates[layer] = estimate(
                self._states.positive[index],
                self._states.negative[index],
                paired=self._planned.train.paired,
            )
        return self._estimates[layer]

    def vector(self, layer: int) -> SteeringVector:
        """Return the direction of a layer."""
        found = self._estimate(layer).directions
        if self._config.method not in found:
            raise PromptError(
                f"{self._config.method} needs contrasts in pairs, and these are two lists: use "
                "mean_difference or probe"
            )
        index = self._planned.layers.index(layer)
        return SteeringVector(
            f"resid_post.{layer}",
            found[self._config.method],
            float(self._states.norms[index]),
            self._config.method,
        )

    def warnings(self, layer: int) -> tuple[str, ...]:
        """Return what the estimators of a layer disagree on."""
        return self._estimate(layer).warnings

    def layer(self, layer: int) -> Piece:
        """Describe the direction of a layer, and its effect on the validation examples."""
        config, estimates = self._config, self._estimate(layer)
        index = self._planned.layers.index(layer)
        vector = self.vector(layer)
        doses = [Dose(vector, alpha) for alpha in config.alphas]
        values = self._propensities(self._planned.validation, doses)
        fit = fit_response(config.alphas, values).summary(seed=config.seed)
        row = {
            "layer": layer,
            "typical_norm": vector.typical_norm,
            "vector_norm": float(vector.vector.norm()),
            "shared": estimates.shared,
            "split_half": estimates.split_half,
            "cone_degrees": bootstrap_cone(
                self._states.positive[index], self._states.negative[index], seed=config.seed
            ),
            **{
                f"cos_{name}": estimates.cosines.get(name)
                for name in ("pca_centred", "pca_pairwise", "probe")
            },
            "slope": fit["mean_slope"],
            "low": fit["low"],
            "high": fit["high"],
            "anti_steerable": fit["anti_steerable"],
        }
        schema = {name: pl.Int64 if name == "layer" else pl.Float64 for name in row}
        return Piece(pl.DataFrame([row], schema=schema))

    def dose(self, layer: int, kind: str | int) -> Piece:
        """Measure the test examples under one direction at every strength, or after texts."""
        vector = self.vector(layer)
        examples, alphas = self._planned.test, self._config.alphas
        if kind == "prompting":
            shots = self._planned.train.contrasts[: self._config.shots]
            values = np.concatenate(
                [
                    self._propensities(
                        prompted(self._model, examples, shots, side), [Dose(vector, 0.0)]
                    )
                    for side in (1, 0)
                ]
            )
            return _rows("prompting", None, (-1.0, 1.0), examples, values)
        direction = vector
        if isinstance(kind, int):
            count = self._config.random_directions
            direction = random_directions(vector, count, seed=self._config.seed)[kind]
        values = self._propensities(examples, [Dose(direction, alpha) for alpha in alphas])
        name, draw = ("random", kind) if isinstance(kind, int) else ("vector", None)
        return _rows(name, draw, alphas, examples, values)

    def damage(self, layer: int, kind: str) -> Piece:
        """Measure what the vector, or a random direction, changes on neutral texts."""
        direction = self.vector(layer)
        if kind == "random":
            (direction,) = random_directions(direction, 1, seed=self._config.seed)
        return damage(self._model, kind, direction, self._config)

    def calibration(self, layer: int) -> Piece:
        """Find the strength that changes neutral texts as much as was asked for."""
        return calibration(self._model, self.vector(layer), self._config)

    def texts(self, layer: int, alpha: float) -> Piece:
        """Continue the prompts at one strength, under the vector and a random direction."""
        config, vector = self._config, self.vector(layer)
        (other,) = random_directions(vector, 1, seed=config.seed)
        rows: list[dict[str, Any]] = []
        for kind, direction in (("vector", vector), ("random", other)):
            made = steered_texts(
                self._model,
                self._planned.prompts,
                [Dose(direction, alpha)],
                mode=config.mode,
                scope=config.scope,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=config.seed,
            )
            rows += [
                {
                    "kind": kind,
                    "alpha": alpha,
                    "prompt": text.prompt,
                    "text": text.text,
                    "perplexity": text.perplexity,
                    **{f"repeated_{n}": share for n, share in text.repeated.items()},
                    "score": None if self._judge is None else self._judge.score(text.text),
                }
                for text in made
            ]
        return Piece(pl.DataFrame(rows, schema=TEXTS))

    def _propensities(self, examples: Sequence[Example], doses: Sequence[Dose]) -> np.ndarray:
        mode, scope = self._config.mode, self._config.scope
        return propensities(self._model, examples, doses, mode=mode, scope=scope)

    @cached_property
    def _judge(self) -> BagOfWords | None:
        held_out = [each for part in self._planned.others for each in part.contrasts]
        if not held_out:
            return None
        sides = [[each.positive for each in held_out], [each.negative for each in held_out]]
        return BagOfWords(*sides)

    @property
    def classifier_error(self) -> float | None:
        """How often the classifier of texts is wrong on the training contrasts."""
        if self._judge is None:
            return None
        train = self._planned.train.contrasts
        return 1 - self._judge.accuracy([c.positive for c in train], [c.negative for c in train])


def _rows(
    kind: str,
    draw: int | None,
    alphas: Sequence[float],
    examples: Sequence[Example],
    values: np.ndarray,
) -> Piece:
    cells = [(alpha, number) for alpha in alphas for number in range(len(examples))]
    rows = {
        "kind": [kind] * len(cells),
        "draw": pl.Series([draw] * len(cells), dtype=pl.Int64),
        "alpha": [alpha for alpha, _ in cells],
        "example": [number for _, number in cells],
        "prompt": [examples[number].text for _, number in cells],
        "propensity": values.flatten().tolist(),
    }
    return Piece(pl.DataFrame(rows))


def _slopes(responses: pl.DataFrame) -> pl.DataFrame:
    """Return one row per direction and example: its slope and how straight it is."""
    rows: list[dict[str, Any]] = []
    steered = responses.filter(pl.col("kind") != "prompting")
    for (kind, draw), of in steered.group_by(["kind", "draw"], maintain_order=True):
        alphas = of["alpha"].unique(maintain_order=True).to_list()
        fit = fit_response(alphas, of["propensity"].to_numpy().reshape(len(alphas), -1))
        rows += [
            {
                "kind": kind,
                "draw": draw,
                "example": number,
                "slope": float(fit.slopes[number]),
                "residual": float(fit.residuals[number]),
                "rank_correlation": float(fit.rank_correlations[number]),
            }
            for number in range(len(fit.slopes))
        ]
    return pl.DataFrame(rows, schema_overrides={"draw": pl.Int64}, infer_schema_length=None)
