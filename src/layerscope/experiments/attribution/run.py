"""Carry out an attribution run: predict, verify, then circuits, a few pairs at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import polars as pl
import torch

from layerscope.experiments import provenance
from layerscope.experiments.attribution.config import AttributionConfig
from layerscope.experiments.attribution.prepare import PairPlan, plan_pairs, within
from layerscope.experiments.attribution.summary import CURVE_SCHEMA, curves, summarise
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
from layerscope.interventions.attribution import (
    Contrast,
    EdgeScores,
    Node,
    NodeScores,
    atp_star,
    attribution_patching,
    edge_attribution,
    exact_effects,
    integrated_gradients,
    joint_effect,
    resolve_sites,
)
from layerscope.interventions.attribution.edges import reaches, receivers
from layerscope.interventions.attribution.verify import Verified, blind_reason, judge, pick
from layerscope.interventions.circuits import FRACTIONS, circuit_metric, keep_edges
from layerscope.interventions.circuits.graph import Ranking, edge_mask
from layerscope.interventions.patching.pairs import PromptPair, TokenPair
from layerscope.interventions.stream import writers
from layerscope.models import LanguageModel

NAME = "attribution"
RANKINGS: tuple[Ranking, ...] = ("signed", "magnitude")


Plan = PairPlan[AttributionConfig]
"""A run that is ready to start."""


def attribution(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    config: AttributionConfig | None = None,
    *,
    units: UnitStore | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Attribute an effect to nodes and edges, verify the strongest, and run circuits.

    Returns:
        tables ``nodes`` (mean score of every node), ``scores`` (by pair), ``verified`` (predicted
        and exact), ``pairs``, and with edges ``edges``, ``circuit`` and ``curves``.

    Raises:
        PromptError, ConfigError, SiteError, CapabilityError: the request, before it is carried out.
    """
    return execute(plan(model, pairs, config), units=units, progress=progress)


def plan(
    model: LanguageModel, pairs: Sequence[PromptPair], config: AttributionConfig | None = None
) -> Plan:
    """Check sites and pairs; raises what `attribution` raises."""
    return plan_pairs(model, pairs, config or AttributionConfig())


def execute(
    planned: Plan, *, units: UnitStore | None = None, progress: Progress | None = None
) -> Outcome:
    """Carry out a plan; a work unit is one stage of a few pairs."""
    watch = provenance.Stopwatch()
    config, model = planned.config, planned.model
    chunks = planned.chunks()
    stages = 3 + config.edges
    identity = planned.identity()

    def stage(name: str, number: int, do: Callable[[int], Piece], content: Any = None) -> Any:
        works = [
            Work(work_key(NAME, identity, name, at, content), partial(do, at), len(chunk))
            for at, chunk in enumerate(chunks)
        ]
        size = len(planned.prepared.pairs)
        tell = within(progress, done=number * size, total=stages * size)
        pieces = run_units(works, units=units, progress=tell)
        watch.lap(name)
        return pl.concat([piece.rows for piece in pieces]), pieces

    run = _Run(planned, chunks)
    scores, _ = stage("nodes", 0, run.nodes)
    strongest, sampled, n_others = pick(
        run.ranked(scores), top=config.verify, sample=config.sample, seed=config.seed
    )
    names = [str(node) for node in (*strongest, *sampled)]
    exact, _ = stage("verify", 1, partial(run.exact, strongest, sampled), names)
    tables = {"nodes": run.node_table(scores), "scores": scores}
    notes: dict[str, Any] = {"pairs": _pair_notes(planned), "left_out": planned.prepared.notes()}
    verification = _judged(planned, scores, exact, strongest, n_others)
    tables["verified"] = verification.table()
    edge_scores: EdgeScores | None = None
    if config.edges:
        rows, pieces = stage("edges", 2, run.edges)
        edge_scores = run.edge_scores(rows)
        tables["edges"] = edge_scores.table().drop("score_sd")
        remainders = [piece.payload["remainder"] for piece in pieces]
        notes["edge_remainder"] = max(remainders)
        metric, _ = stage("circuits", 3, partial(run.circuits, edge_scores))
        tables["curves"] = curves(metric, planned.prepared.contrast())
    tables["pairs"] = planned.prepared.table
    summary = summarise(verification, tables, edge_scores, config, notes)
    used = planned.prepared.pairs
    read = [ids for pair in used for ids in (pair.clean, pair.corrupt)]
    account = describe_run(NAME, model, config.to_dict(), watch, read=read, pairs=len(used))
    return Outcome(tables, summary, account)


