"""Replays: against whole forward passes, identity, causality, and verdicts of known cases."""

from __future__ import annotations

from dataclasses import replace as but

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from test_pathways_discover import FAMILIES, IDS, dictionaries_of, model_of, state_of

from layerscope.errors import ConfigError
from layerscope.features.pathways import (
    DiscoverOptions,
    Measured,
    PromptState,
    ReplayOptions,
    agreement,
    discover,
    judge,
    replay,
)
from layerscope.features.pathways.verdicts import bh, wilson
from layerscope.models import Add


def by_whole_passes(state: PromptState, edges: pl.DataFrame, dose: float) -> list[float]:
    """Each edge by a forward pass of the whole model with one edit."""
    model = state.model
    reads = {(t.target.feature.layer, t.target.feature.feature_id): t.read for t in state.targets}
    found: list[float] = []
    for edge in edges.iter_rows(named=True):
        layer = state.layers[edge["source_layer"]]
        direction = layer.directions[(layer.unique == edge["source_id"]).nonzero()[0, 0]]
        edit = Add(
            f"resid_post.{edge['source_layer']}",
            (dose - 1.0) * edge["source_activation"] * direction,
            positions=edge["source_position"],
        )
        at = f"resid_post.{edge['target_layer']}"
        values = [
            float(model.run(state.batch, capture=at, edits=edits, logits=None)[at][0, place] @ read)
            for edits in ([], [edit])
            for place, read in [
                (edge["target_position"], reads[edge["target_layer"], edge["target_id"]])
            ]
        ]
        found.append(values[1] - values[0])
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_a_replay_equals_whole_passes(family: str, cached: bool) -> None:
    state = state_of(family)
    if not cached:
        state = but(state, cache=None)
    edges = discover(state, DiscoverOptions(top_k=20))
    measured = replay(state, edges, ReplayOptions(doses=(0.0, 2.0), nulls=0))
    table, doses = judge(state, edges, measured, doses=(0.0, 2.0))
    sample = edges.with_row_index().sample(12, seed=1)
    for dose in (0.0, 2.0):
        actual = doses.filter(pl.col("dose") == dose)["actual"].gather(sample["index"])
        expected = torch.tensor(by_whole_passes(state, sample, dose))
        # A tiny Gemma 2 squares its norms in float32 whatever the dtype.
        torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-5, atol=1e-6)
    assert "confirmed" not in table["verdict"]  # nothing is confirmed without a null


@pytest.mark.parametrize("tokens", [1, 16, 10**6])
def test_the_size_of_a_pass_changes_nothing(tokens: int) -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=10))
    expected = replay(state, edges, ReplayOptions(tokens=40))
    found = replay(state, edges, ReplayOptions(tokens=tokens))
    assert found.doses.keys() == expected.doses.keys()
    for key, value in expected.doses.items():
        assert found.doses[key] == pytest.approx(value, rel=1e-6, abs=1e-7)
    assert {k: len(v) for k, v in found.nulls.items()} == {
        k: len(v) for k, v in expected.nulls.items()
    }


def test_the_sources_own_value_changes_nothing_at_all() -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=10))
    measured = replay(state, edges, ReplayOptions(doses=(1.0,), nulls=0))
    assert set(measured.doses.values()) == {0.0}


def test_rounding_is_measured_and_small() -> None:
    state = state_of("llama")
    measured = replay(state, discover(state), ReplayOptions(nulls=0))
    assert 0.0 <= max(measured.floor.values()) < 1e-6


def test_small_doses_follow_the_gradient() -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=12))
    doses = (0.99, 1.01)
    measured = replay(state, edges, ReplayOptions(doses=doses, nulls=0))
    _, table = judge(state, edges, measured, doses=doses)
    up, down = (table.filter(pl.col("dose") == dose) for dose in (1.01, 0.99))
    slope = (up["actual"] - down["actual"]) / (up["predicted"] - down["predicted"])
    assert (slope - 1.0).abs().median() < 1e-3  # type: ignore[operator]
    assert (slope - 1.0).abs().max() < 2e-2  # type: ignore[operator]


