"""Lenses with tensors made by hand: the identity, and small random changes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerscope.lenses import save_lens
from layerscope.lenses.fitted import FITTED, FittedLens
from layerscope.models import LanguageModel

KINDS = ("temperature", "bias", "tuned", "prism", "jacobian")


def identity_tensors(kind: str, model: LanguageModel) -> dict[str, torch.Tensor]:
    """Return tensors with which a lens is the norm lens."""
    n, d = model.n_layers, model.d_model
    return {
        "temperature": {"inverse_temperature": torch.ones(n)},
        "bias": {"bias": torch.zeros(n, d)},
        "tuned": {"bias": torch.zeros(n, d), "weight": torch.zeros(n, d, d)},
        "prism": {
            "mean_in": torch.zeros(d),
            "mean_out": torch.zeros(d),
            "whiten": torch.ones(d),
            "rotation": torch.eye(d),
            "colour": torch.ones(d),
            "gain": torch.ones(1),
        },
        "jacobian": {"jacobian": torch.eye(d).expand(n, d, d).contiguous()},
    }[kind]


def made(kind: str, model: LanguageModel, *, noise: float = 0.0, norm: str = "final") -> FittedLens:
    """Return a lens that differs from the norm lens by noise."""
    generator = torch.Generator().manual_seed(len(kind))
    tensors = {
        name: tensor + noise * torch.randn(tensor.shape, generator=generator)
        for name, tensor in identity_tensors(kind, model).items()
    }
    return FITTED[kind](model, tensors, norm=norm)


def stored(
    kind: str,
    model: LanguageModel,
    folder: Path,
    *,
    noise: float = 0.0,
    norm: str = "final",
    beside: tuple[str, ...] = (),
    details: Mapping[str, Any] | None = None,
) -> Path:
    """Store such a lens, and baselines beside it, as a fit would."""
    others = {name: made(name, model, noise=noise, norm=norm) for name in beside}
    lens = made(kind, model, noise=noise, norm=norm)
    return save_lens(lens, folder, model, others=others, details=details)
