"""The compiled passes of `kernels`, for jobs that are large enough to wait for them."""

from __future__ import annotations

import functools
import importlib.metadata
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.readout.job import BITS, Job
from layerscope.readout.logits import partners
from layerscope.readout.plan import Tile
from layerscope.readout.unembedding import untransformed

Kernels = Literal["auto", "fused", "plain"]

# From this many logits on, "auto" means compiled passes: smaller jobs are done before these are
# loaded. It depends on nothing but the job, so that the same job gives the same bytes.
FROM_LOGITS = 1 << 24
SCRATCH_ROWS = 3  # of logits, for each worker
_BLOCKS = 256


def load(kernels: Kernels, job: Job) -> ModuleType | None:
    """Return the compiled passes, or None for the plain ones.

    Raises:
        ConfigError: compiled passes are asked for by name, but cannot be had.
    """
    if kernels not in ("auto", "fused", "plain"):
        raise ConfigError(f"unknown kernels {kernels!r}; pass 'auto', 'fused' or 'plain'")
    large = job.n_rows * job.unembedding.d_vocab >= FROM_LOGITS
    if kernels == "plain" or (kernels == "auto" and not large):
        return None
    found = _compiled() if job.hidden.device.type == "cpu" else None
    if found is None and kernels == "fused":
        raise ConfigError(
            "kernels='fused' needs rows on the CPU and numba: pip install 'layerscope[fast]', "
            "or pass 'auto'"
        )
    return found


def describe() -> dict[str, str | int | None]:
    """Return the rule behind "auto" for provenance: numba's version, if any, and from what size."""
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"numba": version, "from_logits": FROM_LOGITS}


@functools.lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    try:
        from layerscope.readout import kernels
    except (ImportError, OSError):  # no numba, or none that goes with this numpy
        return None
    return kernels


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

    def work(
        self,
        part: slice,
        z: Float[Tensor, "group slot vocab"],
        thresholds: Float[Tensor, "group row n_tok"] | None,
        *,
        scratch: Float[Tensor, "buffer vocab"],
    ) -> None:
        """Run the passes over some groups.

        Args:
            part: which groups of the tile.
            z: their logits in bits, before the softcap, which is applied in place.
            thresholds: logits of which the rank is wanted.
            scratch: SCRATCH_ROWS rows.
        """
        tile, request = self._tile, self._job.request
        if thresholds is None:
            wanted = np.zeros((z.shape[0], tile.n_out, 0), np.float32)
        else:
            wanted = thresholds.contiguous().numpy()
        moments = self._moments[part]
        self._kernels.rank(
            z.numpy(),
            wanted,
            np.empty(self._n_blocks, np.float32),
            moments,
            self._above[part],
            self._top_z[part],
            self._top_ids[part],
        )
        self._cap(z, moments)
        self._kernels.compare(
            z.numpy(),
            tile.n_out,
            -1 if tile.reference is None else tile.reference,
            tile.paired,
            request.extremes,
            request.kl_to_reference or request.kl_from_reference or request.cosine,
            request.js or request.l1,
            scratch.numpy(),
            moments,
            self._compared[:, part],
        )

    def _cap(self, z: Float[Tensor, "group slot vocab"], moments: np.ndarray) -> None:
        """Apply the head's softcap; what is ranked has been ranked, and given logits have it."""
        head = self._job.unembedding
        if head.softcap is None:
            return
        slots = slice(0, self._tile.reference if self._job.given_logits is not None else None)
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
