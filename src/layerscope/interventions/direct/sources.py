"""Finer shares of a logit: by neuron, and by the position that a head moved it from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.interventions.direct.attribution import read_logits
from layerscope.models import LanguageModel, RunResult, Site, TokenBatch
from layerscope.models.identities import bound_of
from layerscope.models.prompts import PromptsLike

_Ids = Int[Tensor, " row"] | Sequence[int]


def neuron_attribution(
    model: LanguageModel,
    prompts: PromptsLike,
    answers: _Ids,
    foils: _Ids | None = None,
    *,
    position: int = -1,
) -> dict[str, Float[Tensor, "row neuron"]]:
    """Split every MLP's share of a logit over its neurons.

    Returns:
        ``mlp.L`` to [row, neuron] in logits, and ``mlp.L.bias`` to [row, 1].

    Raises:
        CapabilityError: the model has no neurons to look at, computes no gradients, or ends its
            MLP in a norm, so that what a neuron writes is not its own.
    """
    batch = model.tokenize(prompts)
    reading = read_logits(model, batch, answers, foils, position=position, heads=False)
    layers = range(model.n_layers)
    sites = [site for at in layers for site in (Site("mlp.post", at), Site("mlp_out", at))]
    result = model.run(batch, capture=sites, logits=None, gradients=True)
    columns = [batch.column(row, position) for row in range(len(batch))]
    found: dict[str, Tensor] = {}
    for layer in layers:
        post, out = result[Site("mlp.post", layer)], result[Site("mlp_out", layer)]
        pulled = _pull(post, out, reading.direction, columns)
        shares = _at(post, columns) * _at(pulled, columns)
        whole = (_at(out, columns) * reading.direction).sum(-1)
        found[f"mlp.{layer}"] = shares
        found[f"mlp.{layer}.bias"] = (whole - shares.sum(-1))[:, None]
    _check_linear(model, result, batch)
    return found


def source_attribution(
    model: LanguageModel,
    prompts: PromptsLike,
    answers: _Ids,
    foils: _Ids | None = None,
    *,
    position: int = -1,
) -> dict[str, Float[Tensor, "row head pos"]]:
    """Split every head's share of a logit over the positions that it looked at.

    Returns:
        ``attn.L`` to [row, head, pos] in logits, pos the columns of the padded batch; a head's
        shares sum to its share in `direct_logit_attribution`.

    Raises:
        CapabilityError: patterns, values or gradients are missing, or something lies between the
            heads' mixtures and their output projection (a gate, a norm).
    """
    batch = model.tokenize(prompts)
    reading = read_logits(model, batch, answers, foils, position=position)
    columns = [batch.column(row, position) for row in range(len(batch))]
    kinds = ("attn.pattern", "attn.v", "attn.z", "attn.out", "attn_out")
    sites = [Site(kind, layer) for layer in range(model.n_layers) for kind in kinds]
    result = model.run(batch, capture=sites, logits=None, gradients=True)
    found: dict[str, Tensor] = {}
    for layer in range(model.n_layers):
        z, out = result[Site("attn.z", layer)], result[Site("attn.out", layer)]
        direction = reading.direction * _ratio(out, result[Site("attn_out", layer)], columns)
        pulled = _at(_pull(z, out, direction, columns), columns)
        pattern = result[Site("attn.pattern", layer)].detach()
        looked = torch.stack([pattern[row, :, column] for row, column in enumerate(columns)])
        values = result[Site("attn.v", layer)].detach()
        values = values.repeat_interleave(pulled.shape[1] // values.shape[2], dim=2)
        if values.shape[-1] != pulled.shape[-1]:
            raise CapabilityError(f"heads of block {layer} are not mixtures of their values")
        reach = torch.einsum("rphd,rhd->rhp", values.cpu().double(), pulled)
        looked = looked.cpu().double()
        shares = torch.where(looked == 0, 0.0, looked * reach)
        whole = (_at(z, columns) * pulled).sum(-1)
        _check_mixture(model, layer, shares, whole)
        found[f"attn.{layer}"] = shares
    return found


def _pull(
    inside: Tensor, outside: Tensor, direction: Float[Tensor, "row d_model"], columns: Sequence[int]
) -> Tensor:
    """Return the gradient of ``outside · direction`` at one column, with respect to `inside`."""
    seed = torch.zeros_like(outside)
    for row, column in enumerate(columns):
        seed[row, column] = direction[row].to(seed)
    with torch.enable_grad():
        (pulled,) = torch.autograd.grad(outside, inside, seed, retain_graph=True)
    return pulled


def _at(values: Tensor, columns: Sequence[int]) -> Tensor:
    rows = [values[row, column] for row, column in enumerate(columns)]
    return torch.stack(rows).detach().cpu().double()


def _ratio(before: Tensor, behind: Tensor, columns: Sequence[int]) -> Tensor:
    x, y = _at(before, columns), _at(behind, columns)
    return torch.where(x == 0, torch.zeros_like(x), y / x)


def _check_linear(model: LanguageModel, result: RunResult, batch: TokenBatch) -> None:
    """Refuse where the neurons' outputs and a constant do not sum to the MLP's."""
    for layer in range(model.n_layers):
        post, out = result[Site("mlp.post", layer)], result[Site("mlp_out", layer)]
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(out.shape[-1], generator=generator).to(out)
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(out, post, probe.expand_as(out), retain_graph=True)
        rest = ((out * probe).sum(-1) - (post * pulled).sum(-1)).detach()
        rest = rest[batch.attention_mask.to(rest.device)].double()
        size = (out.detach() * probe).abs().sum(-1).double()[batch.attention_mask.to(rest.device)]
        spread = float((rest - rest.mean()).abs().max() / size.max().clamp_min(1e-300))
        constant = float(rest.mean().abs() / size.max().clamp_min(1e-300))
        alone = len(rest) == 1 and constant > 0
        if spread > 100 * bound_of(model.dtype) or (alone and constant > 0.1):
            raise CapabilityError(
                f"the MLP of block {layer} is not linear in its neurons (a norm follows them), so "
                "a neuron has no share of its own; use the MLP as a whole"
            )


def _check_mixture(
    model: LanguageModel, layer: int, shares: Tensor, whole: Float[Tensor, "row head"]
) -> None:
    error = float((shares.sum(-1) - whole).abs().max() / shares.abs().sum(-1).max().clamp_min(1e-9))
    if error > 100 * bound_of(model.dtype):
        raise CapabilityError(
            f"heads of block {layer} are not mixtures of their values (something lies between, off "
            f"by {error:.2g}), so their shares cannot be split by position"
        )
