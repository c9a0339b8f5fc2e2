"""One temperature per row index: the minimum of a convex function, found without bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.loss import ROWS_AT_ONCE, kl_to_teacher, product
from layerscope.lenses.fitting.states import States, normed
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

    here, ahead, bracketed = _bracket(slope, hidden.shape[0], hidden.device)
    found = _zeros(slope, here, ahead, bracketed)
    # Falling all the way down: nothing but the limit is the minimum.
    endless = ~bracketed & (found <= -_WIDEST)
    best = torch.where(endless, torch.zeros_like(found), found.exp())
    known = torch.isfinite(best)
    best = torch.where(known, best, torch.ones_like(best))
    return TemperatureFit(best.float(), (known & (bracketed | endless)).tolist())


_Points = tuple[Tensor, Tensor]  # [layer] log 1/tau, and the slope there


def _bracket(
    slope: Callable[[Tensor], Tensor], n_layers: int, device: torch.device
) -> tuple[_Points, _Points, Bool[Tensor, " layer"]]:
    """Return two points of each layer between which the slope changes sign, and where it does.

    Where it never does, or is zero at once, both are the same point.
    """
    here = torch.zeros(n_layers, dtype=torch.float64, device=device)
    at_here = slope(here)
    ahead, at_ahead = here, at_here
    found = at_here == 0
    step = 0.5
    while not bool(found.all()) and float(here.abs().max()) < _WIDEST:
        tried = torch.where(found, ahead, here - torch.sign(at_here) * step)
        at_tried = slope(tried)
        passed = ~found & (torch.sign(at_tried) != torch.sign(at_here))
        found |= passed
        here, at_here = torch.where(found, here, tried), torch.where(found, at_here, at_tried)
        ahead = torch.where(passed | ~found, tried, ahead)
        at_ahead = torch.where(passed | ~found, at_tried, at_ahead)
        step *= 2
    return (here, at_here), (ahead, at_ahead), found


def _zeros(
    slope: Callable[[Tensor], Tensor],
    one: _Points,
    two: _Points,
    bracketed: Bool[Tensor, " layer"],
) -> Float[Tensor, " layer"]:
    """Return where the slopes change sign, for all layers at once (regula falsi, Illinois rule)."""
    (a, at_a), (b, at_b) = one, two
    wanted = bracketed & (at_b != 0)
    while bool(wanted.any()):
        # A little further than the secant's step, so that the other end comes near as well.
        way = (-at_b * (b - a) / (at_b - at_a)).abs().clamp_min(0.9 * _TOLERANCE)
        way = torch.where(way < (a - b).abs(), way, (a - b).abs() / 2)
        c = torch.where(wanted, b + torch.sign(a - b) * way, b)
        at_c = torch.where(wanted, slope(c), at_b)
        crossed = torch.sign(at_c) != torch.sign(at_b)
        a = torch.where(crossed, b, a)
        at_a = torch.where(crossed, at_b, torch.where(wanted, at_a / 2, at_a))
        b, at_b = c, at_c
        wanted &= ((b - a).abs() > _TOLERANCE) & (at_b != 0)
    return torch.where(at_b == 0, b, (a + b) / 2)


@torch.no_grad()
def normalised(
    model: LanguageModel, states: States, norm: NormChoice
) -> Float[Tensor, "layer row d_model"]:
    """Return the normalised residuals of every row index but the last, in float32."""
    return normed(model, states.residual[: model.n_layers], norm)


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
