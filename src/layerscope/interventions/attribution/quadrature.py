"""Rules for an integral over [0, 1], where 0 is the run that is changed and 1 the donor."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from layerscope.errors import ConfigError, nearest

Rule: TypeAlias = Literal["left", "right", "midpoint", "gauss-legendre"]
RULES: tuple[Rule, ...] = ("left", "right", "midpoint", "gauss-legendre")


def points(rule: Rule, steps: int) -> tuple[tuple[float, float], ...]:
    """Return (place, weight) pairs; the weights sum to 1.

    ``left`` and ``right`` converge with 1/steps, ``midpoint`` with 1/steps², ``gauss-legendre``
    faster than any power where the metric is smooth along the path.

    Raises:
        ConfigError: the rule is unknown, or there are no steps.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}; give 1 or more")
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        places, shares = (nodes + 1) / 2, weights / 2
        return tuple(zip(places.tolist(), shares.tolist(), strict=True))
    offsets = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
    if rule not in offsets:
        raise ConfigError(f"unknown rule '{rule}'{nearest(rule, RULES)}; use {', '.join(RULES)}")
    return tuple(((step + offsets[rule]) / steps, 1 / steps) for step in range(steps))
