"""The norms that belong to a row, and what is known of their modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerscope.models import LanguageModel

READINGS = ("final", "next_norm", "same_norm")
Norm = Callable[[Tensor], Tensor]
_GAINS = ("weight", "w", "scale", "gamma")
_EPSILONS = ("eps", "variance_epsilon", "epsilon")


def norm_for(model: LanguageModel, reading: str, row: int) -> tuple[str, Norm] | None:
    """Return name and norm of a reading at a row, None where there is none of its own.

    `final` is the last norm, `next_norm` the input norm of the block that reads the row,
    `same_norm` the norm before the MLP of the block that wrote it. Where the final norm only stands
    in for `next_norm` (last row, families without input norms), there is no second reading.
    """
    name, norm = model.norm_at(row, "final")
    if reading == "final":
        return name, norm
    if reading == "next_norm":
        following, other = model.norm_at(row, "next_norm")
        return None if following == name else (following, other)
    named = mlp_norm(model, row - 1) if row > 0 else None
    if named is None:
        return None

    def apply(residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        parameter = next(named.module.parameters(), residual)
        return named.module(residual.to(parameter.device, parameter.dtype))

    return named.name, apply


def mlp_norm(model: LanguageModel, block: int) -> Any:
    """Return the named module before a block's MLP, None where there is none or it is not known."""
    if model.backend.name != "huggingface":
        return None
    structure: Any = getattr(model.backend, "structure", None)
    return None if structure is None else structure.blocks[block].mlp_norm


def why_absent(model: LanguageModel, reading: str) -> str | None:
    """Say why a reading exists at no row, None where it exists."""
    if any(norm_for(model, reading, row) for row in range(model.n_layers + 1)):
        return None
    if reading == "next_norm":
        return "the blocks of this family read the stream without a norm of their own"
    if model.backend.name != "huggingface":
        return f"the {model.backend.name} backend does not say which norm stands before the MLP"
    return "the blocks of this family have no norm of their own between attention and MLP"


@dataclass(frozen=True, eq=False)
class NormFacts:
    """What a norm's module says of itself.

    Attributes:
        kind: "layer_norm" (centres), "rms_norm", or None where its own parameters do not tell.
        eps: added to the variance or the mean square, inside the root.
        gain: [d_model] what the normalised vector is multiplied by, float64.
        bias: [d_model], or None.
    """

    module: str
    kind: str | None
    eps: float | None
    gain: Tensor | None
    bias: Tensor | None

    def formula(self, residual: Float[Tensor, "row d_model"]) -> Tensor:
        """Return what a norm of this kind gives, in float64."""
        assert self.kind is not None and self.eps is not None
        x = residual.double()
        if self.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        x = x if self.gain is None else x * self.gain
        return x if self.bias is None else x + self.bias


@torch.no_grad()
def facts_of(model: LanguageModel, name: str, norm: Norm) -> NormFacts:
    """Read a norm's module and see by what it does whether it centres and how it scales.

    A constant added to all coordinates changes nothing exactly where a norm centres. A gain that is
    stored as an offset from one (Gemma) is told by the norm of a vector of equal squares.
    """
    module = _module(model, name)
    d, device = model.d_model, model.unembedding.weight.device
    eps = next(
        (v for key in _EPSILONS if (v := _number(getattr(module, key, None))) is not None), None
    )
    # Coordinates of one size and alternating sign: mean 0 (for an even width) and mean square 1.
    signs = torch.ones(d, device=device)
    signs[1::2] = -1.0
    large = 1e3 * signs
    plus, minus = norm(large[None]).double()[0], norm(-large[None]).double()[0]
    effective, shift = (plus - minus) / 2, (plus + minus) / 2
    moved = norm((large + 500.0)[None]).double()[0]
    centres = bool((moved - plus).abs().max() <= 0.02 * plus.abs().max())
    bias = getattr(module, "bias", None) if module is not None else None
    gain = _gain(module, effective * signs)
    known = gain is not None or module is None or not list(module.parameters())
    return NormFacts(
        module=name,
        kind=("layer_norm" if centres else "rms_norm") if known and d % 2 == 0 else None,
        eps=eps if eps is not None else (0.0 if module is not None else None),
        gain=gain,
        bias=bias.detach().double() if isinstance(bias, Tensor) else _constant(shift),
    )


def _gain(module: nn.Module | None, effective: Tensor) -> Tensor | None:
    """Return the stored gain, as an offset from one where that is how the module applies it."""
    stored = next(
        (w for key in _GAINS if isinstance(w := getattr(module, key, None), Tensor)), None
    )
    if stored is None:
        return None
    weight = stored.detach().double()
    return min((weight, 1.0 + weight), key=lambda gain: float((gain - effective).abs().max()))


def _constant(shift: Tensor) -> Tensor | None:
    return shift if float(shift.abs().max()) > 1e-3 else None


def _module(model: LanguageModel, name: str) -> nn.Module | None:
    owner = getattr(model.backend, "model", None)
    if not isinstance(owner, nn.Module):
        return None
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) else None
