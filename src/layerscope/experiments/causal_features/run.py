"""Carry out a causal-feature run: contrast every feature, patch the strongest, judge them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.experiments import provenance
from layerscope.experiments.causal_features.answering import (
    BASELINES,
    EXPECTED,
    PATCHED,
    RESPONSES,
    Ask,
    answer,
    identical_under_identity,
)
from layerscope.experiments.causal_features.config import FDR, CausalConfig
from layerscope.experiments.causal_features.judge import judge, summarise
from layerscope.experiments.causal_features.statistics import Sums, contrast, q_values
from layerscope.experiments.causal_features.task import SIDES, Game, Task
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
from layerscope.features import DictionarySet, SparseDictionary
from layerscope.models import LanguageModel, Site

NAME = "causal-features"
_CHUNK = 64  # prompts read side by side
_ROWS = 1024  # residuals encoded at a time


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start: everything checked, nothing computed."""

    model: LanguageModel
    dictionaries: DictionarySet
    task: Task
    config: CausalConfig
    layers: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Return what decides the results, ready for JSON; the batch size does not."""
        config = self.config.to_dict()
        del config["batch_rows"]
        return {
            "model": self.model.provenance(),
            "versions": provenance.versions(),
            "dictionaries": [_fingerprint(self.dictionaries[layer]) for layer in self.layers],
            "task": self.task.to_dict(),
            "config": config,
        }


def causal_features(
    model: LanguageModel,
    dictionaries: DictionarySet,
    task: Task,
    config: CausalConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Find the features that differ between two groups of prompts, and those that change decisions.

    Args:
        model: the model.
        dictionaries: autoencoders of its residual stream (or of any site that can be edited).
        task: the two groups.
        config: settings.
        units: where finished work is kept.
        progress: called with (units done, units in all).

    Returns:
        tables ``effects`` (every feature of every layer), ``features`` (those patched, with their
        verdicts), ``conditions`` (rates by feature and condition) and ``responses`` (every answer).

    Raises:
        DictionaryError: a dictionary belongs to another model, or is a transcoder.
        PromptError: a prompt is too long.
        ConfigError: a layer has no dictionary, or no feature differs between the groups.
    """
    planned = plan(model, dictionaries, task, config)
    return execute(planned, units=units, progress=progress)


def plan(
    model: LanguageModel,
    dictionaries: DictionarySet,
    task: Task,
    config: CausalConfig | None = None,
) -> Plan:
    """Check dictionaries and prompts; raises what `causal_features` raises."""
    config = config or CausalConfig()
    layers = dictionaries.layers if config.layers is None else config.layers
    for layer in layers:
        dictionary = dictionaries[layer]
        dictionary.require_model(model)
        if not dictionary.is_autoencoder:
            raise ConfigError(
                f"layer {layer} has a transcoder, whose features cannot be patched where it reads: "
                "give autoencoders"
            )
    _rows_read(model, task)
    return Plan(model, dictionaries, task, config, tuple(layers))


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan; a work unit is one layer's contrast, or a few features' answers."""
    watch = provenance.Stopwatch()
    run, identity, config = _Run(planned), planned.identity, planned.config
    total = len(planned.layers) + 2 + len(planned.layers) * config.top_per_layer
    works = [
        Work(work_key(NAME, identity, "contrast", layer), partial(run.contrast, layer))
        for layer in planned.layers
    ]
    found = run_units(works, units=units, progress=shifted(progress, 0, total))
    effects = _with_q(pl.concat([piece.rows for piece in found]))
    watch.lap("contrast")
    chosen = select(effects, config.top_per_layer)
    if not len(chosen):
        raise ConfigError(
            f"no feature differs between the groups of task '{planned.task.name}' (q below {FDR}): "
            "give more prompts, or groups that differ"
        )
    done = len(planned.layers)
    works = [
        Work(work_key(NAME, identity, "baseline"), run.baseline),
        Work(work_key(NAME, identity, "identity"), partial(run.identity, chosen)),
    ]
    baseline, same = run_units(works, units=units, progress=shifted(progress, done, total))
    watch.lap("baselines")
    others = controls(effects, chosen, config)
    works = [
        Work(
            work_key(NAME, identity, "patched", group.to_dicts()),
            partial(run.patched, group, others),
            len(group),
        )
        for group in _groups(chosen, config)
    ]
    answers = run_units(works, units=units, progress=shifted(progress, done + 2, total))
    watch.lap("patched")
    responses = pl.concat([baseline.rows, *(piece.rows for piece in answers)])
    features, conditions = judge(chosen, responses, config)
    summary = summarise(
        planned.task, effects, features, conditions, responses, config,
        identity=same.payload, layers=planned.layers,
    )  # fmt: skip
    tables = {
        "effects": effects,
        "features": features,
        "conditions": conditions,
        "responses": responses,
    }
    account = describe_run(
        NAME, planned.model, config.to_dict(), watch,
        read=_rows_read(planned.model, planned.task), model_name=planned.model.name,
        space=planned.dictionaries.space.name, task=planned.task.to_dict(),
    )  # fmt: skip
    return Outcome(tables, summary, account)


def select(effects: pl.DataFrame, top: int) -> pl.DataFrame:
    """Return each layer's features of largest |d| among those with q < 0.05; ties by number."""
    return (
        effects.filter(pl.col("q") < FDR, pl.col("cohen_d").is_not_null())
        .sort("layer", pl.col("cohen_d").abs(), "feature_id", descending=[False, True, False])
        .group_by("layer", maintain_order=True)
        .head(top)
        .select("space", "layer", "feature_id", "safe_mean", "risky_mean", "cohen_d", "q")
    )


