"""Directions from contrasts: which estimators agree, and why the mean difference is the default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, EditError

Estimator = Literal["mean_difference", "pca_centred", "pca_pairwise", "probe"]
ESTIMATORS: tuple[Estimator, ...] = ("mean_difference", "pca_centred", "pca_pairwise", "probe")
WHY: Mapping[Estimator, str] = {
    "mean_difference": "mean of positive minus negative states: keeps what all contrasts "
    "share, and needs no pairs",
    "pca_centred": "first principal component of the centred differences: what varies between "
    "contrasts; a shift that is the same in all of them is removed by the centring",
    "pca_pairwise": "first principal component of the pairs, each centred on itself: the largest "
    "direction of the differences, shared or not",
    "probe": "logistic regression between the sides: separates them best, and so turns away from "
    "directions that vary within a side",
}
AGREE = {"pca_centred": 0.8, "pca_pairwise": 0.8, "probe": 0.5}
RELIABLE = 0.8


@dataclass(frozen=True, eq=False)
class Estimates:
    """Every estimator's direction, and how far to trust them.

    Attributes:
        directions: by estimator; the mean difference at its own length, the others at its length.
        cosines: |cos| of each with the mean difference.
        shared: share of the differences' energy that is the same in all contrasts, 0 to 1.
        split_half: |cos| of the mean differences of two halves of the contrasts.
        warnings: one line each; empty when nothing is amiss.
    """

    directions: Mapping[Estimator, Float[Tensor, " d_model"]]
    cosines: Mapping[str, float]
    shared: float
    split_half: float
    warnings: tuple[str, ...] = field(default=())


def estimate(
    positive: Float[Tensor, "contrast d_model"],
    negative: Float[Tensor, "contrast d_model"],
    *,
    paired: bool = True,
) -> Estimates:
    """Estimate the direction from negative to positive in every way, and compare.

    Args:
        positive: states with the property.
        negative: states without it, in the same order.
        paired: whether states of one place belong together; else there is no PCA of differences.

    Raises:
        EditError: there are fewer than two contrasts, or the sides do not differ.
    """
    if len(positive) < 2 or positive.shape != negative.shape:
        raise EditError("a direction needs two contrasts or more, with both sides of each")
    ones, others = positive.double(), negative.double()
    differences = ones - others
    mean = differences.mean(0)
    length = mean.norm()
    if not float(length) > 0:
        raise EditError("the two sides do not differ on average, so there is no direction")
    found: dict[Estimator, Tensor] = {"mean_difference": mean}
    if paired:
        found["pca_centred"] = _component(differences - mean, differences)
        found["pca_pairwise"] = _component(differences, differences)
    found["probe"] = _probe(ones, others)
    directions: dict[Estimator, Tensor] = {
        name: (vector / vector.norm() * length).float() for name, vector in found.items()
    }
    unit = mean / length
    cosines = {
        name: abs(float(vector.double() @ unit / length))
        for name, vector in directions.items()
        if name != "mean_difference"
    }
    energy = float(differences.square().sum(-1).mean())
    shared = float(length.square()) / energy
    halves = torch.stack([differences[half::2].mean(0) for half in (0, 1)])
    split_half = abs(float(torch.cosine_similarity(halves[0], halves[1], dim=0)))
    warnings = _warnings(cosines, shared, split_half, len(ones))
    return Estimates(
        directions,
        cosines,
        shared,
        split_half,
        warnings,
    )


def bootstrap_cone(
    positive: Float[Tensor, "contrast d_model"],
    negative: Float[Tensor, "contrast d_model"],
    *,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> float:
    """Return the half-angle, in degrees, that holds a share of resampled mean differences.

    Contrasts are drawn with replacement; the angle is to the mean difference of all of them.
    """
    if draws < 1:
        raise ConfigError("the bootstrap needs 1 draw or more")
    differences = (positive - negative).double()
    generator = torch.Generator().manual_seed(seed)
    count = len(differences)
    index = torch.randint(count, (draws, count), generator=generator)
    means = torch.stack([differences[rows].mean(0) for rows in index])
    cosines = torch.cosine_similarity(means, differences.mean(0)[None], dim=-1).clamp(-1, 1)
    return math.degrees(float(torch.quantile(cosines.acos(), level)))


def _component(rows: Tensor, differences: Tensor) -> Tensor:
    """Return the first right singular vector, on the side where most differences lie."""
    vector = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    votes = torch.sign(differences @ vector).sum()
    return -vector if float(votes) < 0 else vector


def _probe(ones: Tensor, others: Tensor, *, penalty: float = 1.0, steps: int = 50) -> Tensor:
    """Return the weights of a logistic regression, states scaled to a mean square of 1.

    Solved in the span of the states by Newton's method: as many unknowns as there are states.
    """
    states = torch.cat([ones, others])
    states = states - states.mean(0)
    scale = states.square().mean().sqrt().clamp_min(1e-12)
    left, sizes, basis = torch.linalg.svd(states / scale, full_matrices=False)
    features = left * sizes
    labels = torch.cat([torch.ones(len(ones)), torch.zeros(len(others))]).double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64)
    eye = penalty * torch.eye(len(weights), dtype=torch.float64)
    for _ in range(steps):
        chance = torch.sigmoid(features @ weights)
        gradient = features.T @ (chance - labels) + penalty * weights
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + eye
        move = torch.linalg.solve(curvature, gradient)
        weights = weights - move
        if float(move.norm()) < 1e-10 * (1 + float(weights.norm())):
            break
    return basis.T @ weights


def _warnings(
    cosines: Mapping[str, float], shared: float, split_half: float, count: int
) -> tuple[str, ...]:
    notes: list[str] = []
    for name, cosine in cosines.items():
        if cosine >= AGREE[name]:
            continue
        reason = WHY[name]  # type: ignore[index]
        if name == "pca_centred":
            reason += f"; here {shared:.0%} of the differences' energy is shared"
        notes.append(
            f"{name} disagrees with the mean difference (|cos| {cosine:.2f}, below "
            f"{AGREE[name]}): {reason}"
        )
    if split_half < RELIABLE:
        notes.append(
            f"two halves of the {count} contrasts give mean differences of |cos| {split_half:.2f}: "
            "use more contrasts, or ones that differ in less else"
        )
    return tuple(notes)
