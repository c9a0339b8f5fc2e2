"""The compiled passes of `kernels`, for jobs that are large enough to wait for them."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.products.hardware import has_matrix_units
from layerscope.readout.job import BITS, Job
from layerscope.readout.logits import partners
from layerscope.readout.plan import Tile
from layerscope.readout.unembedding import untransformed

Kernels = Literal["auto", "fused", "plain"]

# From this many logits on, "auto" means compiled passes: smaller jobs are done before these are
# loaded. It depends on nothing but the job, so that the same job gives the same bytes.
FROM_LOGITS = 1 << 24
# Few rows are what is read again and again: one position of all layers, after every change. The
# compiled product makes the most of them (torch's is as fast from about 90 rows on).
FEW_ROWS = 48
FROM_LOGITS_OF_FEW = 1 << 18
SCRATCH_ROWS = 3  # of logits, for each worker
_BLOCKS = 256


def load(kernels: Kernels, job: Job) -> ModuleType | None:
    """Return the compiled passes, or None for the plain ones.

    Raises:
        ConfigError: compiled passes are asked for by name, but cannot be had.
    """
    if kernels not in ("auto", "fused", "plain"):
        raise ConfigError(f"unknown kernels {kernels!r}; pass 'auto', 'fused' or 'plain'")
    enough = FROM_LOGITS_OF_FEW if job.n_unembedded <= FEW_ROWS else FROM_LOGITS
    large = job.n_rows * job.unembedding.d_vocab >= min(enough, FROM_LOGITS)
    if kernels == "plain" or (kernels == "auto" and not large):
        return None
    found = _compiled() if job.hidden.device.type == "cpu" else None
    if found is None and kernels == "fused":
        raise ConfigError(
            "kernels='fused' needs rows on the CPU and numba: pip install 'layerscope[fast]', "
            "or pass 'auto'"
        )
    return found


def load_dots(n_rows: int) -> ModuleType | None:
    """Return the compiled product if it suits so many rows; numba must be there."""
    if n_rows > FEW_ROWS:
        return None
    from layerscope.readout import dots

    return dots


def describe() -> dict[str, str | int | None]:
    """Return the rule behind "auto" for provenance: numba's version, if any, and from what size.

    Jobs of that size run their checked products on the matrix units of the CPU, if it has some.
    """
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {
        "numba": version,
        "from_logits": FROM_LOGITS,
        "few_rows": FEW_ROWS,
        "from_logits_of_few_rows": FROM_LOGITS_OF_FEW,
        "matrix_units": has_matrix_units(),
    }


@functools.lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    try:
        from layerscope.readout import kernels
    except (ImportError, OSError):  # no numba, or none that goes with this numpy
        return None
    return kernels


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: some rows of some groups.

    Attributes:
        groups: which groups of the tile.
        first: the first of their rows.
        last: the row behind them.
    """

    groups: slice
    first: int
    last: int

    def slots(self, tile: Tile) -> list[tuple[int, int]]:
        """Return the slots that nobody else sees to, from the first to behind the last."""
        n, end = tile.n_out, tile.slots.shape[1]
        if (self.first, self.last) == (0, n):
            return [(0, end)]
        found = [(self.first, self.last)]
        if tile.paired:
            found.append((n + self.first, n + self.last))
        if tile.reference is not None and not tile.own_reference and self.last == n:
            found.append((tile.reference, end))
        return found