def controls(
    effects: pl.DataFrame, chosen: pl.DataFrame, config: CausalConfig
) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return for every patched feature random living features of its layer that are not patched."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for (layer,), of in chosen.group_by(["layer"], maintain_order=True):
        taken = set(of["feature_id"].to_list())
        alive = effects.filter(pl.col("layer") == layer, ~pl.col("dead"))["feature_id"].to_list()
        pool = [feature for feature in alive if feature not in taken]
        for feature in of["feature_id"].to_list():
            rng = Random(f"{config.seed}-{layer}-{feature}")
            found[layer, feature] = tuple(rng.sample(pool, min(config.controls, len(pool))))
    return found


def _with_q(effects: pl.DataFrame) -> pl.DataFrame:
    """One correction over all layers and features."""
    return effects.with_columns(q=q_values(effects["p"]))


def _groups(chosen: pl.DataFrame, config: CausalConfig) -> list[pl.DataFrame]:
    """Split the features into units of about a thousand answers."""
    answers = config.trials * (len(PATCHED) + len(EXPECTED) * config.controls)
    size = max(1, 1024 // answers)
    return [chosen[first : first + size] for first in range(0, len(chosen), size)]


class _Run:
    """What several units need, computed when the first of them asks."""

    def __init__(self, planned: Plan) -> None:
        self._planned, self._config = planned, planned.config
        self._model, self._dictionaries = planned.model, planned.dictionaries

    @cached_property
    def _states(self) -> Mapping[str, Mapping[Site, Float[Tensor, "prompt d_model"]]]:
        import torch

        sites = list(dict.fromkeys(self._dictionaries[at].reads for at in self._planned.layers))
        states: dict[str, dict[Site, Tensor]] = {}
        for side in SIDES:
            texts = [game.prompt for game in self._planned.task.contrast[side]]
            parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
            for first in range(0, len(texts), _CHUNK):
                chunk = texts[first : first + _CHUNK]
                result = self._model.run(chunk, capture=sites, positions=-1, logits=None)
                for site in sites:
                    parts[site].append(result[site][:, 0].cpu())
            states[side] = {site: torch.cat(found) for site, found in parts.items()}
        return states

    def contrast(self, layer: int) -> Piece:
        """Compare every feature of a layer between the groups, at the last token of a prompt."""
        dictionary = self._dictionaries[layer].load()
        sums = {side: self._sums(dictionary, side) for side in SIDES}
        dictionary.release()
        n = dictionary.n_features
        rows = contrast(sums["safe"], sums["risky"]).select(
            pl.lit(dictionary.space.name).alias("space"),
            pl.lit(layer, dtype=pl.Int64).alias("layer"),
            pl.Series("feature_id", np.arange(n), dtype=pl.Int64),
            pl.lit(sums["safe"].count, dtype=pl.Int64).alias("n_safe"),
            pl.lit(sums["risky"].count, dtype=pl.Int64).alias("n_risky"),
            pl.all(),
        )
        return Piece(rows)

    def baseline(self) -> Piece:
        """Answer the prompts of both sides without a patch, once."""
        return Piece(self._answer([Ask(condition=condition) for condition in BASELINES]))

    def identity(self, chosen: pl.DataFrame) -> Piece:
        """Answer the prompts under an edit that leaves every patched feature at its own value."""
        ids = {
            int(layer): of["feature_id"].to_list()
            for (layer,), of in chosen.group_by(["layer"], maintain_order=True)
        }
        account = identical_under_identity(
            self._model, self._dictionaries, ids, self._games, self._config
        )
        return Piece(pl.DataFrame({"compared": [account["compared"]]}), account)

    def patched(
        self, group: pl.DataFrame, others: Mapping[tuple[int, int], Sequence[int]]
    ) -> Piece:
        """Answer the prompts under every patch of some features, and under their controls."""
        asks: list[Ask] = []
        for row in group.iter_rows(named=True):
            key = (row["layer"], row["feature_id"])
            means = {side: row[f"{side}_mean"] for side in SIDES}
            for condition, (_, towards) in PATCHED.items():
                written = (key[1], *(others[key] if condition in EXPECTED else ()))
                asks += [Ask(condition, *key, along, means[towards]) for along in written]
        return Piece(self._answer(asks))

    @property
    def _games(self) -> Mapping[str, Sequence[Game]]:
        return self._planned.task.patched

    def _answer(self, asks: Sequence[Ask]) -> pl.DataFrame:
        rows = answer(self._model, self._dictionaries, asks, self._games, self._config)
        return pl.DataFrame(rows, schema=RESPONSES)

    def _sums(self, dictionary: SparseDictionary, side: str) -> Sums:
        import torch

        sums = Sums.empty(dictionary.n_features)
        states = self._states[side][dictionary.reads]
        with torch.no_grad():
            for first in range(0, len(states), _ROWS):
                found = dictionary.encode(states[first : first + _ROWS])
                sums.add(found.double().cpu().numpy())
        return sums


def _rows_read(model: LanguageModel, task: Task) -> list[Sequence[int]]:
    """Return the tokens of every prompt: those that are contrasted, then those that are patched."""
    rows: list[Sequence[int]] = []
    for part in (task.contrast, task.patched):
        for side in SIDES:
            batch = model.tokenize([game.prompt for game in part[side]])
            rows += [batch.row_ids(row) for row in range(len(batch))]
    return rows


def _fingerprint(dictionary: SparseDictionary) -> str:
    """Return a hash of a dictionary's vectors, which differ between any two trained ones."""
    digest = hashlib.sha256(dictionary.convention.encode())
    vectors = {"bias": dictionary.bias, "decoder_bias": dictionary.decoder_bias}
    for name, vector in sorted({**vectors, **dictionary.gate.tensors()}.items()):
        digest.update(name.encode())
        digest.update(vector.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()
