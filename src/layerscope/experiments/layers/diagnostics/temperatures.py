"""The temperature that brings one distribution nearest to another, searched without an edge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_STEP = math.log(10.0) / 4  # of the coarse walk in ln(temperature)
_FARTHEST = math.log(1e9)  # where a walk that still descends stops
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_TOLERANCE = 1e-4  # of ln(temperature)
_NOTHING = 1e-9  # bits: no improvement worth a temperature


@dataclass(frozen=True)
class BestTemperature:
    """The minimum of KL(softmax(z / s) || reference) over s.

    Attributes:
        temperature: s; 1 where no other is better.
        kl_bits: KL at s = 1, bits.
        kl_after_bits: KL at the best s, bits.
        settled: False where KL is as low at s = 1e9 or 1e-9, so that there is no best s.
    """

    temperature: float
    kl_bits: float
    kl_after_bits: float
    settled: bool


@torch.no_grad()
def best_temperature(
    logits: Float[Tensor, " vocab"], reference: Float[Tensor, " vocab"]
) -> BestTemperature:
    """Search in ln(s): walk both ways from s = 1 until KL rises again, then by golden section.

    This divergence may have more than one minimum in s; the walk goes on to s = 10 and 1 / 10
    whatever it finds, and the lowest of its points is refined.
    """
    target = torch.log_softmax(reference.double(), -1)
    z = logits.double()

    def kl(log_s: float) -> float:
        log_p = torch.log_softmax(z * math.exp(-log_s), -1)
        return max(float((log_p.exp() * (log_p - target)).sum()) / math.log(2.0), 0.0)

    known = {0.0: kl(0.0)}
    for sign in (-1.0, 1.0):
        step = 1
        while step * _STEP <= _FARTHEST:
            at = sign * step * _STEP
            known[at] = kl(at)
            rising = known[at] >= known[sign * (step - 1) * _STEP]
            if rising and step * _STEP >= math.log(10.0):
                break
            step += 1
    # Nearest to 1 first, so that a tie changes nothing.
    best = min(sorted(known, key=abs), key=known.__getitem__)
    # Where nothing is lost by going on to the end, there is no best temperature.
    edge = best != 0.0 and kl(math.copysign(_FARTHEST, best)) <= known[best] + _NOTHING
    if not edge:
        best, known[best] = _refine(kl, best - _STEP, best + _STEP, best, known[best])
    if known[0.0] - known[best] < _NOTHING:
        best, edge = 0.0, False
    return BestTemperature(math.exp(best), known[0.0], known[best], not edge)


def _refine(
    kl: Callable[[float], float], low: float, high: float, best: float, least: float
) -> tuple[float, float]:
    """Return the lowest point of a bracket, never one that is worse than `best`."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = kl(left), kl(right)
    while high - low > _TOLERANCE:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = kl(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = kl(right)
    middle = (low + high) / 2
    found = kl(middle)
    return (middle, found) if found < least else (best, least)
