"""Affine translators as tensors: where they start, and what they make of residuals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.loss import ROWS_AT_ONCE
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.states import States, normed
from layerscope.models.language_model import LanguageModel

# "weight" or "down" and "up" in the coordinates of a basis, "bias" in units of its scale,
# "log_inverse" of temperatures; every tensor begins with a layer axis.
Parameters = dict[str, Tensor]

_RIDGE = 1e-3  # of the mean variance


@dataclass(frozen=True, eq=False)
class Basis:
    """The coordinates that translators are trained in: of residuals, less their mean, in own axes.

    Adam divides every entry of a gradient by its own size, so what it does depends on the axes.
    Along the principal ones of its inputs no entry is dominated by a direction that all share: the
    input's half of SOAP (Vyas et al., 2024), with axes that stay, as the inputs here do.

    Attributes:
        scale: [layer] root mean square of the residuals.
        mean: [layer, d_model] of the residuals.
        axes: [layer, d_model, d_model] orthonormal columns, by growing variance.
    """

    scale: Float[Tensor, " layer"]
    mean: Float[Tensor, "layer d_model"]
    axes: Float[Tensor, "layer d_model d_model"]

    def coordinates(
        self, residual: Float[Tensor, "layer row d_model"]
    ) -> Float[Tensor, "layer row d_model"]:
        """Return residuals in this basis, in their own dtype."""
        mean, axes = self.mean.to(residual.dtype), self.axes.to(residual.dtype)
        return (residual - mean[:, None]) @ axes

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {"scale": self.scale, "mean": self.mean, "axes": self.axes}


def basis_of(residual: Float[Tensor, "layer row d_model"]) -> Basis:
    """Return the basis of the residuals of each row index, in float32.

    Row indices that are not finite keep the axes of the model.
    """
    scales: list[Tensor] = []
    means: list[Tensor] = []
    axes: list[Tensor] = []
    for one in residual:  # one at a time: no second copy of all of them
        x = one.float()
        mean = x.mean(0)
        centred = x - mean
        covariance = centred.T @ centred / len(x)
        if bool(torch.isfinite(covariance).all()):
            axes.append(torch.linalg.eigh(covariance).eigenvectors)
        else:
            mean = torch.zeros_like(mean)
            axes.append(torch.eye(len(mean), device=mean.device))
        scales.append(x.square().mean().sqrt().clamp_min(1e-8))
        means.append(mean)
    return Basis(torch.stack(scales), torch.stack(means), torch.stack(axes).contiguous())


def in_residuals(parameters: Parameters, basis: Basis) -> dict[str, Tensor]:
    """Return the same translators for residuals as they are: a lens's tensors, float32, on CPU."""
    found = {name: tensor.detach().cpu() for name, tensor in parameters.items()}
    scale, mean, axes = (tensor.cpu().double() for tensor in basis.tensors().values())
    bias, mean = found["bias"].double() * scale[:, None], mean[:, None]
    if "weight" in found:
        weight = found["weight"].double() @ axes.mT
        bias = bias - (mean @ weight.mT)[:, 0]
        found["weight"] = weight.float()
    elif "down" in found:
        down = axes @ found["down"].double()
        bias = bias - (mean @ down @ found["up"].double())[:, 0]
        found["down"] = down.float()
    found["bias"] = bias.float()
    if "log_inverse" in found:
        found["inverse_temperature"] = found.pop("log_inverse").exp()
    return found


def at_identity(n_layers: int, d_model: int, options: TunedOptions, *, seed: int) -> Parameters:
    """Return translators that change nothing.

    One of the two low-rank factors is random: were both zero, each would get a zero gradient from
    the other, and neither would ever move (Hu et al., 2021, section 4.1, has the rule).
    """
    parameters: Parameters = {"bias": torch.zeros(n_layers, d_model)}
    if options.rank is None:
        parameters["weight"] = torch.zeros(n_layers, d_model, d_model)
    else:
        generator = torch.Generator().manual_seed(seed)
        shape = (n_layers, d_model, options.rank)
        parameters["down"] = torch.randn(shape, generator=generator) / d_model**0.5
        parameters["up"] = torch.zeros(n_layers, options.rank, d_model)
    if options.temperature:
        parameters["log_inverse"] = torch.zeros(n_layers)
    return parameters