class FusedTile:
    """The sums of one tile: workers fill them in part by part.

    Args:
        kernels: the compiled passes.
        job: the call.
        tile: which rows.
    """

    def __init__(self, kernels: ModuleType, job: Job, tile: Tile) -> None:
        self._kernels, self._job, self._tile = kernels, job, tile
        (n_groups, n_slots), n = tile.slots.shape, tile.n_out
        n_tok = 0 if job.tokens is None else job.tokens.shape[1]
        k, d_vocab = job.n_likely, job.unembedding.d_vocab
        self._moments = np.zeros((n_groups, n_slots, 6))
        self._compared = np.zeros((2, n_groups, n, 6))
        self._above = np.zeros((n_groups, n, n_tok), np.int64)
        self._top_z = np.zeros((n_groups, n_slots, k), np.float32)
        self._top_ids = np.zeros((n_groups, n_slots, k), np.int64)
        self._n_blocks = min(d_vocab, max(_BLOCKS, 4 * k))

    def pieces(self, parts: Sequence[slice], n_workers: int) -> list[Piece]:
        """Share the rows of every part out, so that there is something for every worker."""
        n, cuts = self._tile.n_out, -(-n_workers // len(parts))
        cuts = max(1, min(cuts, n))
        ends = [n * cut // cuts for cut in range(cuts + 1)]
        return [
            Piece(part, first, last) for part in parts for first, last in itertools.pairwise(ends)
        ]

    def rank(
        self,
        piece: Piece,
        z: Float[Tensor, "group slot vocab"],
        thresholds: Float[Tensor, "group row n_tok"] | None,
    ) -> None:
        """Do what depends on the order of logits, then apply the softcap, in place.

        Args:
            piece: which rows; their counterparts come with them, the reference with the last.
            z: logits of the piece's groups in bits, before the softcap.
            thresholds: logits of which the rank is wanted.
        """
        tile, groups = self._tile, piece.groups
        if thresholds is None:
            wanted = np.zeros((z.shape[0], tile.n_out, 0), np.float32)
        else:
            wanted = thresholds.contiguous().numpy()
        for first, last in piece.slots(tile):
            self._kernels.rank(
                z.numpy(),
                first,
                last,
                wanted,
                np.empty(self._n_blocks, np.float32),
                self._moments[groups],
                self._above[groups],
                self._top_z[groups],
                self._top_ids[groups],
            )
            self._cap(z, self._moments[groups], first, last)

    def compare(
        self, piece: Piece, z: Float[Tensor, "group slot vocab"], *, scratch: Tensor
    ) -> None:
        """Do what depends on probabilities, once everything that this needs has been ranked.

        Args:
            piece: which rows.
            z: logits of the piece's groups in bits, as `rank` leaves them.
            scratch: [SCRATCH_ROWS, vocab]
        """
        tile, request = self._tile, self._job.request
        self._kernels.compare(
            z.numpy(),
            piece.first,
            piece.last,
            tile.n_out,
            -1 if tile.reference is None else tile.reference,
            tile.paired,
            request.extremes,
            request.kl_to_reference or request.kl_from_reference or request.cosine,
            request.js or request.l1,
            scratch.numpy(),
            self._moments[piece.groups],
            self._compared[:, piece.groups],
        )

    def _cap(
        self, z: Float[Tensor, "group slot vocab"], moments: np.ndarray, first: int, last: int
    ) -> None:
        """Apply the head's softcap; what is ranked has been ranked, and given logits have it."""
        head = self._job.unembedding
        given = None if self._job.given_logits is None else self._tile.reference
        slots = slice(first, last if given is None else min(last, given))
        if head.softcap is None or slots.start >= slots.stop:
            return
        head.cap(z[:, slots], unit=BITS)
        head.cap(torch.from_numpy(moments[:, slots, self._kernels.LARGEST]), unit=BITS)

    def likeliest(
        self,
    ) -> tuple[Float[Tensor, "group slot k"], Int[Tensor, "group slot k"]]:
        """Return the most likely logits and ids of every slot."""
        return torch.from_numpy(self._top_z), torch.from_numpy(self._top_ids)

    def own_rows(self) -> dict[str, Float[Tensor, "group row"]]:
        """Return the sums of the caller's rows and of their partners, as `part.own_rows` does."""
        names, request, n = self._kernels, self._job.request, self._tile.n_out
        moments = torch.from_numpy(self._moments)
        wanted = {"shift": names.SHIFT, "total": names.TOTAL}
        if request.needs_entropy:
            wanted["mean"] = names.MEAN
        if request.cosine and untransformed(self._job.unembedding):
            wanted["square"] = names.SQUARE
        rows = {name: moments[:, :n, column] for name, column in wanted.items()}
        rows["largest"] = moments[:, :n, names.LARGEST]
        if request.extremes:
            rows["least"] = moments[:, :n, names.LEAST]
        for column in range(self._above.shape[2]):
            rows[f"token_above.{column}"] = torch.from_numpy(self._above[:, :, column])
        sums = {"finite": names.FINITE}
        if request.kl_to_reference or request.kl_from_reference or request.cosine:
            sums["p_difference"] = names.P_DIFFERENCE
            sums["q_difference"] = names.Q_DIFFERENCE
            sums["other_difference"] = names.OTHER_DIFFERENCE
        if request.js or request.l1:
            sums |= {"mixture": names.MIXTURE, "overlap": names.OVERLAP}
        for partner, slots in partners(self._tile).items():
            for name, column in wanted.items():
                rows[f"{partner}.{name}"] = moments[:, slots, column].expand(-1, n)
            compared = torch.from_numpy(self._compared[int(partner == "reference")])
            for name, column in sums.items():
                rows[f"{partner}.{name}"] = compared[:, :, column]
        return rows
