"""One edit for a batch whose rows change different features of one dictionary.

A patching experiment runs thousands of rows that differ in which feature has which value. Here each
row names its own, so that they share a batch, while the prompts of others stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import EditError
from layerscope.features.dictionary import SparseDictionary
from layerscope.features.edits import FeatureEdit
from layerscope.models.scopes import Scope


@dataclass(frozen=True)
class RowPatch:
    """What happens in one row of a batch.

    Attributes:
        row: of the batch.
        feature: whose value decides the size of the change: `value` minus what it has.
        value: that the feature would have.
        along: feature whose write direction the change takes; `feature` itself, or another one as
            a control.
    """

    row: int
    feature: int
    value: float
    along: int


@dataclass(frozen=True, eq=False)
class PatchRows(FeatureEdit):
    """Give every row its own feature and value; rows without one keep every bit.

    A change along another feature's write direction has the length that the feature's own change
    would have.
    """

    rows_of: Int[Tensor, " patch"]
    reads: Int[Tensor, " patch"]
    writes: Int[Tensor, " patch"]
    values: Float[Tensor, " patch"]
    factors: Float[Tensor, " patch"]

    def target(self, found: Float[Tensor, "row pos k"]) -> Float[Tensor, "row pos k"]:
        """Return the values of each row's feature, or the control's moved as far."""
        where, device = self.rows_of.to(found.device), found.device
        reads, writes = self.reads.to(device), self.writes.to(device)
        values = self.values.to(device, found.dtype)[:, None]
        factors = self.factors.to(device, found.dtype)[:, None]
        now = found[where, :, writes]
        moved = now + factors * (values - found[where, :, reads])
        wanted = found.clone()
        wanted[where, :, writes] = torch.where((reads == writes)[:, None], values, moved)
        return wanted


def patch_rows(
    dictionary: SparseDictionary,
    patches: Sequence[RowPatch],
    *,
    scope: Scope | str | None = None,
) -> PatchRows:
    """Return the edit that gives each named row its own feature and value.

    Args:
        dictionary: an autoencoder.
        patches: at most one per row.
        scope: which tokens, as in every edit.

    Raises:
        EditError: there is none, or a row has two, or a control has no length.
        DictionaryError: there is no such feature.
    """
    if not patches or len({each.row for each in patches}) != len(patches):
        raise EditError("patch_rows needs patches, at most one for each row")
    ids = sorted({i for each in patches for i in (each.feature, each.along)})
    for index in ids:
        dictionary.id(index)
    lengths = dictionary.decoders[0].rows(ids).double().norm(dim=-1)
    place = {index: at for at, index in enumerate(ids)}
    reads = torch.tensor([place[each.feature] for each in patches])
    writes = torch.tensor([place[each.along] for each in patches])
    lengths = lengths.cpu()
    if not bool((lengths[writes] > 0).all()):
        raise EditError("a control feature writes nothing: its write direction is zero")
    return PatchRows(
        dictionary.reads,
        scope=scope,
        dictionary=dictionary,
        features=tuple(ids),
        rows_of=torch.tensor([each.row for each in patches]),
        reads=reads,
        writes=writes,
        values=torch.tensor([each.value for each in patches], dtype=torch.float64),
        factors=lengths[reads] / lengths[writes],
    )
