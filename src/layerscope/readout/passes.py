"""The passes over logits: what must touch every entry, and nothing else.

Everything here works on float32 logits *in bits* (natural logits times log2 e), a few groups of
rows at a time so that every pass after the first finds its data in the cache. Only raw sums come
out; `finish` turns those of all rows into statistics at once, in float64. Bits rather than nats
because ``exp2`` and ``log2`` are several times faster on CPUs than ``exp`` and ``log``.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.readout.request import Request

# 2**z of a logit within +-this is as accurate as that of a shifted one, and its sums cannot
# overflow; rows whose largest logit lies outside are shifted by it.
_EXP2_RANGE = 60.0
_TINY = torch.finfo(torch.float32).tiny


def exponentiate(
    z: Float[Tensor, "group slot vocab"],
    largest: Float[Tensor, "group slot"],
    *,
    out: Float[Tensor, "group slot vocab"],
) -> tuple[Float[Tensor, "group slot"], Float[Tensor, "group slot"]]:
    """Write ``2 ** (z - shift)`` to `out`; return its sums and the shifts."""
    # Reading a value back would stall an accelerator, where one more pass is cheap.
    if z.device.type == "cpu" and float(largest.abs().amax()) <= _EXP2_RANGE:  # False for NaN
        return torch.exp2(z, out=out).sum(-1), torch.zeros_like(largest)
    shift = torch.where(largest.abs() > _EXP2_RANGE, largest, torch.zeros_like(largest))
    torch.exp2(torch.sub(z, shift[..., None], out=out), out=out)
    return out.sum(-1), shift


def count_above(
    z: Float[Tensor, "group row vocab"],
    threshold: Float[Tensor, "group row"],
    *,
    scratch: Float[Tensor, "group row vocab"],
) -> Float[Tensor, "group row"]:
    """Count the logits strictly above a threshold (exact: a count is far below 2 ** 24)."""
    return torch.gt(z, threshold[..., None], out=scratch).sum(-1)


@dataclass(frozen=True)
class Others:
    """Copies of the rows that others are compared with: one per group, or one per row.

    Attributes:
        both: normalised probabilities (the smallest normal number stands in for 0, below
            logarithms), then logits in bits.
        finite: 1 where the logits were finite, else 0. Logits that were not are replaced by 0, so
            that what is compared with them keeps its own sums.
    """

    both: Float[Tensor, "group twice_other vocab"]
    finite: Float[Tensor, "group other"]

    @staticmethod
    def of(
        z: Float[Tensor, "group other vocab"],
        exponentials: Float[Tensor, "group other vocab"],
        total: Float[Tensor, "group other"],
    ) -> Others:
        """Copy what the passes would overwrite, and normalise it."""
        n = z.shape[1]
        both = torch.cat((exponentials, z), dim=1)
        q = both[:, :n]
        q.div_(total[..., None]).clamp_min_(_TINY)
        # A sum that is finite saves a closer look.
        if z.device.type == "cpu" and math.isfinite(float(z.sum())):
            return Others(both, torch.ones_like(total))
        # 0 times anything finite is 0; times NaN or infinity it is NaN.
        finite = (z * 0.0).sum(-1) == 0.0
        both.masked_fill_(~finite.repeat(1, 2)[..., None], 0.0)
        return Others(both, finite.float())

    @property
    def q(self) -> Float[Tensor, "group other vocab"]:
        """Normalised probabilities."""
        return self.both[:, : self.both.shape[1] // 2]

    @property
    def z(self) -> Float[Tensor, "group other vocab"]:
        """Logits in bits."""
        return self.both[:, self.both.shape[1] // 2 :]

    def project(
        self, rows: Float[Tensor, "group row vocab"]
    ) -> tuple[Float[Tensor, "group row"], Float[Tensor, "group row"]]:
        """Return the inner products of rows with q and with z."""
        if self.both.shape[1] == 2:  # one pass over the rows serves both
            products = torch.bmm(self.both, rows.transpose(1, 2))
            return products[:, 0], products[:, 1]
        return torch.linalg.vecdot(rows, self.q), torch.linalg.vecdot(rows, self.z)

    def mean_of_z(self, p: Float[Tensor, "group row vocab"]) -> Float[Tensor, "group row"]:
        """Return the inner products of (unnormalised) probabilities with z."""
        if self.both.shape[1] == 2:
            return torch.bmm(self.z, p.transpose(1, 2))[:, 0]
        return torch.linalg.vecdot(p, self.z)


def compare(
    z: Float[Tensor, "group row vocab"],
    p: Float[Tensor, "group row vocab"],
    total: Float[Tensor, "group row"],
    others: Others,
    *,
    request: Request,
    difference: Float[Tensor, "group row vocab"],
    mixture: Float[Tensor, "group row vocab"],
) -> dict[str, Float[Tensor, "group row"]]:
    """Sum what the divergences of rows from other rows need.

    Args:
        z: logits of the rows (bits).
        p: their unnormalised exponentials.
        total: the sums of those.
        others: the rows they are compared with.
        request: which divergences.
        difference: scratch; may be `z` itself, which is then overwritten.
        mixture: scratch; may be `p` itself, which is then overwritten.

    Returns:
        ``p_difference`` sum of p (z - z'); ``q_difference`` sum of q (z - z');
        ``other_difference`` sum of z' (z - z'); ``mixture`` sum of m log2 m with m = p / total + q;
        ``overlap`` sum of min(m, 2 q); ``finite`` of the others.
    """
    sums: dict[str, Tensor] = {"finite": others.finite}
    torch.sub(z, others.z, out=difference)
    if request.kl_from_reference or request.cosine:
        sums["q_difference"], sums["other_difference"] = others.project(difference)
    if request.kl_to_reference or request.needs_entropy:
        sums["p_difference"] = difference.mul_(p).sum(-1)
    if not (request.js or request.l1):
        return sums
    torch.addcmul(others.q, p, total.reciprocal()[..., None], out=mixture)
    if request.js:
        log2(mixture, out=difference)
        sums["mixture"] = difference.mul_(mixture).sum(-1)
    if request.l1:
        sums["overlap"] = torch.minimum(mixture, others.q * 2.0, out=mixture).sum(-1)
    return sums


def log2(x: Tensor, *, out: Tensor) -> Tensor:
    """Write the base-2 logarithm of a positive tensor to `out`."""
    if x.device.type == "cpu" and _numpy_is_faster():
        np.log2(x.numpy(), out=out.numpy())
        return out
    return torch.log2(x, out=out)


@functools.lru_cache(maxsize=1)
def _numpy_is_faster() -> bool:
    """Return True where numpy's float32 log2 is vectorised (Linux with AVX-512).

    One thread of it then takes less than half the time of two threads of torch's.
    """
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"
