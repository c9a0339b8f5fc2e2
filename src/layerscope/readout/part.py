"""A few groups of a tile: which passes run over their logits, and in which order."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.readout import passes
from layerscope.readout.job import BITS, Job
from layerscope.readout.logits import partners
from layerscope.readout.passes import Others
from layerscope.readout.plan import Tile
from layerscope.readout.unembedding import untransformed

EXPONENTIALS, DIFFERENCE, MIXTURE = 0, 1, 2  # what the scratch buffers are for


class Part:
    """Groups that are worked on together, few enough for their logits to stay in the cache.

    Args:
        job: the call.
        tile: the tile that the groups belong to.
        z: [group, slot, vocab] logits in bits, before the softcap; overwritten.
        largest: [group, slot] the largest of each row.
        scratch: [buffer, any] one buffer, three with another lens, of at least z's size.
    """

    def __init__(
        self,
        job: Job,
        tile: Tile,
        z: Float[Tensor, "group slot vocab"],
        largest: Float[Tensor, "group slot"],
        *,
        scratch: Float[Tensor, "buffer any"],
    ) -> None:
        self._job, self._request = job, job.request
        self._tile, self._z, self._largest = tile, z, largest
        # Where the head transforms its products, their cosines were taken before that.
        self._cosine = job.request.cosine and untransformed(job.unembedding)
        self._scratch_memory = scratch
        self._partners = partners(tile)
        self._raw: dict[str, Tensor] = {}

    def sums(
        self, thresholds: Float[Tensor, "group row n_tok"] | None
    ) -> tuple[list[str], Float[Tensor, "sum group row"]]:
        """Run the passes; return raw sums of the caller's rows, and their names.

        See `finish` for what becomes of them.

        Args:
            thresholds: logits of which the rank is wanted.
        """
        raw, n = self._raw, self._tile.n_out
        z, mine = self._z, self._z[:, : self._tile.n_out]
        if thresholds is not None:
            scratch = self._scratch(EXPONENTIALS, n)
            for column, threshold in enumerate(thresholds.unbind(-1)):
                raw[f"token_above.{column}"] = passes.count_above(mine, threshold, scratch=scratch)
        self._cap()
        if self._request.extremes:
            raw["largest"], raw["least"] = self._largest[:, :n], mine.amin(-1)
        if self._cosine and self._partners:
            squares = torch.linalg.vector_norm(z, dim=-1).square()
            raw["square"] = squares[:, :n]
            for name, partner in self._partners.items():
                raw[f"{name}.square"] = squares[:, partner]
        exponentials = self._scratch(EXPONENTIALS, z.shape[1])
        total, shift = passes.exponentiate(z, self._largest, out=exponentials)
        raw["total"], raw["shift"] = total[:, :n], shift[:, :n]
        for name, partner in self._partners.items():
            raw[f"{name}.total"], raw[f"{name}.shift"] = total[:, partner], shift[:, partner]
        if self._tile.paired:
            self._compare_against(exponentials, total)
        if self._tile.reference is not None:
            self._compare_reference(exponentials, total)
        elif self._request.needs_entropy:
            raw["mean"] = mine.mul_(exponentials[:, :n]).sum(-1)
        shape = (z.shape[0], n)
        return list(raw), torch.stack([value.expand(shape) for value in raw.values()])

    def _cap(self) -> None:
        """Apply the head's softcap; what is ranked has been ranked, and given logits have it."""
        if self._job.unembedding.softcap is None:
            return
        given = self._job.given_logits is not None
        slots = slice(0, self._tile.reference if given else None)
        self._largest = self._largest.clone()
        for values in (self._z[:, slots], self._largest[:, slots]):
            self._job.unembedding.cap(values, unit=BITS)

    def _scratch(self, which: int, n_slots: int) -> Float[Tensor, "group slot vocab"]:
        shape = (self._z.shape[0], n_slots, self._z.shape[2])
        return self._scratch_memory[which, : shape[0] * shape[1] * shape[2]].view(shape)

    def _compare_against(
        self, exponentials: Float[Tensor, "group slot vocab"], total: Float[Tensor, "group slot"]
    ) -> None:
        n, partner = self._tile.n_out, self._partners["against"]
        theirs, p = self._z[:, partner], exponentials[:, partner]
        if self._request.js:
            products = torch.mul(theirs, p, out=self._scratch(DIFFERENCE, n))
            self._raw["against.mean"] = products.sum(-1)
        others = Others.of(theirs, p, total[:, partner])
        self._raw["against.finite"] = others.finite.float()
        sums = passes.compare(
            self._z[:, :n],
            exponentials[:, :n],
            total[:, :n],
            others,
            request=self._request,
            difference=self._scratch(DIFFERENCE, n),
            mixture=self._scratch(MIXTURE, n),
        )
        self._raw.update({f"against.{name}": value for name, value in sums.items()})

    def _compare_reference(
        self, exponentials: Float[Tensor, "group slot vocab"], total: Float[Tensor, "group slot"]
    ) -> None:
        n, raw, partner = self._tile.n_out, self._raw, self._partners["reference"]
        others = Others.of(self._z[:, partner], exponentials[:, partner], total[:, partner])
        raw["reference.finite"] = others.finite.float()
        means = others.mean_of_z(exponentials) if self._request.needs_entropy else None
        # This is the last use of both logits and exponentials, which give their memory.
        # The reference does not differ from itself: where it is one of the rows, it is left out.
        own = int(self._tile.own_reference)
        rows = slice(0, n - own)
        sums = passes.compare(
            self._z[:, rows],
            exponentials[:, rows],
            total[:, rows],
            others,
            request=self._request,
            difference=self._z[:, rows],
            mixture=exponentials[:, rows],
        )
        if not sums:
            return
        whole = torch.nn.functional.pad(torch.stack(list(sums.values())), (0, own)).unbind()
        raw.update({f"reference.{name}": value for name, value in zip(sums, whole, strict=True)})
        if means is not None:
            raw["mean"] = raw["reference.p_difference"] + means[:, :n]
            raw["reference.mean"] = means[:, partner]