def hidden_of(
    model: LanguageModel,
    residual: Float[Tensor, "layer row d_model"],
    parameters: Parameters,
    basis: Basis,
    norm: NormChoice,
) -> Float[Tensor, "layer row d_model"]:
    """Return what the lens hands to the head for all row indices but the last; differentiable."""
    dtype = residual.dtype
    x = residual[: model.n_layers].float()
    moved = x + (parameters["bias"] * basis.scale[:, None])[:, None]
    if "weight" in parameters:
        moved = torch.baddbmm(moved, basis.coordinates(x), parameters["weight"].mT)
    elif "down" in parameters:
        moved = torch.baddbmm(moved, basis.coordinates(x) @ parameters["down"], parameters["up"])
    hidden = normed(model, moved.to(dtype), norm)
    if "log_inverse" in parameters:
        hidden = hidden * parameters["log_inverse"].exp()[:, None, None]
    return hidden


@torch.no_grad()
def regressed(batches: Iterable[States], basis: Basis, like: Parameters) -> Parameters:
    """Return translators that send each row's residual to the last one's, by ridge regression.

    Low-rank factors get the best part of that map (Eckart and Young); a direction that it leaves
    empty stays as it was in `like`.
    """
    xs: Tensor | float = 0.0
    ys: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    xy: Tensor | float = 0.0
    count = 0
    pieces = (part for states in batches for part in states.residual.split(ROWS_AT_ONCE, dim=1))
    for residual in pieces:
        x = residual[:-1].double()
        y = residual[-1].double()[None] - x  # what is to be added
        x = basis.coordinates(x)
        xs, ys = xs + x.sum(1), ys + y.sum(1)
        xx, xy = xx + x.transpose(1, 2) @ x, xy + x.transpose(1, 2) @ y
        count += x.shape[1]
    assert isinstance(xs, Tensor) and isinstance(ys, Tensor)
    assert isinstance(xx, Tensor) and isinstance(xy, Tensor)
    mean_x, mean_y = xs / count, ys / count
    cov = xx / count - mean_x[:, :, None] * mean_x[:, None]
    cross = xy / count - mean_x[:, :, None] * mean_y[:, None]
    ridge = _RIDGE * cov.diagonal(dim1=1, dim2=2).mean(1)
    cov.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    # One layer at a time: a batched LU hangs in torch 2.13 with MKL and more than one thread.
    factors = [torch.linalg.cholesky(one) for one in cov]
    map_ = torch.stack(  # rows: y = x @ map_
        [torch.cholesky_solve(one, factor) for one, factor in zip(cross, factors, strict=True)]
    )
    started = {name: tensor.clone() for name, tensor in like.items()}
    if "weight" in started:
        started["weight"] = map_.transpose(1, 2).float().contiguous()
    else:
        rank = started["down"].shape[-1]
        u, s, vt = torch.linalg.svd(map_)
        root = s[:, :rank].sqrt()
        started["down"] = (u[:, :, :rank] * root[:, None]).float().contiguous()
        started["up"] = (root[:, :, None] * vt[:, :rank]).float().contiguous()
        map_ = started["down"].double() @ started["up"].double()
    bias = mean_y - (mean_x[:, None] @ map_)[:, 0]
    started["bias"] = (bias / basis.scale.double()[:, None]).float()
    return started


def choose(first: Bool[Tensor, " layer"], yes: Parameters, no: Parameters) -> Parameters:
    """Return, for every row index, the parameters of `yes` where `first` holds, else of `no`."""
    return {
        name: torch.where(first.view(-1, *[1] * (tensor.ndim - 1)), tensor, no[name])
        for name, tensor in yes.items()
    }
