"""Affine translators as tensors: where they start, and what they make of residuals."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerscope.lenses.base import NormChoice
from layerscope.lenses.fitting.options import TunedOptions
from layerscope.lenses.fitting.states import States
from layerscope.models.language_model import LanguageModel

# "weight" or "down" and "up", "bias" in units of the row's scale, "log_inverse" of temperatures;
# every tensor begins with a layer axis.
Parameters = dict[str, Tensor]

_RIDGE = 1e-3  # of the mean variance


def scales_of(residual: Float[Tensor, "layer row d_model"]) -> Float[Tensor, " layer"]:
    """Return the root mean square of the residuals of each row index, in float32."""
    return residual.float().square().mean((1, 2)).sqrt().clamp_min(1e-8)


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
    scales: Float[Tensor, " layer"],
    norm: NormChoice,
) -> Float[Tensor, "layer row d_model"]:
    """Return what the lens hands to the head for all row indices but the last; differentiable."""
    dtype = residual.dtype
    x = residual[: model.n_layers].float()
    moved = x + (parameters["bias"] * scales[:, None])[:, None]
    if "weight" in parameters:
        moved = moved + x @ parameters["weight"].transpose(1, 2)
    elif "down" in parameters:
        moved = moved + x @ parameters["down"] @ parameters["up"]
    hidden = torch.stack(
        [model.norm_at(row, norm)[1](moved[row].to(dtype)).float() for row in range(model.n_layers)]
    )
    if "log_inverse" in parameters:
        hidden = hidden * parameters["log_inverse"].exp()[:, None, None]
    return hidden


@torch.no_grad()
def regressed(
    batches: Iterable[States], scales: Float[Tensor, " layer"], like: Parameters
) -> Parameters:
    """Return translators that send each row's residual to the last one's, by ridge regression.

    Low-rank factors get the best part of that map (Eckart and Young); a direction that it leaves
    empty stays as it was in `like`.
    """
    xs: Tensor | float = 0.0
    ys: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    xy: Tensor | float = 0.0
    count = 0
    for states in batches:
        x = states.residual[:-1].double()
        y = states.residual[-1].double()[None] - x  # what is to be added
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
    started["bias"] = (bias / scales.double()[:, None]).float()
    return started


def choose(first: Bool[Tensor, " layer"], yes: Parameters, no: Parameters) -> Parameters:
    """Return, for every row index, the parameters of `yes` where `first` holds, else of `no`."""
    return {
        name: torch.where(first.view(-1, *[1] * (tensor.ndim - 1)), tensor, no[name])
        for name, tensor in yes.items()
    }
