"""Selection: largest absolute effects per layer, stable, never padded; pairs over prompts."""

from __future__ import annotations

import itertools
from typing import Any

import polars as pl
import pytest

from layerscope.experiments.pathways.aggregate import over_prompts, settle
from layerscope.experiments.pathways.audit import FEATURES
from layerscope.experiments.pathways.graph import communities, influences
from layerscope.experiments.pathways.select import choose


def table(rows: list[tuple[int, int, float, bool]]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "space": "s",
                "layer": layer,
                "feature_id": feature,
                "feature": f"L{layer}-{feature}",
                "cohen_d": d,
                "is_causal": causal,
            }
            for layer, feature, d, causal in rows
        ],
        schema={name: FEATURES[name] for name in FEATURES},
    )


def test_largest_absolute_effects_with_stable_ties() -> None:
    rows = [
        (2, 9, -3.0, True),
        (2, 4, 1.0, True),
        (2, 7, -1.0, True),
        (2, 1, 9.0, False),
        (2, 3, float("nan"), True),
        (1, 5, 0.1, True),
    ]
    for order in (rows, rows[::-1]):
        chosen, undefined = choose(table(order), top_n=2)
        assert chosen.select("layer", "feature_id", "rank").rows() == [
            (1, 5, 1),
            (2, 9, 1),
            (2, 4, 2),
        ]
        assert undefined == 1


def edge(prompt: str, position: int, attribution: float, **changes: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "space": "s",
        "source_layer": 0,
        "source_id": 1,
        "source_position": position,
        "target_layer": 2,
        "target_id": 5,
        "target_position": 9,
        "attribution": attribution,
        "share": 0.1,
        "predicted": -attribution,
        "actual": -attribution,
        "ratio": 1.0,
        "null_quantile": 0.01,
        "p": 0.001,
        "verdict": "confirmed",
        **changes,
    }


def test_positions_are_merged_and_prompts_summarised() -> None:
    edges = pl.DataFrame(
        [
            edge("a", 3, 1.0),
            edge("a", 4, 0.5),
            edge("b", 3, 2.0),
            edge("c", 2, -0.25),
            edge("a", 3, 1.0, source_id=7),
        ]
    )
    summed, single = over_prompts(edges).rows(named=True)
    assert (summed["attribution"], summed["n_prompts"]) == (1.5, 3)  # of 1.5, 2.0, -0.25
    assert summed["sign_consistency"] == pytest.approx(2 / 3)
    # |1.5 + 2 - 0.25| is reached by 4 of 8 flips: both ways, and with the third turned too.
    assert summed["p"] == pytest.approx(0.5)
    assert (single["single_prompt"], single["p"], summed["single_prompt"]) == (True, None, False)
    largest = over_prompts(edges, dedup="max").row(0, named=True)
    assert largest["attribution"] == 1.0  # of 1.0, 2.0, -0.25


def test_verdicts_see_every_edge_of_the_run() -> None:
    edges = pl.DataFrame(
        [edge("a", n, 1.0, p=0.03, source_id=n) for n in range(3)]
        + [edge("a", 9, 1.0, p=0.9, source_id=9), edge("b", 1, 1.0, p=0.9)]
        + [edge("b", 2, 1.0, p=0.001, ratio=None), edge("b", 3, 1.0, p=0.0001, ratio=3.0)]
        + [edge("b", 4, 1.0, p=0.0001), edge("b", 5, 1.0, p=0.0001, null_quantile=2.0)]
    )
    doses = edges.with_columns(dose=pl.lit(0.0))
    # One edge whose sign differs at another dose.
    turned = edges.filter(pl.col("source_position") == 4).with_columns(
        dose=pl.lit(0.5), actual=pl.lit(5.0)
    )
    found = settle(edges, pl.concat([doses, turned]), fdr=0.05)
    # p = 0.03 is the seventh smallest of nine: q = 0.27 / 7.
    assert found["q"].head(3).to_list() == pytest.approx([0.27 / 7] * 3)
    assert found["verdict"].to_list() == [
        *["confirmed"] * 3,
        *["refuted"] * 2,
        "undetermined",
        "nonlinear",
        "refuted",
        "refuted",
    ]


def test_influence_is_the_sum_over_paths() -> None:
    nodes = [(0, 1), (1, 1), (1, 2), (2, 1)]
    links = [((0, 1), (1, 1), 2.0), ((1, 1), (2, 1), 3.0), ((1, 2), (2, 1), -1.0)]
    links.append(((0, 1), (2, 1), 4.0))
    found = influences(nodes, links)
    # Into (2, 1): 3/8, 1/8, 4/8; (0, 1) is all of (1, 1).
    assert found == pytest.approx({(2, 1): 1.0, (1, 1): 3 / 8, (1, 2): 1 / 8, (0, 1): 7 / 8})


def test_communities_follow_ties() -> None:
    left, right = [(0, 1), (1, 1), (2, 1)], [(0, 9), (1, 9), (2, 9)]
    links = [(a, b, 5.0) for group in (left, right) for a, b in itertools.pairwise(group)]
    found = communities([*left, *right], [*links, ((0, 1), (1, 9), 0.1)])
    assert len({found[node] for node in left}) == len({found[node] for node in right}) == 1
    assert found[left[0]] != found[right[0]]
