"""A few groups of a tile: which passes run over their logits, and in which order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.readout import passes, ranking
from layerscope.readout.job import BITS, Job
from layerscope.readout.passes import Others
from layerscope.readout.plan import Tile
from layerscope.readout.unembedding import untransformed

EXPONENTIALS, FIRST, SECOND = 0, 1, 2  # what the scratch buffers are for


class Part:
    """Groups that are worked on together, small enough for their logits to stay in the cache.

    Args:
        job: the call.
        tile: the tile that the groups belong to.
        slots: [group, slot] their slots in the plan.
        z: [group, slot, vocab] bare products, in bits; overwritten.
        scratch: [buffer, any] two buffers, three with another lens, of at least z's size.
    """

    def __init__(
        self,
        job: Job,
        tile: Tile,
        slots: Int[Tensor, "group slot"],
        z: Float[Tensor, "group slot vocab"],
        scratch: Float[Tensor, "buffer any"],
    ) -> None:
        self._job, self._request, self._tile = job, job.request, tile
        self._slots, self._z, self._scratch_memory = slots, z, scratch
        self._n = tile.n_out
        # (name, slots) of what the caller's rows are compared with.
        self._partners: dict[str, slice] = {}
        if tile.paired:
            self._partners["against"] = slice(self._n, 2 * self._n)
        if tile.reference is not None:
            self._partners["reference"] = slice(tile.reference, tile.reference + 1)
        self._raw: dict[str, Tensor] = {}

    def sums(self) -> dict[str, Tensor]:
        """Run the passes; return raw sums of the caller's rows, [group, row] or [group, row, any].

        See `finish` for what becomes of them.
        """
        raw, n = self._raw, self._n
        self._to_logits()
        largest = self._rank()
        if self._request.extremes:
            raw["largest"], raw["least"] = largest[:, :n], self._z[:, :n].amin(-1)
        exponentials = self._scratch(EXPONENTIALS, self._z.shape[1])
        total, shift = passes.exponentiate(self._z, largest, out=exponentials)
        raw["total"], raw["shift"] = total[:, :n], shift[:, :n]
        for name, partner in self._partners.items():
            raw[f"{name}.total"] = total[:, partner].expand(-1, n)
            raw[f"{name}.shift"] = shift[:, partner].expand(-1, n)
        if self._tile.paired:
            self._compare_against(exponentials, total)
        if self._tile.reference is not None:
            self._compare_reference(exponentials, total)
        else:
            raw["mean"] = self._z[:, :n].mul_(exponentials[:, :n]).sum(-1)
        return raw

    def _scratch(self, which: int, n_slots: int) -> Float[Tensor, "group slot vocab"]:
        shape = (self._z.shape[0], n_slots, self._z.shape[2])
        return self._scratch_memory[which, : shape[0] * shape[1] * shape[2]].view(shape)

    def _to_logits(self) -> None:
        """Turn bare products into logits; cosines need the products, so they come before."""
        unembedding, n = self._job.unembedding, self._n
        bare = untransformed(unembedding)
        if bare:
            self._take_given_logits()
        if self._request.cosine and self._partners:
            squares = torch.linalg.vector_norm(self._z, dim=-1).square()
            self._raw["square"] = squares[:, :n]
            for name, partner in self._partners.items():
                if name == "reference" and not bare and self._job.given_logits is not None:
                    continue  # logits that were given cannot be undone to bare products
                self._raw[f"{name}.square"] = squares[:, partner].expand(-1, n)
                if not bare:
                    other = self._z[:, partner]
                    self._raw[f"{name}.dot"] = torch.linalg.vecdot(self._z[:, :n], other)
        if not bare:
            unembedding.transform(self._z, unit=BITS)
            self._take_given_logits()

    def _take_given_logits(self) -> None:
        given, slot = self._job.given_logits, self._tile.reference
        if given is not None and slot is not None:
            chosen = self._slots[:, slot] - self._job.n_rows
            torch.mul(given[chosen].to(self._z), BITS, out=self._z[:, slot])

    def _rank(self) -> Float[Tensor, "group slot"]:
        """Find the most likely tokens and the ranks of given ones; return the largest logits."""
        request, raw, z, n = self._request, self._raw, self._z, self._n
        k = min(max(request.top_k, request.overlap_k, 2 if request.gap else 0), z.shape[2])
        if k:
            top_z, top_ids = (
                part.unflatten(0, z.shape[:2]) for part in ranking.top_k(z.flatten(0, 1), k)
            )
            raw["top_z"], raw["top_ids"] = top_z[:, :n], top_ids[:, :n]
            if self._tile.paired and request.overlap_k:
                raw["against.top_ids"] = top_ids[:, n : 2 * n]
            largest = top_z[..., 0]
        else:
            largest = z.amax(-1)
        own = self._slots[:, :n]
        if self._job.tokens is not None:
            tokens = self._job.tokens.to(z.device)[own].clamp_min(0)
            raw["token_z"] = z[:, :n].gather(-1, tokens)
            raw["token_above"] = passes.counts(
                z[:, :n], raw["token_z"], scratch=self._scratch(FIRST, n)
            )
        if self._job.sets is not None:
            which = self._job.sets.index.to(z.device)[own].clamp_min(0)
            members = self._job.sets.ids.to(z.device)[which].clamp_min(0)
            raw["set_z"] = z[:, :n].gather(-1, members.flatten(2)).view(members.shape)
            if request.overlap_k:
                likeliest = raw["top_ids"][:, :, None, None, : request.overlap_k]
                raw["set_listed"] = (members[..., None] == likeliest).any(-1)
        return largest

    def _compare_against(
        self, exponentials: Float[Tensor, "group slot vocab"], total: Float[Tensor, "group slot"]
    ) -> None:
        n, raw, partner = self._n, self._raw, self._partners["against"]
        theirs, p = self._z[:, partner], exponentials[:, partner]
        raw["against.mean"] = torch.mul(theirs, p, out=self._scratch(SECOND, n)).sum(-1)
        sums = passes.compare(
            self._z[:, :n],
            exponentials[:, :n],
            total[:, :n],
            Others.of(theirs, p, total[:, partner]),
            request=self._request,
            difference=self._scratch(SECOND, n),
            mixture=self._scratch(FIRST, n),
        )
        self._keep("against", sums)

    def _compare_reference(
        self, exponentials: Float[Tensor, "group slot vocab"], total: Float[Tensor, "group slot"]
    ) -> None:
        n, raw, partner = self._n, self._raw, self._partners["reference"]
        others = Others.of(self._z[:, partner], exponentials[:, partner], total[:, partner])
        # The reference does not differ from itself: where it is one of the rows, it is left out.
        same = int(self._tile.own_reference)
        rows = slice(0, n - same)
        sums = passes.compare(
            self._z[:, rows],
            exponentials[:, rows],
            total[:, rows],
            others,
            request=self._request,
            difference=self._z[:, rows],
            mixture=self._scratch(FIRST, n - same),
        )
        if same:
            sums = {name: torch.nn.functional.pad(value, (0, 1)) for name, value in sums.items()}
        raw["reference.same"] = torch.zeros_like(sums["p_difference"], dtype=torch.bool)
        if same:
            raw["reference.same"][:, -1] = True
        means = others.mean_of_z(exponentials)
        raw["mean"] = sums["p_difference"] + means[:, :n]
        raw["reference.mean"] = means[:, partner].expand(-1, n)
        self._keep("reference", sums)

    def _keep(self, name: str, sums: dict[str, Tensor]) -> None:
        """Keep the sums of a comparison; on bare logits their cosine follows from `dot`."""
        dot = sums.pop("dot", None)
        if dot is not None and f"{name}.dot" not in self._raw and f"{name}.square" in self._raw:
            self._raw[f"{name}.dot"] = dot + self._raw[f"{name}.square"]
        self._raw.update({f"{name}.{key}": value for key, value in sums.items()})
