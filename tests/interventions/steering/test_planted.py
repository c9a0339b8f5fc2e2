"""Planted steering directions: what each estimator finds, and a dose that is a straight line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerscope.interventions.steering.contrasts import Contrast
from layerscope.interventions.steering.dose import (
    Dose,
    examples_of,
    fit_response,
    propensities,
    random_directions,
)
from layerscope.interventions.steering.estimators import estimate
from layerscope.interventions.steering.vector import SteeringVector
from support.toys import bare_gpt2

D, PAIRS, SHIFT = 512, 128, 4.0


def planted(seed: int, *, spread: float = 0.0, nuisance: float = 0.0, pairs: int = PAIRS):
    """Return a direction, and states of pairs that differ by it, noise, and a nuisance."""
    draw = np.random.default_rng(seed)
    direction, other = np.linalg.qr(draw.normal(size=(D, 2)))[0].T
    shift = SHIFT * (1 + spread * draw.normal(size=(pairs, 1)))
    base = draw.normal(size=(pairs, D))

    def side(sign):
        noise = 0.3 * draw.normal(size=(pairs, D))
        drift = nuisance * draw.normal(size=(pairs, 1)) * other
        return base + noise + drift + sign * shift / 2 * direction

    states = [torch.tensor(side(sign), dtype=torch.float32) for sign in (1, -1)]
    return torch.tensor(direction, dtype=torch.float32), *states


def cosine(a, b) -> float:
    return abs(float(torch.cosine_similarity(a.double(), b.double(), dim=0)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "noise", ({}, {"spread": 0.5}, {"spread": 0.5, "nuisance": 1.5}, {"nuisance": 1.5})
)
def test_the_default_finds_every_planted_direction(seed, noise):
    direction, positive, negative = planted(seed, **noise)
    assert cosine(estimate(positive, negative).directions["mean_difference"], direction) >= 0.97


def test_centring_removes_a_constant_shift_and_says_so():
    direction, positive, negative = planted(0)
    found = estimate(positive, negative)
    assert cosine(found.directions["pca_centred"], direction) < 0.2
    assert cosine(found.directions["pca_pairwise"], direction) > 0.97
    (warning,) = [line for line in found.warnings if "pca_centred" in line]
    assert "disagrees with the mean difference" in warning
    assert "energy is shared" in warning


def test_a_varying_shift_without_a_nuisance_leaves_all_in_agreement():
    direction, positive, negative = planted(1, spread=0.5)
    found = estimate(positive, negative)
    assert cosine(found.directions["pca_centred"], direction) > 0.85
    assert found.warnings == ()


def test_few_noisy_contrasts_are_called_unreliable():
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(8, D, generator=generator) for _ in range(2)]
    found = estimate(*sides)
    assert found.split_half < 0.5
    assert any("two halves of the 8 contrasts" in line for line in found.warnings)


def test_the_slope_of_a_linear_model_is_the_inner_product():
    toy = bare_gpt2(n_layers=2, n_heads=1, d_model=16, d_vocab=12)
    generator = torch.Generator().manual_seed(3)
    toy.embed[:] = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    toy.unembed[:] = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    model = toy.model()
    contrasts = [Contrast(f"t{a}", f"t{b}", f"t{c} t{d}") for a, b, c, d in PICKS]
    examples, left_out = examples_of(model, contrasts)
    assert left_out == 0
    vector = SteeringVector("resid_post.0", torch.randn(16, generator=generator).double(), 2.5)
    alphas = (-2.0, -0.5, 0.0, 1.0, 3.0)
    for direction in (vector, *random_directions(vector, 2)):
        doses = [Dose(direction, alpha) for alpha in alphas]
        response = fit_response(alphas, propensities(model, examples, doses))
        for slope, (a, b, *_) in zip(response.slopes, PICKS, strict=True):
            w = toy.unembed[a] - toy.unembed[b]
            assert slope == pytest.approx(float(direction.per_alpha().double() @ w), abs=1e-6)
        assert float(response.residuals.max()) < 1e-6
        assert np.abs(response.rank_correlations).min() == pytest.approx(1.0)


PICKS = ((1, 2, 3, 4), (5, 6, 1, 0), (7, 3, 2, 2), (10, 9, 8, 11))
