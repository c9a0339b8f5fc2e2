"""What to put in place of an activation: nothing, a mean, another prompt's value, or noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError, EditError, PromptError
from layerscope.interventions.patching.cells import Cell, Patch, site_of
from layerscope.interventions.patching.recording import Recording
from layerscope.models import LanguageModel, Site

Ablation = Literal["zero", "mean", "position_mean", "resample", "noise"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean", "position_mean", "resample", "noise")


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of sites over a data set, for means, noise and resampling.

    Attributes:
        values: by site, [prompt, pos, ...] of prompts of one length; None for those of several.
        mean: by site, over all tokens. std: by site, over all tokens.
    """

    values: dict[Site, Tensor]
    mean: dict[Site, Tensor]
    std: dict[Site, Tensor]


def reference_of(
    model: LanguageModel, ids: Sequence[Sequence[int]], sites: Sequence[str | Site]
) -> Reference:
    """Run a data set once and keep the statistics of sites.

    Prompts of one length keep their values by position, which `position_mean` and `resample` need.

    Raises:
        PromptError: there is no prompt.
    """
    if not ids:
        raise PromptError("a reference needs prompts to take means from; give at least one")
    chosen = [site_of(model, site) for site in sites]
    even = len({len(row) for row in ids}) == 1
    values: dict[Site, Tensor] = {}
    mean: dict[Site, Tensor] = {}
    std: dict[Site, Tensor] = {}
    result = model.run([list(row) for row in ids], capture=list(chosen), logits=None)
    real = result.batch.attention_mask.to(model.device)
    for site in chosen:
        found = result[site].movedim(site.pos_axis, 1)
        tokens = found[real].to(torch.promote_types(found.dtype, torch.float32))
        mean[site], std[site] = tokens.mean(dim=0), tokens.std(dim=0, unbiased=False)
        if even:
            values[site] = found
    return Reference(values, mean, std)


def ablation_cell(
    recording: Recording,
    site: Site,
    how: Ablation,
    *,
    columns: Sequence[int] | None = None,
    unit: int | None = None,
    reference: Reference | None = None,
    row: int = 0,
    other: int | None = None,
    factor: float = 1.0,
    seed: int = 0,
) -> Cell:
    """Return the cell that ablates a site, or one unit of it, in one row.

    Args:
        how: "zero"; "mean" over all tokens of the reference; "position_mean" over its prompts,
            position by position; "resample": the values of one of its prompts; "noise": the row's
            own value with Gaussian noise of `factor` times the standard deviation.
        columns: positions; None for all.
        other: which prompt to resample from; None draws one from `seed`.

    Raises:
        ConfigError: an unknown ablation, or one that needs a reference.
        EditError: the reference's prompts are not as long as the row, or lack the site.
    """
    if how not in ABLATIONS:
        raise ConfigError(f"ablation={how!r}; use {', '.join(ABLATIONS)}")
    places = list(range(recording.n_columns)) if columns is None else sorted(columns)
    if how == "zero":
        shape = (len(places), *recording.model.backend.trailing(site, recording.n_columns))
        value = torch.zeros(shape, dtype=recording.model.dtype, device=recording.model.device)
    else:
        if reference is None:
            raise ConfigError(f"the ablation '{how}' needs a reference; see reference_of")
        if site not in reference.mean:
            raise EditError(f"the reference does not hold '{site}'; name it in reference_of")
        value = _value(recording, site, how, places, reference, row, other, factor, seed)
    if unit is not None:
        value = value[:, unit]
    return Cell((Patch(site, tuple(places), value, unit),), row)


def _value(
    recording: Recording,
    site: Site,
    how: Ablation,
    places: list[int],
    reference: Reference,
    row: int,
    other: int | None,
    factor: float,
    seed: int,
) -> Float[Tensor, "pos ..."]:
    mean = reference.mean[site]
    if how == "mean":
        return mean.expand(len(places), *mean.shape)
    generator = torch.Generator().manual_seed(seed)
    if how == "noise":
        own = recording.value(site)[row, places]
        drawn = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        spread = reference.std[site]
        return own + factor * drawn.to(spread) * spread
    stored = reference.values.get(site)
    if stored is None or stored.shape[1] != recording.n_columns:
        raise EditError(
            f"the ablation '{how}' of '{site}' takes values position by position: its reference "
            f"needs prompts of {recording.n_columns} tokens"
        )
    if how == "position_mean":
        return stored[:, places].to(mean.dtype).mean(dim=0)
    if other is None:
        other = int(torch.randint(len(stored), (1,), generator=generator))
    return stored[other, places]


def back_patches(
    recording: Recording,
    *,
    columns: Sequence[int],
    row: int = 0,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
) -> tuple[list[tuple[int, int, int]], list[Cell]]:
    """Return cells that put a later block's residual into an earlier block of the same run.

    Biran et al., Hopping Too Late, 2024. Every (source, target, position) with source > target:
    what block `source` reads is put where block `target` reads, at the same position.

    Returns:
        The triples, and a cell for each.
    """
    layers = range(recording.model.n_layers)
    triples = [
        (source, target, column)
        for source in (layers if sources is None else sources)
        for target in (layers if targets is None else targets)
        for column in columns
        if source > target
    ]
    if not triples:
        raise ConfigError("back-patching needs a source layer above its target; give both")
    return triples, [
        Cell(
            (
                Patch(
                    Site("resid_pre", target),
                    (column,),
                    recording.residuals[source][row, column : column + 1],
                ),
            ),
            row,
        )
        for source, target, column in triples
    ]
