"""From raw sums to statistics: the last few operations per row, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerscope.readout import ranking
from layerscope.readout.job import BITS, Job
from layerscope.readout.result import Divergences, Readout

NATS = math.log(2.0)  # nats per bit

Raw = dict[str, Tensor]


def finish(raw: Raw, job: Job, *, kernels: str) -> Readout:
    """Build the Readout from the raw sums of all rows (logits in bits).

    Args:
        raw: CPU tensors in the caller's order: sums as `passes` and `part` name them.
        job: the call.
        kernels: which passes took them.
    """
    request = job.request
    logsumexp, entropy = _moments(raw, "")
    values: dict[str, Any] = {"logsumexp": logsumexp * NATS}
    broken = raw["broken"] | ~logsumexp.isfinite()
    if entropy is not None:
        broken |= ~entropy.isfinite()
        if request.entropy:
            values["entropy_bits"] = entropy.clamp_min(0.0)
    if request.extremes:
        largest, least = raw["largest"].double(), raw["least"].double()
        values["max_abs_logit"] = torch.maximum(largest.abs(), least.abs()) * NATS
        values["min_log2p"] = least - logsumexp
    values.update(_top(raw, logsumexp, job))
    values.update(_tokens(raw, logsumexp, job))
    values.update(_sets(raw, logsumexp, job))
    values = {name: _blank(name, value, broken) for name, value in values.items()}
    for group in ("reference", "against"):
        if f"{group}.total" in raw:
            theirs = _moments(raw, f"{group}.")
            if group == "reference" and request.entropy and theirs[1] is not None:
                known = (
                    theirs[1].clamp_min(0.0).masked_fill(raw["reference.finite"] != 1, torch.nan)
                )
                values["reference_entropy_bits"] = _float(known)
            values[group] = _divergences(raw, group, job, (logsumexp, entropy), theirs, broken)
    return Readout(nonfinite=broken, kernels=kernels, **values)


def _moments(raw: Raw, prefix: str) -> tuple[Tensor, Tensor | None]:
    """Return log-sum-exp and, where its sum was taken, entropy; both in bits, float64."""
    total = raw[f"{prefix}total"].double()
    logsumexp = raw[f"{prefix}shift"].double() + total.log2()
    if f"{prefix}mean" not in raw:
        return logsumexp, None
    return logsumexp, logsumexp - raw[f"{prefix}mean"].double() / total


def _capped(z: Tensor, job: Job) -> Tensor:
    """Return logits that were kept from before the head's softcap, in float64 and capped."""
    return job.unembedding.cap(z.double(), unit=BITS)


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _blank(name: str, value: Tensor, broken: Tensor) -> Tensor:
    """Blank the statistics of broken rows."""
    blank = torch.nan if value.is_floating_point() else (0 if name == "token_rank" else -1)
    return _float(value).masked_fill(broken.view(-1, *[1] * (value.ndim - 1)), blank)


def _top(raw: Raw, logsumexp: Tensor, job: Job) -> dict[str, Tensor]:
    if "top_z" not in raw:
        return {}
    request, z, ids = job.request, _capped(raw["top_z"], job), raw["top_ids"]
    values: dict[str, Tensor] = {}
    if request.top_k:
        values["top_ids"] = ids[:, : request.top_k]
        values["top_logits"] = z[:, : request.top_k] * NATS
        values["top_log2p"] = z[:, : request.top_k] - logsumexp[:, None]
    if request.gap and z.shape[1] > 1:
        values["top1_top2_gap"] = (z[:, 0] - z[:, 1]) * NATS
    if request.overlap_k:
        values["overlap_ids"] = ids[:, : request.overlap_k]
    return values


def _tokens(raw: Raw, logsumexp: Tensor, job: Job) -> dict[str, Tensor]:
    if job.tokens is None:
        return {}
    absent = job.tokens.cpu() < 0
    z = _capped(raw["token_z"], job)
    return {
        "token_logit": (z * NATS).masked_fill(absent, torch.nan),
        "token_log2p": (z - logsumexp[:, None]).masked_fill(absent, torch.nan),
        "token_rank": (_above(raw, absent) + 1).masked_fill(absent, 0),
        "cos_to_token": raw["cos_to_token"].masked_fill(absent, torch.nan),
    }


