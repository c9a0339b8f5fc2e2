"""One temperature per row index: the minimum of a convex function, found without bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.loss import kl_to_teacher
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
        with torch.enable_grad():
            loss = kl_to_teacher(hidden * inverse[:, None, None], teacher, unembedding)
            (gradient,) = torch.autograd.grad(loss.sum(), inverse)
        return gradient.double()

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
