"""Sentiment in the embedded model, and runs that are killed and resumed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from polars.testing import assert_frame_equal

import layerscope
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.steering import SteeringConfig, execute, plan, steering
from layerscope.experiments.steering.builtin import NEUTRAL, demo_openings, demo_reviews
from layerscope.files import canonical_json
from layerscope.interventions.steering.contrasts import Contrast, ContrastSet
from layerscope.interventions.steering.texts import BagOfWords, repetition
from layerscope.models import Add
from layerscope.reports.steering import write_steering
from support.loaded import loaded

ALPHAS = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.4)


@cache
def outcome():
    model = layerscope.load(model_path(), device="cpu", dtype="float32", verify=False)
    config = SteeringConfig(
        alphas=ALPHAS, random_directions=4, max_new_tokens=24, temperature=1.0, layers=(2, 4, 6)
    )
    return steering(model, demo_reviews(50), demo_openings(32), config)


def test_sentiment_moves_with_every_step_of_the_dose():
    summary = outcome().summary
    moved = list(summary["propensity"]["by_alpha"].values())
    assert len(moved) == 7 and np.all(np.diff(moved) > 0)
    assert summary["response"]["anti_steerable"] == 0.0
    assert summary["response"]["low"] > 3 * summary["random"]["largest_absolute_slope"]


def test_a_classifier_that_never_saw_the_vector_moves_along():
    texts = [entry for entry in outcome().summary["texts"] if entry["kind"] == "vector"]
    assert [entry["alpha"] for entry in texts] == list(ALPHAS)
    shares = [entry["share_positive"] for entry in texts]
    assert np.all(np.diff(shares) >= 0) and shares[0] < 0.2 and shares[-1] > 0.8
    assert outcome().summary["classifier_error"] < 0.05
    assert outcome().summary["classifier_texts"] == 2 * 25  # both sides of the training half
    # Coherent all the way: the unsteered model finds the texts about as likely as its own.
    plain = texts[ALPHAS.index(0.0)]["perplexity"]
    assert all(entry["perplexity"] < 3 * plain for entry in texts)
    assert all(entry["repeated_3"] < 0.5 for entry in texts)


def test_the_disagreement_of_the_centred_component_is_told():
    assert any("pca_centred disagrees" in line for line in outcome().summary["warnings"])
    assert outcome().summary["cosines"]["pca_pairwise"] > 0.9


def test_damage_is_what_the_edit_does_to_texts_without_the_property():
    model = layerscope.load(model_path(), device="cpu", dtype="float32", verify=False)
    found = outcome()
    summary, layer = found.summary, found.summary["layer"]
    bits = summary["neutral"]["bits_by_alpha"]
    assert list(map(float, bits)) == list(ALPHAS) and bits["0"] == 0.0
    assert bits["0.1"] < bits["0.2"] < bits["0.4"] and bits["-0.1"] < bits["-0.4"]
    # By hand, text by text without padding.
    raw = torch.tensor(found.tables["vector"]["value"].to_list(), dtype=torch.float32)
    added = summary["coefficient_of_alpha_1"] * raw
    assert float(added.norm()) == pytest.approx(summary["typical_norm"], rel=1e-5)
    total, tokens = 0.0, 0
    for text in NEUTRAL:
        edit = Add(f"resid_post.{layer}", added, coefficient=0.2)
        plain, moved = (
            model.run(text, edits=edits).logits[0].double().log_softmax(-1)
            for edits in ([], [edit])
        )
        total += float((plain.exp() * (plain - moved)).sum()) / np.log(2)
        tokens += len(plain)
    assert summary["neutral"]["texts"] == len(NEUTRAL)
    assert bits["0.2"] == pytest.approx(total / tokens, rel=1e-3)


def test_a_strength_is_found_for_a_change_of_neutral_texts():
    model = layerscope.load(model_path(), device="cpu", dtype="float32", verify=False)
    config = SteeringConfig(
        alphas=(-0.2, 0.2), random_directions=1, layers=(4,), kl_bits=0.1, neutral=NEUTRAL[:4]
    )
    found = steering(model, demo_reviews(20), (), config)
    strength = found.summary["calibration"]
    assert strength["bits"] == pytest.approx(0.1, rel=0.02) and strength["forwards"] <= 8
    curve = found.tables["calibration"].sort("alpha")
    assert strength["monotone"] == bool(np.all(np.diff(curve["bits"].to_numpy()) >= -1e-9))
    assert (strength["alpha"], strength["bits"]) in curve.rows()
    warnings = found.summary["warnings"]
    assert any("20 contrasts a side are few" in line for line in warnings)
    assert any("1 random directions say little" in line for line in warnings)
    # What no strength reaches is said, and the rest is kept.
    far = steering(model, demo_reviews(20), (), replace(config, kl_bits=1000.0))
    assert far.summary["calibration"]["alpha"] is None
    assert any("no strength was found" in line for line in far.summary["warnings"])
    assert far.summary["response"] == found.summary["response"]


def test_the_page_shows_dose_and_texts(tmp_path):
    page = write_steering(outcome(), tmp_path / "page.html").read_text("utf-8")
    parts = ("Steering: reviews", "Dose and response", "random directions", "Every text")
    for part in (*parts, "Change of neutral texts", "texts it was."):
        assert part in page


class Units:
    """A store in memory that is killed after so many units."""

    def __init__(self, limit):
        self.kept, self.limit = {}, limit

    def get_unit(self, key):
        return self.kept.get(key)

    def put_unit(self, key, frame, payload):
        if len(self.kept) >= self.limit:
            raise KeyboardInterrupt
        self.kept[key] = (frame.clone(), payload)


WORDS = "one two three four five six seven eight nine ten girl park city text"


def small_set(count=12):
    words = WORDS.split()
    return ContrastSet(
        "small",
        tuple(
            Contrast(words[n], words[n + 1], f"The capital of {words[n + 2]} is")
            for n in range(count)
        ),
    )


@pytest.mark.parametrize("killed_after", (1, 4, 7))
def test_a_killed_run_resumes_to_the_same_tables(killed_after):
    config = SteeringConfig(
        alphas=(-1, 1), random_directions=2, max_new_tokens=3, shots=1, kl_bits=0.1
    )
    planned = plan(loaded("llama"), small_set(), ("Once upon a time",), config)
    whole = execute(planned)
    units = Units(killed_after)
    with pytest.raises(KeyboardInterrupt):
        execute(planned, units=units)
    units.limit = 1000
    seen = []
    resumed = execute(planned, units=units, progress=lambda done, total: seen.append((done, total)))
    for name, table in whole.tables.items():
        assert_frame_equal(resumed.tables[name], table)
    assert canonical_json(resumed.summary) == canonical_json(whole.summary)
    assert seen[-1] == (13, 13)


def test_what_cannot_be_measured_is_refused_before_anything_runs():
    alone = ContrastSet("alone", (Contrast("the park", "one two"), Contrast("six", "ten nine")) * 6)
    with pytest.raises(PromptError, match="leaves no choice after a prompt"):
        plan(loaded("llama"), alone)
    with pytest.raises(ConfigError, match="did you mean 'mean_difference'"):
        SteeringConfig(method="mean_diff")
    with pytest.raises(ConfigError, match="has no dose"):
        SteeringConfig(mode="clamp")
    with pytest.raises(ConfigError, match="kl_bits must be above 0"):
        SteeringConfig(kl_bits=0.0)
    with pytest.raises(ConfigError, match="neutral needs one text or more"):
        SteeringConfig(neutral=())
    with pytest.raises(ConfigError, match="two strengths or more"):
        SteeringConfig(alphas=(0.0, 1.0))


def test_repetition_counts_what_came_before():
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx({2: 3 / 5, 3: 2 / 4, 4: 1 / 3})
    assert repetition([1, 2, 3]) == {2: 0.0, 3: 0.0, 4: 0.0}


def test_the_classifier_weighs_words_by_side():
    judge = BagOfWords(["good and fine", "good fun"], ["bad and dull"])
    assert judge.score("good") > 0 > judge.score("dull") and judge.score("unheard") == 0.0
    assert judge.accuracy(["good"], ["bad", "fine"]) == pytest.approx(2 / 3)
