"""How well two ranked lists of tokens agree: overlap, and rank correlation with ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from layerscope.errors import TableError

PERSISTENCE = 0.9  # of rank-biased overlap: the first ten ranks carry 86% of the weight


def average_ranks(values: Float[np.ndarray, " item"]) -> Float[np.ndarray, " item"]:
    """Return ascending ranks from 1; items that tie share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2.0)[inverse]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rho: the correlation of the ranks, ties averaged.

    None for fewer than two items, or when all values of one side tie. Raises TableError when the
    sides differ in length.
    """
    a, b = _pair(first, second)
    if a.size < 2:
        return None
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length > 0.0 else None


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Kendall's tau-b: (concordant - discordant) / sqrt(untied pairs of a * of b).

    Kendall 1945. None and errors as for `spearman`. All pairs are formed: meant for top-k lists.
    """
    a, b = _pair(first, second)
    upper = np.triu_indices(a.size, 1)
    sign_a = np.sign(np.subtract.outer(a, a))[upper]
    sign_b = np.sign(np.subtract.outer(b, b))[upper]
    untied = float(np.sqrt(np.abs(sign_a).sum() * np.abs(sign_b).sum()))
    return float((sign_a * sign_b).sum()) / untied if untied > 0.0 else None


def jaccard(first: Sequence[int], second: Sequence[int]) -> float:
    """Return shared / united items of two sets; two empty sets agree (1)."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 1.0


def rank_biased_overlap(
    first: Sequence[int],
    second: Sequence[int],
    *,
    p: float = PERSISTENCE,
    first_scores: Sequence[float] | None = None,
    second_scores: Sequence[float] | None = None,
) -> float | None:
    """Return the extrapolated rank-biased overlap of two lists, most likely item first, in [0, 1].

    Webber, Moffat and Zobel 2010, equation 23, down to the length of the shorter list; what lies
    deeper is assumed to agree as much as what was seen. Items with equal scores tie: each stands at
    the ranks of its group in equal parts, which is the mean over all ways to break the ties (Corsi
    and Urbano 2024, variant a). None for an empty list. Raises TableError for a persistence outside
    (0, 1), repeated items, or scores that do not fit their list.
    """
    if not 0.0 < p < 1.0:
        raise TableError(f"the persistence is {p}; give a number between 0 and 1, e.g. 0.9")
    depth = min(len(first), len(second))
    if depth == 0:
        return None
    a, b = _presence(first, first_scores, depth), _presence(second, second_scores, depth)
    overlap = np.zeros(depth)
    for item in a.keys() & b.keys():
        overlap += a[item] * b[item]
    depths = np.arange(1, depth + 1)
    agreement = overlap / depths
    weighted = float((agreement * p**depths).sum())
    return float(agreement[-1] * p**depth + (1.0 - p) / p * weighted)


def _presence(
    items: Sequence[int], scores: Sequence[float] | None, depth: int
) -> dict[int, Float[np.ndarray, " depth"]]:
    """Return how far each item belongs to the first 1, 2, ..., depth items: in a tie, a part."""
    if len(set(items)) != len(items):
        raise TableError("a ranked list names an item twice; name each once")
    if scores is not None and len(scores) != len(items):
        raise TableError(f"{len(scores)} scores for {len(items)} items; give one per item")
    depths = np.arange(1, depth + 1)
    found: dict[int, Float[np.ndarray, " depth"]] = {}
    start = 0
    while start < len(items):
        stop = start + 1
        while scores is not None and stop < len(items) and scores[stop] == scores[start]:
            stop += 1
        share = np.clip((depths - start) / (stop - start), 0.0, 1.0)
        found |= dict.fromkeys(items[start:stop], share)
        start = stop
    return found


def union_ranks(
    first: Sequence[int], second: Sequence[int]
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    """Return the ranks of all items of two lists in either; a missing item stands after its end."""
    a = {item: float(rank) for rank, item in enumerate(first, 1)}
    b = {item: float(rank) for rank, item in enumerate(second, 1)}
    items = list(dict.fromkeys((*first, *second)))
    return (
        np.array([a.get(item, len(first) + 1.0) for item in items]),
        np.array([b.get(item, len(second) + 1.0) for item in items]),
    )


def list_agreement(
    first: Sequence[int],
    second: Sequence[int],
    *,
    ranks_in_second: Sequence[float] | None = None,
    ks: tuple[int, ...] = (10, 50),
) -> dict[str, Any]:
    """Return how two most-likely-first token lists agree.

    `jaccard@k` for every k; `rbo`; and `spearman_top50`, `kendall_top50`. With `ranks_in_second`
    (the rank that the other lens gives, in its whole vocabulary, to every token of `first`) the
    correlations are over the tokens of `first`, ranked anew among themselves, so that one token at
    rank 100000 counts no more than one at rank 100. Without it they are over the union of both
    lists, where a token that one list lacks ties for the rank after its end; lists that share
    little then correlate negatively by construction, so prefer the former.
    """
    top = max(ks)
    a, b = list(first[:top]), list(second[:top])
    if ranks_in_second is None:
        x, y = union_ranks(a, b)
    else:
        if len(ranks_in_second) < len(a):
            raise TableError(
                f"{len(ranks_in_second)} ranks for {len(a)} tokens; give one per token"
            )
        x = np.arange(1, len(a) + 1, dtype=float)
        y = np.array(ranks_in_second[: len(a)], dtype=float)
    return {
        **{f"jaccard@{k}": jaccard(a[:k], b[:k]) for k in ks},
        f"spearman_top{top}": spearman(x.tolist(), y.tolist()),
        f"kendall_top{top}": kendall_tau_b(x.tolist(), y.tolist()),
        "rbo": rank_biased_overlap(a, b),
    }


def _pair(
    first: Sequence[float], second: Sequence[float]
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape:
        raise TableError(f"cannot correlate {a.size} values with {b.size}; give one each per item")
    return a, b