def test_nulls_are_seeded_and_as_long_as_the_edit() -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=5))
    first, again, other = (
        replay(state, edges, ReplayOptions(seed=seed)).nulls for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    kinds = {key[3] for key in first}
    assert kinds == {"direction", "feature"}


def test_an_edge_of_another_prompt_is_refused() -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=3))
    with pytest.raises(ConfigError, match="another prompt"):
        replay(state, edges.with_columns(target_position=pl.lit(2)))
    absent = edges.head(1).with_columns(source_id=pl.lit(10**6))
    with pytest.raises(ConfigError, match="not active"):
        replay(state, absent)


def planted(actual: dict[float, float], null: float, n_null: int = 60) -> str:
    """The verdict on one edge whose replay is made up; predictions are 4 (dose - 1)."""
    state = state_of("llama", 2)
    edge = discover(state, DiscoverOptions(top_k=1)).head(1)
    value = edge["source_activation"][0]
    edge = edge.with_columns(gradient=pl.lit(4.0 / value))
    source = (edge["source_layer"][0], edge["source_id"][0], edge["source_position"][0])
    layer = state.layers[source[0]]
    length = value * float(layer.directions[(layer.unique == source[1]).nonzero()[0, 0]].norm())
    generator = np.random.default_rng(0)
    measured = Measured(
        doses={(source, 0, dose): change for dose, change in actual.items()},
        floor={0: 1e-9},
    )
    measured.nulls[0, source[0], source[2], "direction"] = list(
        generator.normal(0.0, null / length, n_null)
    )
    table, _ = judge(state, edge, measured, doses=tuple(actual))
    return table["verdict"][0]


def test_verdicts_of_known_cases() -> None:
    faithful = {0.5: -2.1, 0.0: -4.2, 2.0: 3.9}
    assert planted(faithful, null=0.5) == "confirmed"
    assert planted({0.5: -1.0, 0.0: -1.2, 2.0: 0.9}, null=0.1) == "nonlinear"
    assert planted({0.5: -2.0, 0.0: 0.4, 2.0: 3.9}, null=0.1) == "refuted"  # a sign turns
    assert planted(faithful, null=4.0) == "refuted"  # any direction does as much
    assert planted(faithful, null=0.5, n_null=0) == "undetermined"
    assert planted({0.5: 0.0, 0.0: 0.0, 2.0: 0.0}, null=0.5) == "refuted"


def test_q_values_and_intervals_are_the_textbook_ones() -> None:
    p = [0.01, 0.04, None, 0.03, 0.005, 0.9]
    known = [value for value in p if value is not None]
    expected = iter(stats.false_discovery_control(known).tolist())
    assert bh(p) == [None if value is None else pytest.approx(next(expected)) for value in p]
    low, high = stats.binomtest(18, 20).proportion_ci(method="wilson")
    assert wilson(18, 20) == (pytest.approx(low), pytest.approx(high))


def test_agreement_of_predictions_and_replays() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=200)
    table = pl.DataFrame(
        {
            "prompt_id": ["0"] * 200,
            "target_layer": [1] * 200,
            "target_id": [index // 20 for index in range(200)],
            "target_position": [3] * 200,
            "predicted": x,
            "actual": 0.8 * x + 0.1 + 0.05 * rng.normal(size=200),
        }
    )
    found = agreement(table)
    assert found["slope"] == pytest.approx(0.8, abs=0.02)
    low, high = found["slope_interval"]
    assert low < 0.8 < high and high - low < 0.05
    assert found["spearman"] == pytest.approx(
        stats.spearmanr(table["predicted"], table["actual"]).statistic
    )
    assert agreement(table.clear())["status"] == "skipped"


def test_dictionaries_are_read_once_for_everything() -> None:
    model, dictionaries = model_of("llama"), dictionaries_of("llama")
    before = dictionaries.bytes_read
    state = PromptState.of(model, IDS, dictionaries, keep_reads=True)
    assert state.bytes_read == dictionaries.bytes_read - before
