"""The slow, obvious readout: float64, one row at a time, textbook formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerscope.readout import Unembedding


def slow_logits(hidden: Tensor, head: Unembedding) -> Tensor:
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z


def slow_row(z: Tensor, *, k: int) -> dict[str, Any]:
    """Statistics of one row of float64 logits."""
    log_p = torch.log_softmax(z, dim=-1)
    order = sorted(range(len(z)), key=lambda token: (-float(z[token]), token))[:k]
    return {
        "logsumexp": float(torch.logsumexp(z, dim=-1)),
        "entropy_bits": float(-(log_p.exp() * log_p).sum() / math.log(2)),
        "top_ids": order,
        "top_log2p": [float(log_p[token]) / math.log(2) for token in order],
        "top1_top2_gap": float(z[order[0]] - z[order[1]]),
        "max_abs_logit": float(z.abs().max()),
        "min_log2p": float(log_p.min()) / math.log(2),
    }


def slow_divergences(z: Tensor, other: Tensor) -> dict[str, float]:
    """KL both ways, JS (bits) and L1 of two rows of float64 logits."""
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(other, -1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    js = 0.5 * (p * (log_p - log_m)).sum() + 0.5 * (q * (log_q - log_m)).sum()
    return {
        "kl_to_bits": float((p * (log_p - log_q)).sum()) / math.log(2),
        "kl_from_bits": float((q * (log_q - log_p)).sum()) / math.log(2),
        "js_bits": float(js) / math.log(2),
        "l1": float((p - q).abs().sum()),
    }


def slow_cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.double(), right.double()
    return float(left @ right / (left.norm() * right.norm()))


def slow_rank(z: Tensor, token: int) -> int:
    return 1 + int((z > z[token]).sum())
