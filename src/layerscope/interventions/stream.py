"""What each part of a model writes into the residual stream, and a norm held fixed.

The stream is a sum: embedding, then each block's attention (heads and a bias) and MLP. In families
with a norm behind attention, what a head writes is its share under the norm's scale in this very
run, so that heads and bias still sum to what enters the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import CapabilityError
from layerscope.models import Capture, Edit, LanguageModel, Site, Start
from layerscope.models.edits import Positions
from layerscope.models.identities import bound_of
from layerscope.models.prompts import PromptsLike

_PROBE = 64.0  # far above the epsilon of any norm, and exact in every dtype
# How far the ratio behind / before a norm may be from (gain of a column) x (scale of a row).
_RATIO_TOLERANCE = 0.02


@dataclass(frozen=True, order=True)
class Writer:
    """One part that writes into the stream.

    Attributes:
        layer: block, -1 for the embedding.
        kind: "embed", "head", "attn" (all heads and bias as one), "attn_bias" or "mlp".
        head: of a head.
    """

    layer: int
    kind: str
    head: int = 0

    def __str__(self) -> str:
        """Return ``embed``, ``attn.3.head.1``, ``attn.3``, ``attn.3.bias`` or ``mlp.3``."""
        if self.kind == "embed":
            return "embed"
        if self.kind == "head":
            return f"attn.{self.layer}.head.{self.head}"
        return {"attn": "attn.{}", "attn_bias": "attn.{}.bias", "mlp": "mlp.{}"}[self.kind].format(
            self.layer
        )


EMBED = Writer(-1, "embed")


def has_heads(model: LanguageModel, layer: int) -> bool:
    """Return True where a block's attention comes apart into heads."""
    sites = (Site("attn.out", layer), Site("attn.out", layer, 0))
    return all(model.backend.why_not(site) is None for site in sites)


def writers(model: LanguageModel, *, heads: bool = True) -> list[Writer]:
    """Return every part of a model that writes into the stream, in the order of the pass."""
    found = [EMBED]
    for layer in range(model.n_layers):
        if heads and has_heads(model, layer):
            found += [Writer(layer, "head", head) for head in range(model.n_heads)]
            found.append(Writer(layer, "attn_bias"))
        else:
            found.append(Writer(layer, "attn"))
        found.append(Writer(layer, "mlp"))
    return found


def sites_of(model: LanguageModel, layer: int, *, heads: bool = True) -> list[Site]:
    """Return the sites that a block's writings are read from."""
    sites = [Site("attn_out", layer), Site("mlp_out", layer)]
    if heads and has_heads(model, layer):
        sites.append(Site("attn.out", layer))
        sites += [Site("attn.out", layer, head) for head in range(model.n_heads)]
    return sites


def writings(
    model: LanguageModel,
    prompts: PromptsLike,
    *,
    heads: bool = True,
    positions: Positions | None = None,
    edits: Sequence[Edit] = (),
    start: Start | None = None,
) -> dict[Writer, Float[Tensor, "row pos d_model"]]:
    """Run once and return what every part writes into the stream.

    Raises:
        CapabilityError: heads were asked of a family whose attention ends in a norm that does not
            act on each coordinate by itself.
    """
    layers = range(model.n_layers)
    sites = [site for layer in layers for site in sites_of(model, layer, heads=heads)]
    first = Site("resid_pre", 0)
    result = model.run(
        prompts,
        capture=Capture([first, *sites], positions=positions),
        edits=edits,
        start=start,
        logits=None,
    )
    found = {EMBED: result[first]}
    for layer in layers:
        found |= block_writings(model, layer, result.activations, heads=heads)
    return found


def block_writings(
    model: LanguageModel, layer: int, values: object, *, heads: bool = True
) -> dict[Writer, Float[Tensor, "row pos d_model"]]:
    """Return what a block's parts write, from the captured `sites_of` it."""
    given: dict[Site, Tensor] = dict(values)  # type: ignore[call-overload]
    entering, mlp = given[Site("attn_out", layer)], given[Site("mlp_out", layer)]
    if not (heads and has_heads(model, layer)):
        return {Writer(layer, "attn"): entering, Writer(layer, "mlp"): mlp}
    whole = given[Site("attn.out", layer)]
    parts = [given[Site("attn.out", layer, head)] for head in range(model.n_heads)]
    factor = _factor(model, layer, whole, entering)
    if factor is not None:
        parts = [part * factor for part in parts]
    found = {Writer(layer, "head", head): part for head, part in enumerate(parts)}
    found[Writer(layer, "attn_bias")] = entering - torch.stack(parts).sum(0)
    found[Writer(layer, "mlp")] = mlp
    return found