def _pair_notes(planned: Plan) -> dict[str, Any]:
    prepared = planned.prepared
    base, donor = planned.ends()
    return {
        "given": len(planned.given),
        "used": len(prepared.pairs),
        "left_out": prepared.left_out,
        "base_metric": base,
        "donor_metric": donor,
    }


def _judged(
    planned: Plan,
    scores: pl.DataFrame,
    exact: pl.DataFrame,
    strongest: Sequence[Node],
    n_others: int,
) -> Any:
    predicted = dict(scores.group_by("node").agg(pl.col("score").mean()).iter_rows())
    effects = dict(exact.group_by("node").agg(pl.col("exact").mean()).iter_rows())
    top = {str(node) for node in strongest}
    nodes = [
        Verified(name, predicted[name], effects[name], name in top)  # type: ignore[arg-type]
        for name in exact["node"].unique(maintain_order=True)
        if name is not None
    ]
    joint = exact.filter(pl.col("node").is_null())["exact"]
    contrast = planned.prepared.contrast()
    return judge(
        planned.config.method,
        nodes,
        float(contrast.total.double().mean()),
        float(joint.mean()) if len(joint) else None,  # type: ignore[arg-type]
        n_others=n_others,
        unsigned=planned.config.method == "atp-star",
        reason=lambda: blind_reason(contrast),
    )


