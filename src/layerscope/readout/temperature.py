"""Does one temperature explain how a row differs from the model's own prediction?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError

# 25 log-spaced temperatures in [0.1, 10]; the middle one is exactly 1.
GRID: tuple[float, ...] = tuple(10.0 ** (step / 12 - 1) for step in range(25))


@dataclass(frozen=True)
class TemperatureFit:
    """The best temperature of the grid for each row, and what it leaves.

    Attributes:
        temp_est: [row] temperature s that minimises KL(softmax(z / s) || reference).
        kl_bits: [row] KL before, bits.
        kl_after_temp_bits: [row] KL at `temp_est`, bits.
    """

    temp_est: Float[Tensor, " row"]
    kl_bits: Float[Tensor, " row"]
    kl_after_temp_bits: Float[Tensor, " row"]


@torch.no_grad()
def fit_temperature(
    logits: Float[Tensor, "row vocab"], reference: Float[Tensor, "row vocab"]
) -> TemperatureFit:
    """Fit one temperature per row on a grid of 25 log-spaced values in [0.1, 10].

    For a few rows (the last row of each prompt): both sides are whole rows of logits, as
    `Unembedding.logits` returns them. Works in float64, one row at a time. Ties go to the value
    nearest 1.

    Raises:
        ConfigError: shapes differ.
    """
    if logits.ndim != 2 or logits.shape != reference.shape:
        raise ConfigError(
            f"logits {tuple(logits.shape)} and reference {tuple(reference.shape)} must both be "
            "[row, vocab]"
        )
    order = sorted(GRID, key=lambda value: abs(math.log(value)))
    fits = [
        _fit_row(row.double(), target.double(), order)
        for row, target in zip(logits, reference, strict=True)
    ]
    columns = torch.tensor(fits, dtype=torch.float64).view(-1, 3).unbind(-1)
    return TemperatureFit(*(column.float() for column in columns))


def _fit_row(row: Tensor, target: Tensor, grid: list[float]) -> tuple[float, float, float]:
    log_q = torch.log_softmax(target, dim=-1)
    divergences: list[float] = []
    for temperature in grid:  # nearest 1 first, so that the first minimum is the least change
        log_p = torch.log_softmax(row / temperature, dim=-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum() / math.log(2.0))
        divergences.append(max(kl, 0.0) if math.isfinite(kl) else math.nan)
    if any(math.isnan(kl) for kl in divergences):
        return math.nan, math.nan, math.nan
    best = min(range(len(grid)), key=divergences.__getitem__)
    return grid[best], divergences[0], divergences[best]