def _above(raw: Raw, absent: Tensor) -> Tensor:
    columns = [raw[f"token_above.{column}"] for column in range(absent.shape[1])]
    return torch.stack(columns, dim=1).long() if columns else absent.long()


def _sets(raw: Raw, logsumexp: Tensor, job: Job) -> dict[str, Tensor]:
    if job.sets is None:
        return {}
    which = job.sets.index.cpu()
    ids = job.sets.ids.cpu()[which.clamp_min(0)]  # [row, n_sets, longest]
    no_set = which < 0
    absent = (ids < 0) | no_set[..., None]
    p = torch.exp2(_capped(raw["set_z"], job) - logsumexp[:, None, None]).masked_fill_(absent, 0.0)
    cosine = raw["set_cos"].masked_fill(absent, -torch.inf).amax(-1)
    values = {
        "set_mass": p.sum(-1).masked_fill(no_set, torch.nan),
        "cos_to_set_max": cosine.masked_fill(absent.all(-1), torch.nan),
    }
    if "set_listed" in raw:
        values["set_topk_mass"] = (p * raw["set_listed"]).sum(-1).masked_fill(no_set, torch.nan)
    return values


def _is_own_reference(job: Job) -> Tensor | None:
    """Return which rows are compared with themselves."""
    if job.reference is None or job.n_references is not None:
        return None
    return job.reference.index.cpu() == torch.arange(job.n_rows)


def _divergences(
    raw: Raw,
    group: str,
    job: Job,
    mine: tuple[Tensor, Tensor | None],
    theirs: tuple[Tensor, Tensor | None],
    broken: Tensor,
) -> Divergences:
    """Compare rows with their partners: `mine` and `theirs` are their `_moments`."""
    request = job.request
    gap = mine[0] - theirs[0]
    same = _is_own_reference(job) if group == "reference" else None
    values: dict[str, Tensor] = {}
    if request.kl_to_reference:
        values["kl_to_bits"] = raw[f"{group}.p_difference"] / raw["total"].double() - gap
    if request.kl_from_reference:
        values["kl_from_bits"] = gap - raw[f"{group}.q_difference"].double()
    if request.js and mine[1] is not None and theirs[1] is not None:
        # With m = p + q, twice the mixture: H(m / 2) = 1 - sum(m log2 m) / 2.
        mixed = 1.0 - 0.5 * raw[f"{group}.mixture"].double()
        values["js_bits"] = (mixed - 0.5 * (mine[1] + theirs[1])).clamp_max(1.0)
    if request.l1:
        # |p - q| = m + 2 q - 2 min(m, 2 q), and m and 2 q each sum to 2.
        values["l1"] = (4.0 - 2.0 * raw[f"{group}.overlap"].double()).clamp_max(2.0)
    if same is not None:
        values = {name: value.masked_fill(same, 0.0) for name, value in values.items()}
    values = {name: value.clamp_min(0.0) for name, value in values.items()}
    if request.cosine and f"{group}.square" in raw:
        square, their_square = raw["square"].double(), raw[f"{group}.square"].double()
        if f"{group}.dot" in raw:
            dot = raw[f"{group}.dot"].double()
        else:  # z z' = z' (z - z') + z' z'
            dot = raw[f"{group}.other_difference"].double() + their_square
        values["cosine"] = (dot / (square * their_square).sqrt()).clamp(-1.0, 1.0)
    if f"{group}.top_ids" in raw:
        k = request.overlap_k
        mine_ids, their_ids = raw["top_ids"][:, :k], raw[f"{group}.top_ids"][:, :k]
        values["jaccard"] = ranking.jaccard(mine_ids, their_ids)
    apart = broken | ~theirs[0].isfinite() | (raw[f"{group}.finite"] != 1.0)
    return Divergences(
        **{name: _float(value.masked_fill(apart, torch.nan)) for name, value in values.items()}
    )
