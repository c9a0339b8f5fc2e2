"""What ablations put in place: statistics of reference prompts, made when they are first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.experiments.patching.questions import leading
from layerscope.interventions.patching import batch_of
from layerscope.interventions.patching.ablations import Ablation, Reference
from layerscope.models import LanguageModel, Site, TokenBatch

PER_PASS = 16
BY_POSITION: tuple[Ablation, ...] = ("position_mean", "resample")


@dataclass(frozen=True, eq=False)
class References:
    """Reference prompts of a run, as ids.

    The BOS counts in no mean: it is the same everywhere, and its norm would dominate.
    """

    model: LanguageModel
    sites: tuple[Site, ...]
    ids: tuple[tuple[int, ...], ...]

    @cached_property
    def overall(self) -> Reference:
        """Mean and standard deviation of every site over all tokens but the BOS."""
        sums: dict[Site, Tensor] = {}
        squares: dict[Site, Tensor] = {}
        count = 0
        for first in range(0, len(self.ids), PER_PASS):
            rows = self.ids[first : first + PER_PASS]
            result = self.model.run(TokenBatch.from_ids(rows), capture=self.sites, logits=None)
            real = result.batch.attention_mask.clone()
            for at, ids in enumerate(rows):
                real[at, : leading(self.model, ids)] = False
            count += int(real.sum())
            for site in self.sites:
                tokens = result[site][real.to(result[site].device)].double()
                sums[site] = sums.get(site, 0) + tokens.sum(dim=0)
                squares[site] = squares.get(site, 0) + (tokens**2).sum(dim=0)
        mean = {site: sums[site] / count for site in self.sites}
        spread = {
            site: (squares[site] / count - mean[site] ** 2).clamp(min=0).sqrt()
            for site in self.sites
        }
        wide = torch.promote_types(self.model.dtype, torch.float32)
        return Reference(
            {},
            {site: value.to(wide) for site, value in mean.items()},
            {site: value.to(wide) for site, value in spread.items()},
        )

    def others(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the reference prompts of the same length that are not the prompt itself."""
        return [row for row in self.ids if len(row) == len(ids) and row != tuple(ids)]

    def for_prompt(self, ids: Sequence[int], how: Ablation, seed: int) -> Reference:
        """Return what one prompt's ablation takes its values from."""
        if how not in BY_POSITION:
            return self.overall
        others = self.others(ids)
        if how == "resample":
            others = [others[draw_of(seed, ids, len(others))]]
        totals: dict[Site, Tensor] = {}
        for first in range(0, len(others), PER_PASS):
            rows = others[first : first + PER_PASS]
            result = self.model.run(batch_of(rows), capture=self.sites, logits=None)
            for site in self.sites:
                totals[site] = totals.get(site, 0) + result[site].double().sum(dim=0)
        # One row that already is the mean (or the one prompt drawn).
        wide = torch.promote_types(self.model.dtype, torch.float32)
        values: dict[Site, Float[Tensor, "1 pos ..."]] = {
            site: (total / len(others)).to(wide)[None] for site, total in totals.items()
        }
        none = {site: torch.zeros(0, dtype=wide) for site in self.sites}
        return Reference(values, none, none)


def draw_of(seed: int, ids: Sequence[int], count: int) -> int:
    """Return a number below `count` that depends on the seed and the prompt alone."""
    text = repr((seed, tuple(ids))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") % count
