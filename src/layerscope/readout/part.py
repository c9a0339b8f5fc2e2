"""A few groups of a tile: which passes run over their logits, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._job, self._request, self._tile, self._z = job, job.request, tile, z
        # Where the head transforms its products, their cosines were taken before that.
        self._cosine = job.request.cosine and untransformed(job.unembedding)
        self._scratch_memory = scratch
        self._raw: dict[str, Tensor] = {"largest": largest}

    def sums(self, thresholds: Float[Tensor, "group row n_tok"] | None) -> dict[str, Tensor]:
        """Run the passes; return raw sums, for `own_rows` to sort out.

        Args:
            thresholds: logits of which the rank is wanted.
        """
        raw, n, z = self._raw, self._tile.n_out, self._z
        if thresholds is not None:
            scratch = self._scratch(EXPONENTIALS, n)
            for column, threshold in enumerate(thresholds.unbind(-1)):
                above = passes.count_above(z[:, :n], threshold, scratch=scratch)
                raw[f"token_above.{column}"] = above
        self._cap()
        if self._request.extremes:
            raw["least"] = z.amin(-1)
        if self._cosine and partners(self._tile):
            raw["norm"] = torch.linalg.vector_norm(z, dim=-1)
        exponentials = self._scratch(EXPONENTIALS, z.shape[1])
        raw["total"], raw["shift"] = passes.exponentiate(z, raw["largest"], out=exponentials)
        if self._tile.paired:
            self._compare_against(exponentials)
        if self._tile.reference is not None:
            self._compare_reference(exponentials, self._tile.reference)
        elif self._request.needs_entropy:
            raw["mean"] = z[:, :n].mul_(exponentials[:, :n]).sum(-1)
        return raw

    def _cap(self) -> None:
        """Apply the head's softcap; what is ranked has been ranked, and given logits have it."""
        if self._job.unembedding.softcap is None:
            return
        given = self._job.given_logits is not None
        slots = slice(0, self._tile.reference if given else None)
        for values in (self._z[:, slots], self._raw["largest"][:, slots]):
            self._job.unembedding.cap(values, unit=BITS)

    def _scratch(self, which: int, n_slots: int) -> Float[Tensor, "group slot vocab"]:
        shape = (self._z.shape[0], n_slots, self._z.shape[2])
        return self._scratch_memory[which, : shape[0] * shape[1] * shape[2]].view(shape)

    def _compare_against(self, exponentials: Float[Tensor, "group slot vocab"]) -> None:
        n, total = self._tile.n_out, self._raw["total"]
        partner = slice(n, 2 * n)
        theirs, p = self._z[:, partner], exponentials[:, partner]
        if self._request.js:
            products = torch.mul(theirs, p, out=self._scratch(DIFFERENCE, n))
            self._raw["against.mean"] = products.sum(-1)
        sums = passes.compare(
            self._z[:, :n],
            exponentials[:, :n],
            total[:, :n],
            Others.of(theirs, p, total[:, partner]),
            request=self._request,
            difference=self._scratch(DIFFERENCE, n),
            mixture=self._scratch(MIXTURE, n),
        )
        self._raw.update({f"against.{name}": value for name, value in sums.items()})

    def _compare_reference(
        self, exponentials: Float[Tensor, "group slot vocab"], slot: int
    ) -> None:
        raw, total = self._raw, self._raw["total"]
        partner = slice(slot, slot + 1)
        others = Others.of(self._z[:, partner], exponentials[:, partner], total[:, partner])
        if self._request.needs_entropy:
            raw["reference_mean"] = others.mean_of_z(exponentials)
        # This is the last use of both logits and exponentials, which give their memory.
        # The reference does not differ from itself: where it is one of the rows, it is left out.
        rows = slice(0, self._tile.n_out - int(self._tile.own_reference))
        sums = passes.compare(
            self._z[:, rows],
            exponentials[:, rows],
            total[:, rows],
            others,
            request=self._request,
            difference=self._z[:, rows],
            mixture=exponentials[:, rows],
        )
        raw.update({f"reference.{name}": value for name, value in sums.items()})


def own_rows(
    tile: Tile, parts: Sequence[dict[str, Tensor]]
) -> dict[str, Float[Tensor, "group row"]]:
    """Join the sums of a tile's parts; return those of the caller's rows and of their partners.

    Sums over a partner (another lens, the reference) carry its name: ``reference.total``. See
    `finish` for what becomes of them.
    """
    n = tile.n_out
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if "norm" in joined:
        joined["square"] = joined.pop("norm").square()
    means = joined.pop("reference_mean", None)
    rows: dict[str, Tensor] = {}
    for partner, slots in partners(tile).items():
        rows[f"{partner}.finite"] = joined.pop(f"{partner}.finite").expand(-1, n)
        for name in ("total", "shift", "square"):
            if name in joined:
                rows[f"{partner}.{name}"] = joined[name][:, slots].expand(-1, n)
    for name, value in joined.items():
        if value.shape[1] < n:  # without the reference, which does not differ from itself
            rows[name] = torch.nn.functional.pad(value, (0, n - value.shape[1]))
        else:
            rows[name] = value[:, :n]
    if means is not None and tile.reference is not None:
        rows["mean"] = rows["reference.p_difference"] + means[:, :n]
        rows["reference.mean"] = means[:, tile.reference, None].expand(-1, n)
    return rows