def _factor(
    model: LanguageModel, layer: int, before: Tensor, behind: Tensor
) -> Float[Tensor, "row pos d_model"] | None:
    """Return what a norm or a scale behind attention multiplies by; None where there is none."""
    if torch.equal(before, behind):
        return None
    wide = torch.promote_types(before.dtype, torch.float32)
    x, y = before.to(wide).flatten(0, 1), behind.to(wide).flatten(0, 1)
    real = torch.isfinite(x).all(-1) & torch.isfinite(y).all(-1) & (x != 0).any(-1)
    ratio = torch.where(x == 0, torch.zeros_like(x), y / x)
    sizes = ratio[real].abs().clamp_min(torch.finfo(wide).tiny).log()
    rest = sizes - sizes.median(1, keepdim=True).values
    rest = rest - rest.median(0, keepdim=True).values
    if rest.numel() and float(rest.abs().median()) > _RATIO_TOLERANCE:
        raise CapabilityError(
            f"the norm behind attention in block {layer} of {model.name} mixes coordinates, so its "
            "heads cannot be told apart in the stream; use heads=False"
        )
    return ratio.view_as(before)


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm at given rows as a linear map: ``gain * (h - mean(h) if centred) * scale + bias``.

    Attributes:
        gain: [d_model]. bias: [d_model], zero where there is none.
        scale: [row], what each row was divided by, inverted (up to a constant in `gain`).
        centred: whether the mean over coordinates is taken away first.
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    scale: Float[Tensor, " row"]
    centred: bool

    def pull(self, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Return the directions that read before the norm what `directions` read behind it."""
        pulled = directions * self.gain
        if self.centred:
            pulled = pulled - pulled.mean(-1, keepdim=True)
        return pulled * self.scale[:, None]


def freeze_norm(
    norm: Callable[[Tensor], Tensor],
    rows: Float[Tensor, "row d_model"],
    normed: Float[Tensor, "row d_model"],
    dtype: torch.dtype,
    name: str = "the norm",
) -> FrozenNorm:
    """Find gain, bias and scale of a LayerNorm, an RMSNorm or no norm, by probing it.

    Args:
        norm: the real module.
        rows: what it read, in the model's dtype. normed: what it gave.
        dtype: the model's, which decides how exactly the two must agree.
        name: for the error.

    Raises:
        CapabilityError: it is none of these.
    """
    width = rows.shape[-1]
    signs = torch.ones(width, dtype=rows.dtype, device=rows.device)
    signs[1::2] = -1
    if width % 2:  # mean zero for an odd width as well
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0]).to(signs)
    with torch.no_grad():
        probes = torch.stack([signs, -signs, signs.abs().clamp_max(1.0)]) * _PROBE
        plus, minus, flat = norm(probes).detach().cpu().double()
    factor = signs.cpu().double() * _PROBE
    gain, bias = (plus - minus) / 2 / factor, (plus + minus) / 2
    centred = bool((flat - bias).abs().max() < 1e-3 * _PROBE * gain.abs().max())
    h, y = rows.detach().cpu().double(), normed.detach().cpu().double()
    reach = gain * (h - h.mean(-1, keepdim=True) if centred else h)
    scale = ((y - bias) * reach).sum(-1) / reach.square().sum(-1)
    error = (reach * scale[:, None] + bias - y).abs().max() / y.abs().max()
    if not float(error) <= 10 * bound_of(dtype):
        raise CapabilityError(
            f"{name} is neither a LayerNorm nor an RMSNorm (held fixed, it is off by "
            f"{float(error):.2g}), so logits cannot be split over what it reads"
        )
    return FrozenNorm(gain, bias, scale, centred)
