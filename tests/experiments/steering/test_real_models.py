"""Steering of trained models: a girl or a boy in a small story."""

from __future__ import annotations

import json

import pytest

import layerscope
from layerscope.experiments.steering import SteeringConfig, steering
from layerscope.interventions.steering.contrasts import Contrast, ContrastSet
from support.shared import shared_path

CHILDREN = ("Sam", "Kim", "Max", "Ann", "Lee", "Sue", "Tim", "Zoe", "Bob", "Pat")
OPENINGS = ("{} went to the park with mom.", "Once upon a time, there was a little child named {}.")


@pytest.mark.real_model
@pytest.mark.parametrize(("name", "layer"), (("stories260K", 4), ("babyllama-tok105", 3)))
def test_the_pronoun_follows_the_vector(name, layer):
    task = json.loads(shared_path("models", "gender_task.json").read_text("utf-8"))
    contrasts = [
        Contrast(template.format(k="girl", n=girl).strip(), template.format(k="boy", n=boy).strip())
        for template in task["templates"][:3]
        for girl, boy in zip(task["girl_names"], task["boy_names"], strict=True)
    ]
    choices = [Contrast("She", "He", text.format(n)) for n in CHILDREN for text in OPENINGS]
    model = layerscope.load(shared_path("models", name), device="cpu")
    config = SteeringConfig(
        layers=(layer,), alphas=(-0.3, -0.15, 0.15, 0.3), random_directions=20, max_new_tokens=24
    )
    summary = steering(
        model,
        ContrastSet("girl or boy", tuple(contrasts)),
        ("One day, a child named Sam went to the park.",),
        config,
        evaluate=ContrastSet("pronoun", tuple(choices)),
    ).summary
    moved = list(summary["propensity"]["by_alpha"].values())
    assert moved == sorted(moved) and moved[0] < 0 < moved[-1]
    assert summary["response"]["anti_steerable"] == 0.0
    assert summary["random"]["beyond"] == 0.0
    assert any("pca_centred disagrees" in line for line in summary["warnings"])
