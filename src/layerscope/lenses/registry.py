"""Lenses by name."""

from __future__ import annotations

from layerscope.errors import LensError, nearest
from layerscope.lenses.base import Lens, NormChoice, NormSource, check_norm_choice
from layerscope.lenses.norm import NormLens
from layerscope.lenses.raw import RawLens

LENS_NAMES: tuple[str, ...] = ("raw", "norm")


def get_lens(name: str, model: NormSource, *, norm: NormChoice = "final") -> Lens:
    """Return the lens called `name` for `model`.

    Args:
        name: one of LENS_NAMES.
        model: a LanguageModel, or anything with `n_layers` and `norm_at`.
        norm: which norm a normalising lens uses; checked, and without effect, for "raw".

    Raises:
        LensError: unknown lens or norm choice; names the nearest.
    """
    check_norm_choice(norm)
    if name == "raw":
        return RawLens(model)
    if name == "norm":
        return NormLens(model, choice=norm)
    raise LensError(
        f"unknown lens {name!r}{nearest(name, LENS_NAMES)}; there are {', '.join(LENS_NAMES)}"
    )
