"""What an ablation run comes to: the largest effects beside random disturbances, and sets."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from layerscope.experiments.ablation.cells import NODE_KEYS, NodeKey, SetKey
from layerscope.experiments.ablation.config import AblationConfig
from layerscope.experiments.patching.questions import QuestionSet
from layerscope.experiments.patching.summary import TOP
from layerscope.experiments.patching.twice import verified
from layerscope.interventions.patching import Cost

FEW = 8
"""Reference prompts below which a mean says little."""
BACKUP = 2.0
"""Effect of a set over the sum of its members' own from which they are said to stand in for one
another."""


def grouped(cells: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over prompts of every node's effect, in the order of the sweep.

    ``size`` is the mean of the effect's absolute value.
    """
    return cells.group_by([*NODE_KEYS, "layer"], maintain_order=True).agg(
        pl.col("effect").mean().alias("mean_effect"),
        pl.col("effect").std().alias("std_effect"),
        pl.col("effect").abs().mean().alias("size"),
        pl.col("value").mean().alias("mean_value"),
        pl.col("effect").count().alias("prompts"),
        pl.col("token").first().alias("token"),
    )


def ranked(cells: pl.DataFrame) -> pl.DataFrame:
    """Return `grouped`, largest mean effect first, either way."""
    size = pl.col("mean_effect").abs()
    return grouped(cells).sort(size, descending=True, nulls_last=True, maintain_order=True)


def chosen_nodes(cells: pl.DataFrame, metric: str) -> list[NodeKey]:
    """Return the strongest nodes of all kinds and ways, which are compared with disturbances."""
    means = ranked(cells.filter(pl.col("metric") == metric)).head(TOP)
    return list(means.select(NODE_KEYS).rows())  # type: ignore[arg-type]


def chosen_sets(cells: pl.DataFrame, metric: str, config: AblationConfig) -> list[SetKey]:
    """Return for each kind and way the top sets, and as many random others of its nodes."""
    found: list[SetKey] = []
    means = ranked(cells.filter(pl.col("metric") == metric))
    for kind in config.sites:
        for how in config.how:
            part = means.filter(kind=kind, how=how).select(NODE_KEYS)
            nodes: list[NodeKey] = list(part.rows())  # type: ignore[assignment]
            for size in config.sets:
                if 2 * size > len(nodes):
                    continue
                found.append((kind, how, "top", 0, tuple(nodes[:size])))
                draw = random.Random(f"{config.seed} {kind} {how} {size}")
                others = sorted(nodes[size:], key=str)
                found += [
                    (kind, how, "random", at, tuple(draw.sample(others, size)))
                    for at in range(config.draws)
                ]
    return found


def summarise(
    tables: Mapping[str, pl.DataFrame],
    metric: str,
    chosen: QuestionSet,
    cost: Cost,
    checks: Sequence[Mapping[str, Any]],
    config: AblationConfig,
    n_reference: int,
) -> dict[str, Any]:
    """Return the summary as JSON values."""
    cells = tables["cells"].filter(pl.col("metric") == metric)
    beside = (
        tables["control"]
        .group_by(NODE_KEYS, maintain_order=True)
        .agg(
            pl.col("effect").mean().alias("control_effect"),
            pl.col("effect").abs().mean().alias("control_size"),
        )
    )
    top = (
        ranked(cells)
        .head(TOP)
        .join(beside, on=NODE_KEYS, how="left", maintain_order="left", nulls_equal=True)
    )
    sets = _sets(tables["sets"], cells, config)
    base = cells.group_by("prompt").agg(pl.col("base").first())["base"].mean()
    return {
        "metric": metric,
        "base": base,
        "prompts": chosen.counts(),
        "top": top.to_dicts(),
        "sets": sets,
        "verified": verified(checks),
        "cautions": _cautions(top, sets, config, n_reference),
        "cost": cost.to_dict(),
    }


def _sets(sets: pl.DataFrame, cells: pl.DataFrame, config: AblationConfig) -> list[dict[str, Any]]:
    """Return for each set the mean effect, that of random sets, and its members' effects added."""
    means = ranked(cells)
    rows: list[dict[str, Any]] = []
    for key, part in sets.group_by(["kind", "how", "size"], maintain_order=True):
        kind, how, size = key
        members = means.filter(kind=kind, how=how).head(int(str(size)))
        random_effects = part.filter(set="random").group_by("draw", maintain_order=True)
        drawn = random_effects.agg(pl.col("effect").mean())["effect"]
        rows.append(
            {
                "kind": kind,
                "how": how,
                "size": size,
                "effect": part.filter(set="top")["effect"].mean(),
                "sum_of_members": members["mean_effect"].sum(),
                "random": drawn.mean(),
                "largest_random": drawn.abs().max(),
            }
        )
    return rows


def _cautions(
    top: pl.DataFrame,
    sets: Sequence[Mapping[str, Any]],
    config: AblationConfig,
    n_reference: int,
) -> list[str]:
    found: list[str] = []
    like = top.filter((pl.col("control_size") >= pl.col("size")) & (pl.col("size") > 0))
    if like.height:
        names = ", ".join(
            site if unit is None else f"{site}[{unit}]"
            for site, unit in like.select("site", "unit").head(3).iter_rows()
        )
        found.append(
            f"a random change of the same size moves {like.height} of the {top.height} strongest "
            f"as far as the ablation ({names}): what counts there is the disturbance"
        )
    backed = [
        row
        for row in sets
        if row["effect"] is not None
        and abs(row["sum_of_members"]) > 0
        and row["effect"] / row["sum_of_members"] >= BACKUP
    ]
    if backed:
        row = backed[-1]
        found.append(
            f"the top {row['size']} {row['kind']} together move {row['effect']:.3g}, one by one "
            f"only {row['sum_of_members']:.3g} in all: they stand in for one another"
        )
    thin = [how for how in config.how if how in ("mean", "position_mean", "noise")]
    if thin and n_reference < FEW:
        found.append(
            f"{thin[0]} comes from {n_reference} reference prompts, which say little of what is "
            f"usual; give {FEW} or more"
        )
    if "zero" in config.how:
        found.append(
            "zero is far from what a model ever computes; its effects mix what is lost with the "
            "shock: compare with mean or resample"
        )
    return found
