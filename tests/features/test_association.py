"""Token associations: planted ones are found, shuffled ones are not, figures are those by hand."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy import stats

from layerscope.features.association import (
    Activations,
    AssociationOptions,
    Shuffles,
    associate,
    bh_of,
    excess_ranks,
    hypergeometric,
    null_moments,
    pearson_tail,
)
from layerscope.features.text_quality import TextQuality, text_quality

N_PROMPTS, LENGTH, N_TYPES, N_FEATURES = 60, 40, 12, 6
PLANTED = {0: 3, 1: 7}  # feature -> token


def corpus(*, planted: bool = True, seed: int = 0) -> Activations:
    """Return random tokens and features, of which two fire mostly on a token of theirs."""
    random = np.random.default_rng(seed)
    tokens = random.integers(N_TYPES, size=N_PROMPTS * LENGTH)
    clusters = np.repeat(np.arange(N_PROMPTS), LENGTH)
    # Prompts differ in how much fires at all, which is what a test that ignores them gets wrong.
    level = random.uniform(0.02, 0.3, size=N_PROMPTS)[clusters]
    values = np.zeros((N_FEATURES, len(tokens)))
    for feature in range(N_FEATURES):
        fires = random.random(len(tokens)) < level
        if planted and feature in PLANTED:
            fires |= (tokens == PLANTED[feature]) & (random.random(len(tokens)) < 0.7)
        values[feature] = fires * random.exponential(1.0, len(tokens))
    feature, place = values.nonzero()
    return Activations(tokens, clusters, feature, place, values[feature, place], N_FEATURES)


OPTIONS = AssociationOptions(permutations=1000, seed=1)


def test_planted_tokens_are_recovered_first_and_alone() -> None:
    table = associate(corpus(), OPTIONS)
    found = table.filter((pl.col("q") < 0.05) & (pl.col("z") > 0))
    pairs = set(found.select("feature", "token_id").iter_rows())
    assert pairs == set(PLANTED.items())
    for feature, token in PLANTED.items():
        assert table.filter(pl.col("feature") == feature)["token_id"][0] == token
    assert (found["lift"] > 2).all() and (found["pmi"] > 1).all() and (found["logodds_z"] > 5).all()


def test_shuffled_labels_give_none() -> None:
    found = corpus()
    random = np.random.default_rng(5)
    shuffled = found.tokens.copy()
    for cluster in range(N_PROMPTS):
        part = slice(cluster * LENGTH, (cluster + 1) * LENGTH)
        shuffled[part] = random.permutation(shuffled[part])
    table = associate(
        Activations(shuffled, found.clusters, found.feature, found.place, found.value, N_FEATURES),
        OPTIONS,
    )
    assert table.height and table.filter(pl.col("q") < 0.05).is_empty()


def test_tokens_of_loud_prompts_are_no_association() -> None:
    # Token 11 stands only in prompts where everything fires: within prompts it is nothing special,
    # and a test that ignores prompts is fooled.
    random = np.random.default_rng(2)
    clusters = np.repeat(np.arange(40), 50)
    loud = clusters < 10
    tokens = np.where(loud & (random.random(2000) < 0.5), 11, random.integers(5, size=2000))
    fires = random.random(2000) < np.where(loud, 0.6, 0.05)
    place = np.flatnonzero(fires)
    found = Activations(
        tokens, clusters, np.zeros(len(place), dtype=int), place, random.random(len(place)) + 1, 1
    )
    row = associate(found, OPTIONS).filter(pl.col("token_id") == 11).to_dicts()[0]
    assert row["q_hypergeometric"] < 1e-6
    assert row["p"] > 0.05


def test_figures_are_those_by_hand() -> None:
    found = corpus()
    table = associate(found, OPTIONS)
    dense = np.zeros((N_FEATURES, len(found.tokens)))
    dense[found.feature, found.place] = found.value
    for row in table.iter_rows(named=True):
        mine = found.tokens == row["token_id"]
        values = dense[row["feature"]]
        share = (values > 0).mean()
        assert row["n"] == mine.sum()
        assert row["n_active"] == (values[mine] > 0).sum()
        assert row["mean"] == pytest.approx(values[mine].mean())
        joint = ((values > 0) & mine).mean()
        assert row["pmi"] == pytest.approx(math.log2(joint / (share * mine.mean())))
        between = sorted([values.mean(), row["mean"]])
        assert between[0] - 1e-12 <= row["shrunk_mean"] <= between[1] + 1e-12


def test_moments_are_those_of_all_shuffles() -> None:
    # Two clusters small enough to go through every assignment of their labels.
    tokens = np.array([0, 0, 1, 2, 0, 1, 1])
    clusters = np.array([0, 0, 0, 0, 1, 1, 1])
    place = np.array([0, 2, 3, 4])
    found = Activations(
        tokens, clusters, np.zeros(4, dtype=int), place, np.array([2.0, 1.0, 1.0, 3.0]), 1
    )
    excess = excess_ranks(found, 7)
    assert excess.tolist() == [6 - 2, 4.5 - 2, 4.5 - 2, 7 - 2]  # silence: ranks 1 to 3
    sums = [
        [sum(e for p, e in zip(place, excess, strict=True) if (*a, *b)[p] == t) for t in range(3)]
        for a in permutations((0, 0, 1, 2))
        for b in permutations((0, 1, 1))
    ]
    mean, sd, skew = null_moments(found, excess, tokens, np.zeros(3, dtype=int), np.arange(3))
    assert mean == pytest.approx(np.mean(sums, axis=0))
    assert sd == pytest.approx(np.std(sums, axis=0))
    assert skew == pytest.approx(stats.skew(sums, axis=0), abs=1e-9)


def test_shuffles_have_those_moments() -> None:
    # Clusters differ in what they hold, so shuffles across them would have other moments.
    clusters = np.repeat(np.arange(4), 30)
    tokens = np.where(np.arange(120) % 30 < 3 + 7 * clusters, 0, 1)
    place = np.flatnonzero(np.arange(120) % 30 < 2 + 6 * clusters[::-1])
    values = 1.0 + np.arange(len(place)) % 5
    found = Activations(tokens, clusters, np.zeros(len(place), dtype=int), place, values, 1)
    excess = excess_ranks(found, 120)
    mean, sd, _ = null_moments(found, excess, tokens, np.zeros(2, dtype=int), np.arange(2))
    drawn = Shuffles(found, tokens, excess, np.arange(2), 2, seed=0)
    sums = np.array(list(drawn.draw(600, np.arange(2))))
    assert np.abs(sums.mean(0) - mean).max() < 4 * sd.max() / math.sqrt(600)
    assert sums.std(0) == pytest.approx(sd, rel=0.15)


def test_p_values_are_calibrated_under_the_null() -> None:
    p = [associate(corpus(planted=False, seed=seed), OPTIONS)["p"].to_numpy() for seed in range(8)]
    share = float((np.concatenate(p) <= 0.1).mean())
    assert 0.05 < share < 0.16


def test_the_fitted_tail_is_that_of_many_shuffles() -> None:
    found = corpus(planted=False, seed=3)
    label = np.unique(found.tokens, return_inverse=True)[1]
    excess = excess_ranks(found, len(label))
    pairs = np.arange(N_FEATURES * N_TYPES)
    feature, kind = pairs // N_TYPES, pairs % N_TYPES
    mean, sd, skew = null_moments(found, excess, label, feature, kind)
    drawn = Shuffles(found, label, excess, pairs, N_TYPES, seed=0)
    z = (np.array(list(drawn.draw(3000, pairs))) - mean) / sd
    for size in (1.5, 2.5, 3.0):
        share = (np.abs(z) >= size).mean()
        assert pearson_tail(np.full(len(pairs), size), skew).mean() == pytest.approx(share, rel=0.1)


def test_rare_tokens_among_very_many_tests_are_found_all_the_same() -> None:
    """No number of shuffles would do alone: 1 / 10,001 times the tests is far above one."""
    random = np.random.default_rng(4)
    n_prompts, length, n_types, n_features = 400, 50, 300, 400
    tokens = random.integers(n_types, size=n_prompts * length)
    place = random.integers(len(tokens), size=20 * n_features)
    feature = np.repeat(np.arange(n_features), 20)
    own = [np.flatnonzero(tokens == f)[:12] for f in range(5)]
    place = np.concatenate([place, *own])
    feature = np.concatenate([feature, *(np.full(len(at), f) for f, at in enumerate(own))])
    feature, place = np.unique(np.stack([feature, place]), axis=1)
    clusters = np.repeat(np.arange(n_prompts), length)
    value = random.exponential(1.0, len(place)) + 0.1
    found = Activations(tokens, clusters, feature, place, value, n_features)
    table = associate(found, AssociationOptions(min_joint=2))
    good = table.filter(pl.col("q") < 0.05)
    assert set(good.select("feature", "token_id").iter_rows()) == {(f, f) for f in range(5)}
    assert (good["permutations"] >= 999).all()
    assert table["permutations"].min() == 0


def test_pairs_not_reported_count_for_the_false_discovery_rate() -> None:
    p = np.array([0.01, 0.04, 0.002])
    assert bh_of(p, 3).tolist() == pytest.approx([0.015, 0.04, 0.006])
    assert bh_of(p, 30).tolist() == pytest.approx([0.15, 0.4, 0.06])


def test_hypergeometric_tail_is_exact() -> None:
    cases = [(3, 50, 10, 12), (0, 50, 10, 12), (10, 50, 10, 12), (1, 9, 8, 4)]
    for joint, n, active, token in cases:
        tail = sum(
            math.comb(active, k) * math.comb(n - active, token - k)
            for k in range(max(joint, token - (n - active)), min(active, token) + 1)
        )
        found = hypergeometric(np.array([joint]), n, np.array([active]), np.array([token]))
        if token - joint <= n - active:
            assert found[0] == pytest.approx(tail / math.comb(n, token), rel=1e-9)


def test_the_result_does_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = associate(corpus(), OPTIONS)
    monkeypatch.setattr("layerscope.features.association._CELLS", 1)
    monkeypatch.setattr("layerscope.features.shuffles._TABLE", 1)
    assert_frame_equal(associate(corpus(), OPTIONS), whole, rel_tol=1e-9)


def test_silence_gives_an_empty_table() -> None:
    none = np.zeros(0, dtype=int)
    found = Activations(np.arange(30), np.zeros(30, dtype=int), none, none, none * 1.0, 2)
    assert associate(found).is_empty()


def test_degenerate_text_is_noticed() -> None:
    sane = text_quality(
        ["the cat sat on the mat while a dog slept by the warm fire until dawn came again"] * 3,
        nats_per_token=2.0,
    )
    assert sane.degenerate() is None
    assert "repeat" in str(
        text_quality(
            [" ".join(map(str, range(30))) + " " + " ".join(map(str, range(30)))]
        ).degenerate()
    )
    assert "distinct" in str(
        text_quality(["bik bik bik bik bik bik bik bik bik bik bik"]).degenerate()
    )
    odd = TextQuality(1, 10, 0.9, 0.0, nats_per_token=4.0)
    assert "surprised" in str(odd.degenerate(sane))
    assert odd.degenerate() is None
