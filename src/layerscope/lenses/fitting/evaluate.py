"""Held-out divergence of lenses from the model's own prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from layerscope.lenses.base import Lens
from layerscope.lenses.fitting.states import States
from layerscope.models.language_model import LanguageModel
from layerscope.readout import Reference, Request, readout

DEPTHS = (0.25, 0.5, 0.75)
_POSITIONS_AT_ONCE = 128  # more gain nothing, and their tiles would outgrow the fit's own
_ONLY_KL = Request(
    entropy=False,
    top_k=0,
    gap=False,
    kl_to_reference=False,
    kl_from_reference=True,
    js=False,
    l1=False,
    cosine=False,
    extremes=False,
)


def kl_bits(
    model: LanguageModel, lens: Lens, states: States, *, budget_bytes: int = 64 * 2**20
) -> list[float]:
    """Return KL(model || lens) in bits for every row index, averaged over the states.

    All row indices of a few positions at a time go through the streaming readout, beside the
    model's own prediction there, which is formed once.
    """
    total = torch.zeros(model.n_layers + 1, dtype=torch.float64)
    n_rows = states.head.shape[0]
    for first in range(0, n_rows, _POSITIONS_AT_ONCE):
        rows = slice(first, first + _POSITIONS_AT_ONCE)
        hidden = [lens.transform(states.residual[k, rows], k) for k in range(model.n_layers + 1)]
        head = states.head[rows]
        result = readout(
            torch.cat(hidden),
            model.unembedding,
            request=_ONLY_KL,
            reference=Reference(index=torch.arange(len(head)).repeat(len(hidden)), hidden=head),
            products="default",
            budget_bytes=budget_bytes,
        )
        assert result.reference is not None and result.reference.kl_from_bits is not None
        total += result.reference.kl_from_bits.double().view(len(hidden), -1).sum(1).cpu()
    return (total / n_rows).tolist()


def depth_rows(n_layers: int) -> dict[str, int]:
    """Return the row index at 25, 50 and 75% depth (halves to the even row)."""
    return {f"{depth:.0%}": round(n_layers * depth) for depth in DEPTHS}


def judge(
    name: str, table: Mapping[str, list[float]], baselines: tuple[str, ...], n_layers: int
) -> dict[str, Any]:
    """Say whether a lens beats its baselines at 25, 50 and 75% depth.

    Returns:
        ``improves``, the figures at each depth, and ``failures``: one line for each depth and
        baseline that it does not beat. The last row, where all lenses are the model (75% of one
        block), is left out.
    """
    at: dict[str, dict[str, float]] = {}
    failures: list[str] = []
    for depth, row in depth_rows(n_layers).items():
        names = [known for known in (name, *baselines) if known in table]
        at[depth] = {known: table[known][row] for known in names}
        failures += [
            f"{name} does not improve on {baseline} at {depth} depth (row {row}): "
            f"{at[depth][name]:.3f} against {at[depth][baseline]:.3f} bits"
            for baseline in names[1:]
            if row < n_layers and not at[depth][name] < at[depth][baseline]
        ]
    return {"improves": not failures, "at": at, "failures": failures}
