"""One tile of logits: the product, the head's transforms, and what is looked up in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerscope.products import ProductChoice, openmp
from layerscope.products import products as product_scope
from layerscope.products.choice import MATRIX_UNITS
from layerscope.readout.job import BITS, Job, take
from layerscope.readout.plan import Budget, Tile
from layerscope.readout.unembedding import untransformed
from layerscope.readout.workers import Workers

# Products of few rows with a wide matrix miss the fast routines of MKL; narrow ones find them.
_FEW_ROWS = 32
_NARROW = 512
_MANY_ROWS = 96  # from which on the matrix units are worth their while
_SHARES = 4  # slices for each worker where they are shared out finely


def multiply(
    job: Job,
    vectors: Float[Tensor, "slots d_model"],
    *,
    out: Float[Tensor, "slots vocab"],
    budget: Budget,
    converted: Sequence[Float[Tensor, "slice d_model"]] | None,
    products: ProductChoice,
    workers: Workers,
    dots: ModuleType | None,
) -> None:
    """Write the bare products, in bits, one slice of the vocabulary for each worker at a time.

    Low-precision weights are converted to float32 slice by slice, in each worker's `converted`.
    The compiled product of few rows, where it is given, takes the place of torch's; it needs
    rows of weights whose entries lie side by side. So does that of the matrix units.
    """
    weight = job.unembedding.weight.detach()
    in_bits = vectors * BITS
    if dots is not None and weight.stride(1) == 1 and converted is None and openmp.available():
        dots.multiply(in_bits.numpy(), weight.numpy(), out.numpy(), threads=workers.threads)
        return
    size = budget.slice
    if dots is not None:  # which is worth sharing out finely: one that starts late then does less
        size = min(size, -(-len(weight) // (_SHARES * budget.workers)))
    slices = [slice(first, first + size) for first in range(0, len(weight), size)]
    left = iter(slices)
    apart, in_line = None, weight.stride(1) == 1 or converted is not None
    dots = dots if in_line else None
    if (
        in_line
        and dots is None
        and products.precision == MATRIX_UNITS
        and len(vectors) >= _MANY_ROWS
    ):
        from layerscope.products import matrix_units

        apart = matrix_units.Slices(in_bits, weight)

    def work(_share: int, worker: int) -> None:
        for tokens in left:  # whoever is free takes the next
            part = weight[tokens]
            if converted is not None:
                part = converted[worker][: len(part)].copy_(part)
            if dots is not None:
                dots.multiply(in_bits.numpy(), part.numpy(), out[:, tokens].numpy())
            elif apart is not None:
                apart.multiply(part, out[:, tokens])
            else:
                _multiply(in_bits, part, out=out[:, tokens])

    at_once = min(budget.workers, len(slices))
    of_ours = dots is not None or apart is not None
    with nullcontext() if of_ours else product_scope(products):
        workers.map(work, range(at_once), at_once=at_once)


def _multiply(
    vectors: Float[Tensor, "slots d_model"],
    weight: Float[Tensor, "slice d_model"],
    *,
    out: Float[Tensor, "slots slice"],
) -> None:
    step = _NARROW if len(vectors) <= _FEW_ROWS else len(weight)
    for first in range(0, len(weight), step):
        narrow = slice(first, first + step)
        torch.mm(vectors, weight[narrow].T, out=out[:, narrow])


def partners(tile: Tile) -> dict[str, slice]:
    """Return the slots with which a tile's rows are compared, by name."""
    found: dict[str, slice] = {}
    if tile.paired:
        found["against"] = slice(tile.n_out, 2 * tile.n_out)
    if tile.reference is not None:
        found["reference"] = slice(tile.reference, tile.reference + 1)
    return found


def to_logits(
    job: Job, tile: Tile, slots: Int[Tensor, "group slot"], z: Float[Tensor, "group slot vocab"]
) -> dict[str, Tensor]:
    """Turn bare products into logits before the softcap, in place; given logits are as they are.

    Returns:
        Where the head transforms its products, the sums [group, row] behind cosines of the bare
        ones: ``square``, and ``square`` and ``dot`` of every partner. Otherwise nothing: the
        cosines can be had later.
    """
    if untransformed(job.unembedding):
        _take_given_logits(job, tile, slots, z)
        return {}
    raw = _cosine_sums(job, tile, z) if job.request.cosine else {}
    job.unembedding.shift(z, unit=BITS)
    _take_given_logits(job, tile, slots, z)
    return raw


def _cosine_sums(job: Job, tile: Tile, z: Tensor) -> dict[str, Tensor]:
    n = tile.n_out
    squares = torch.linalg.vector_norm(z, dim=-1).square()
    raw = {"square": squares[:, :n]}
    for name, partner in partners(tile).items():
        if name == "reference" and job.given_logits is not None:
            continue  # logits that were given cannot be undone to bare products
        raw[f"{name}.square"] = squares[:, partner].expand(-1, n)
        raw[f"{name}.dot"] = torch.linalg.vecdot(z[:, :n], z[:, partner])
    return raw


def _take_given_logits(job: Job, tile: Tile, slots: Tensor, z: Tensor) -> None:
    given, slot = job.given_logits, tile.reference
    if given is not None and slot is not None:
        torch.mul(take(given, slots[:, slot] - job.n_rows, like=z), BITS, out=z[:, slot])


def look_up(
    job: Job, own: Int[Tensor, "group row"], z: Float[Tensor, "group row vocab"]
) -> dict[str, Tensor]:
    """Return the logits of given tokens and sets, of the caller's rows."""
    raw: dict[str, Tensor] = {}
    if job.tokens is not None:
        raw["token_z"] = z.gather(-1, job.tokens.to(z.device)[own].clamp_min(0))
    if job.sets is not None:
        members = _members(job, own)
        raw["set_z"] = z.gather(-1, members.flatten(2)).view(members.shape)
    return raw


def most_likely(
    job: Job,
    tile: Tile,
    own: Int[Tensor, "group row"],
    likeliest: tuple[Float[Tensor, "group slot k"], Int[Tensor, "group slot k"]],
) -> dict[str, Tensor]:
    """Return the most likely tokens of the caller's rows, and which set members are among them.

    Args:
        job: the call.
        tile: which rows.
        own: the caller's rows.
        likeliest: logits and ids of the `job.n_likely` most likely tokens of every slot.
    """
    request, n = job.request, tile.n_out
    top_z, top_ids = likeliest
    raw = {"top_z": top_z[:, :n], "top_ids": top_ids[:, :n]}
    if request.overlap_k:
        if tile.paired:
            raw["against.top_ids"] = top_ids[:, n : 2 * n]
        if job.sets is not None:
            listed = raw["top_ids"][:, :, None, None, : request.overlap_k]
            raw["set_listed"] = (_members(job, own)[..., None] == listed).any(-1)
    return raw


def _members(job: Job, own: Int[Tensor, "group row"]) -> Int[Tensor, "group row n_sets longest"]:
    assert job.sets is not None
    which = job.sets.index.to(own.device)[own].clamp_min(0)
    return job.sets.ids.to(own.device)[which].clamp_min(0)