class _Run:
    """The stages of a run, one chunk of pairs each."""

    def __init__(self, planned: Plan, chunks: Sequence[tuple[TokenPair, ...]]) -> None:
        self._planned, self._chunks = planned, chunks
        self._config = planned.config

    def _contrast(self, at: int) -> Contrast:
        return self._planned.prepared.contrast(self._chunks[at])

    def nodes(self, at: int) -> Piece:
        """Score every node for some pairs."""
        scores = self._scores(self._contrast(at))
        keys = [pair.pair.key for pair in self._chunks[at]]
        frames: list[pl.DataFrame] = []
        for node in self._nodes(scores):
            error = scores.error_of(node)
            frames.append(
                pl.DataFrame(
                    {
                        "pair": keys,
                        "node": [str(node)] * len(keys),
                        "score": scores.of(node).double().tolist(),
                        "error": [None] * len(keys) if error is None else error.double().tolist(),
                    },
                    schema=SCORE_SCHEMA,
                )
            )
        return Piece(pl.concat(frames))

    def _scores(self, contrast: Contrast) -> NodeScores:
        config = self._config
        sites = list(config.sites)
        if config.method == "atp":
            return attribution_patching(contrast, sites)
        if config.method == "atp-star":
            return atp_star(contrast, sites)
        return integrated_gradients(
            contrast,
            sites,
            path="inputs" if config.method == "ig" else "activations",
            rule=config.rule,
            steps=config.steps,
        )

    def _nodes(self, scores: NodeScores) -> list[Node]:
        """Return all nodes; positions up to the longest prompt of all chunks."""
        if not self._config.positions:
            return scores.nodes()
        longest = self._planned.prepared.longest
        return [
            Node(node.site, node.unit, position)
            for node in scores.nodes()
            for position in range(longest)
        ]

    def _all_nodes(self) -> dict[str, Node]:
        model = self._planned.model
        found: list[Node] = []
        for site in resolve_sites(model, list(self._config.sites)):
            shape = model.backend.trailing(site, 1)
            units = range(shape[0]) if len(shape) == 2 or site.kind == "mlp.post" else [None]
            places = range(self._planned.prepared.longest) if self._config.positions else [None]
            found += [Node(site, unit, place) for unit in units for place in places]
        return {str(node): node for node in found}

    def ranked(self, scores: pl.DataFrame) -> list[Node]:
        """Return nodes by falling size of their mean score."""
        known = self._all_nodes()
        means = scores.group_by("node", maintain_order=True).agg(pl.col("score").mean().abs())
        order = means.sort("score", descending=True, maintain_order=True)["node"]
        return [known[name] for name in order]

    def node_table(self, scores: pl.DataFrame) -> pl.DataFrame:
        """Return one row per node, its mean over the pairs."""
        known = self._all_nodes()
        means = scores.group_by("node", maintain_order=True).agg(
            pl.col("score").mean(),
            pl.col("score").std(ddof=0).alias("score_sd"),
            pl.col("error").mean(),
        )
        nodes = [known[name] for name in means["node"]]
        return means.with_columns(
            pl.Series("kind", [node.site.kind for node in nodes]),
            pl.Series("layer", [node.site.layer for node in nodes], dtype=pl.Int64),
            pl.Series("unit", [node.unit for node in nodes], dtype=pl.Int64),
            pl.Series("position", [node.position for node in nodes], dtype=pl.Int64),
        )

    def exact(self, strongest: Sequence[Node], sampled: Sequence[Node], at: int) -> Piece:
        """Patch the chosen nodes for some pairs, and the strongest of them together."""
        contrast = self._contrast(at)
        keys = [pair.pair.key for pair in self._chunks[at]]
        effects: dict[str | None, Any] = {
            str(node): effect
            for node, effect in exact_effects(contrast, [*strongest, *sampled]).items()
        }
        if strongest:
            effects[None] = joint_effect(contrast, strongest)
        frames = [
            pl.DataFrame(
                {"pair": keys, "node": [name] * len(keys), "exact": effect.double().tolist()},
                schema={"pair": pl.String, "node": pl.String, "exact": pl.Float64},
            )
            for name, effect in effects.items()
        ]
        return Piece(pl.concat(frames))

    def edges(self, at: int) -> Piece:
        """Sum the scores of every edge over some pairs."""
        config = self._config
        scores = edge_attribution(
            self._contrast(at), rule=config.edge_rule, steps=config.steps, qk=config.qk
        )
        sums = scores.values.double().sum(-1)[scores.exists]
        edges = scores.edges()
        rows = {
            "writer": [str(writer) for writer, _ in edges],
            "receiver": [str(receiver) for _, receiver in edges],
            "sum": sums.tolist(),
            "pairs": [len(self._chunks[at])] * len(edges),
        }
        assert scores.remainder is not None
        return Piece(pl.DataFrame(rows), {"remainder": float(scores.remainder.abs().max())})

    def edge_scores(self, rows: pl.DataFrame) -> EdgeScores:
        """Return the mean scores of all edges as one row."""
        model = self._planned.model
        sources, targets = writers(model), receivers(model)
        exists = torch.tensor([[reaches(model, u, v) for v in targets] for u in sources])
        means = rows.group_by("writer", "receiver", maintain_order=True).agg(
            (pl.col("sum").sum() / pl.col("pairs").sum()).alias("mean")
        )
        at = {str(writer): index for index, writer in enumerate(sources)}
        to = {str(receiver): index for index, receiver in enumerate(targets)}
        values = torch.zeros(*exists.shape, 1, dtype=torch.float64)
        for writer, receiver, mean in means.iter_rows():
            values[at[writer], to[receiver], 0] = mean
        contrast = self._planned.prepared.contrast()
        return EdgeScores("edges", contrast, sources, targets, values, exists)

    def circuits(self, scores: EdgeScores, at: int) -> Piece:
        """Run circuits of growing size for some pairs."""
        contrast = self._contrast(at)
        keys = [pair.pair.key for pair in self._chunks[at]]
        whole = keep_edges(scores, 0).n_all
        frames: list[pl.DataFrame] = []
        for ranking in RANKINGS:
            for fraction in FRACTIONS:
                count = round(fraction * whole)
                kept = keep_edges(scores, count, ranking=ranking, live=False).edges
                metric = circuit_metric(contrast, edge_mask(scores, kept)).double()
                rows = {
                    "pair": keys,
                    "ranking": [ranking] * len(keys),
                    "fraction": [fraction] * len(keys),
                    "edges": [count] * len(keys),
                    "metric": metric.tolist(),
                }
                frames.append(pl.DataFrame(rows, schema=CURVE_SCHEMA))
        return Piece(pl.concat(frames))


SCORE_SCHEMA = {
    "pair": pl.String,
    "node": pl.String,
    "score": pl.Float64,
    "error": pl.Float64,
}
