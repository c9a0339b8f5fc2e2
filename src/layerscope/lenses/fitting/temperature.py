"""One temperature per row index: the minimum of a convex function, found without bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.loss import ROWS_AT_ONCE, kl_to_teacher, product
from layerscope.lenses.fitting.states import States
from layerscope.models.language_model import LanguageModel
from layerscope.readout.unembedding import Unembedding

_WIDEST = 60.0  # |log 1/tau| at which the search for a change of sign gives up
_TOLERANCE = 1e-5  # of log tau


@dataclass(frozen=True, eq=False)
class TemperatureFit:
    """The best temperatures.

    Attributes:
        inverse_temperature: [layer] 1 / tau; 0 where the divergence falls all the way to an
            infinite temperature, that is where the lens is worse than no information.
        settled: [layer] whether the minimum was found; False where the divergence still falls at
            the smallest temperature that can be written.
    """

    inverse_temperature: Float[Tensor, " layer"]
    settled: list[bool]


def fit_temperatures(
    hidden: Float[Tensor, "layer row d_model"],
    teacher: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
) -> TemperatureFit:
    """Minimise KL(teacher || head(hidden / tau)) over tau, for each layer.

    The divergence is convex in 1 / tau (without a softcap), so its slope changes sign once:
    the search walks from tau = 1 downhill, in doubling steps of log tau, until it does, and then
    halves the interval. There is no bound at which it would stop short.
    """

    def slope(log_inverse: Tensor) -> Tensor:
        inverse = log_inverse.exp().float().requires_grad_()
        total = torch.zeros_like(log_inverse)
        for first in range(0, len(teacher), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            with torch.enable_grad():
                scaled = hidden[:, rows] * inverse[:, None, None]
                loss = kl_to_teacher(scaled, teacher[rows], unembedding)
                (gradient,) = torch.autograd.grad(loss.sum(), inverse)
            total += gradient.double() * (len(teacher[rows]) / len(teacher))
        return total

    low, high, bracketed = _bracket(slope, hidden.shape[0], hidden.device)
    while bool((bracketed & (high - low > _TOLERANCE)).any()):
        middle = (low + high) / 2
        rising = slope(middle) > 0
        high = torch.where(bracketed & rising, middle, high)
        low = torch.where(bracketed & ~rising, middle, low)
    best = ((low + high) / 2).exp()
    # Falling all the way down: nothing but the limit is the minimum.
    endless = ~bracketed & (low <= -_WIDEST)
    best = torch.where(endless, torch.zeros_like(best), best)
    return TemperatureFit(best.float(), (bracketed | endless).tolist())


def _bracket(
    slope: Callable[[Tensor], Tensor], n_layers: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bounds of log 1/tau between which the slope changes sign, and where that was found."""
    here = torch.zeros(n_layers, dtype=torch.float64, device=device)
    downhill = -torch.sign(slope(here))
    flat = downhill == 0
    low, high = here.clone(), here.clone()
    found = flat.clone()
    step = 0.5
    position = here.clone()
    while not bool(found.all()) and float(position.abs().max()) < _WIDEST:
        ahead = torch.where(found, position, position + downhill * step)
        passed = ~found & (torch.sign(slope(ahead)) != -downhill)
        low = torch.where(found, low, torch.minimum(position, ahead))
        high = torch.where(found, high, torch.maximum(position, ahead))
        position = torch.where(passed | found, position, ahead)
        found |= passed
        step *= 2
    missing = ~found
    low = torch.where(missing, position, low)
    high = torch.where(missing, position, high)
    return low, high, found


@torch.no_grad()
def normalised(
    model: LanguageModel, states: States, norm: NormChoice
) -> Float[Tensor, "layer row d_model"]:
    """Return the normalised residuals of every row index but the last, in float32."""
    return torch.stack(
        [model.norm_at(row, norm)[1](states.residual[row]).float() for row in range(model.n_layers)]
    )


@torch.no_grad()
def fit_on_prompts(
    hidden: Float[Tensor, "layer row d_model"],
    teacher: Float[Tensor, "row vocab"],
    unembedding: Unembedding,
) -> TemperatureFit:
    """Minimise the same divergence for a few rows whose logits can be held, much faster.

    The products with the unembedding are formed once per layer, and the slope is exact:
    the mean over rows of sum (softmax(z) - p) dz/d(1/tau). Layers whose slope is not finite keep
    temperature 1 and are not settled.

    Args:
        hidden: [layer, row, d_model] normalised residuals of a few prompts.
        teacher: [row, vocab] logits of the model at the same places.
        unembedding: the head.
    """
    p = torch.log_softmax(teacher.float(), -1).exp_()
    found = [_fit_layer(rows, p, unembedding) for rows in hidden]
    inverse = torch.tensor([inverse for inverse, _ in found], dtype=torch.float32)
    return TemperatureFit(inverse, [settled for _, settled in found])


def _fit_layer(
    rows: Float[Tensor, "row d_model"], p: Float[Tensor, "row vocab"], unembedding: Unembedding
) -> tuple[float, bool]:
    bare = product(rows.float(), unembedding)

    def slope(log_inverse: float) -> float:
        inverse = math.exp(log_inverse)
        z = unembedding.transform(bare * inverse)
        steepness = bare * unembedding.scale
        if unembedding.softcap is not None:
            steepness.mul_(1.0 - (z / unembedding.softcap).square())
        return float(z.softmax(-1).sub_(p).mul_(steepness).sum(-1).double().mean())

    here, at_here, step = 0.0, slope(0.0), 0.5
    if not math.isfinite(at_here):
        return 1.0, False
    while at_here != 0.0 and abs(here) < _WIDEST:
        ahead = here - math.copysign(step, at_here)
        at_ahead = slope(ahead)
        if at_ahead * at_here <= 0.0:
            return math.exp(_root(slope, (here, at_here), (ahead, at_ahead))), True
        here, at_here, step = ahead, at_ahead, 2 * step
    if at_here == 0.0:
        return math.exp(here), True
    return (0.0, True) if at_here > 0.0 else (math.exp(here), False)


def _root(f: Callable[[float], float], one: tuple[float, float], two: tuple[float, float]) -> float:
    """Return where `f` changes sign between two points (regula falsi, Illinois rule)."""
    (a, f_a), (b, f_b) = one, two
    while abs(b - a) > _TOLERANCE and f_b != 0.0:
        c = b - f_b * (b - a) / (f_b - f_a)
        if not min(a, b) < c < max(a, b):
            c = (a + b) / 2
        f_c = f(c)
        if f_c * f_b < 0.0:
            a, f_a = b, f_b
        else:
            f_a /= 2
        if abs(c - b) <= _TOLERANCE / 4:
            return c
        b, f_b = c, f_c
    return b
