"""Which tokens go with a feature: means, lift, PMI, and a test that knows where tokens come from.

Tokens of one prompt are no independent draws, so labels are shuffled within prompts only. Every
(feature, token) pair that could have been reported counts for the false discovery rate, reported or
not: of millions, no number of shuffles that can be drawn would tell one. So p is the tail of a
gamma distribution with the exact first three moments under shuffles (Pearson's type III; Mielke and
Berry, 2007), and what it finds promising is shuffled in truth. Log-odds with a Dirichlet prior
follow Monroe, Colaresi and Quinn (2008, "Fightin' Words").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from scipy.stats import pearson3

from layerscope.errors import ConfigError
from layerscope.features.shuffles import Shuffles

_STOP = 10  # permutations that reach the observed value, after which a pair is decided
_ENOUGH = 999  # permutations of which none reaches it, for the fitted tail to be believed
_CELLS = 1 << 24  # of the clusters x tokens table at a time

SCHEMA: dict[str, Any] = {
    "feature": pl.Int64(),
    "token_id": pl.Int64(),
    "n": pl.Int64(),
    "n_active": pl.Int64(),
    "mean": pl.Float64(),
    "shrunk_mean": pl.Float64(),
    "p_active": pl.Float64(),
    "lift": pl.Float64(),
    "pmi": pl.Float64(),
    "logodds_z": pl.Float64(),
    "z": pl.Float64(),
    "p": pl.Float64(),
    "permutations": pl.Int64(),
    "q": pl.Float64(),
    "p_hypergeometric": pl.Float64(),
    "q_hypergeometric": pl.Float64(),
}


@dataclass(frozen=True, eq=False)
class Activations:
    """Active entries of some features over the tokens of a corpus.

    Attributes:
        tokens: id of every token. clusters: index of its prompt, from 0, ascending.
        feature, place, value: of every active entry: which feature, at which token, how large.
        n_features: how many features were looked at, silent ones included.
    """

    tokens: Int[np.ndarray, " token"]
    clusters: Int[np.ndarray, " token"]
    feature: Int[np.ndarray, " entry"]
    place: Int[np.ndarray, " entry"]
    value: Float[np.ndarray, " entry"]
    n_features: int

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.clusters):
            raise ConfigError("every token needs the index of its prompt")
        if len(self.clusters) and (np.diff(self.clusters) < 0).any():
            raise ConfigError("tokens must stand prompt by prompt, in ascending order")
        if len(self.value) and float(self.value.min()) <= 0:
            raise ConfigError("active entries have values above zero")


@dataclass(frozen=True, kw_only=True)
class AssociationOptions:
    """What is reported and how it is tested.

    Attributes:
        min_count: occurrences that a token needs.
        min_joint: occurrences with the feature active that a pair needs to be reported.
        permutations: at most so many; fewer where every pair is decided earlier.
        fdr: level at which pairs are decided.
        prior: weight of the Dirichlet prior, in tokens.
        seed: of the shuffles.
    """

    min_count: int = 10
    min_joint: int = 5
    permutations: int = 10_000
    fdr: float = 0.05
    prior: float = 100.0
    seed: int = 0


def associate(
    found: Activations,
    options: AssociationOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """Return one row per feature and token that occur together often enough (see `SCHEMA`).

    ``mean`` is of all occurrences of the token, ``lift`` is P(active | token) / P(active), ``pmi``
    its base-2 logarithm. ``z`` compares the rank sum of the token's activations with its exact mean
    and variance under shuffles within prompts. ``p``, two-sided, comes from its exact skewness too;
    pairs whose q could be below 1 are shuffled ``permutations`` times, which may raise p, and lower
    it where none of them reached the observed sum. ``q`` is over all features times all tokens of
    `min_count`. The hypergeometric test ignores prompts and stands beside it for comparison.

    Args:
        found: activations and tokens. options: thresholds. progress: of the permutations.
    """
    options = options or AssociationOptions()
    n = len(found.tokens)
    types, label = np.unique(found.tokens, return_inverse=True)
    counts = np.bincount(label, minlength=len(types))
    tested = found.n_features * int((counts >= options.min_count).sum())
    if n == 0 or len(found.value) == 0 or tested == 0:
        return pl.DataFrame(schema=SCHEMA)
    excess = excess_ranks(found, n)
    key = found.feature * len(types) + label[found.place]
    pairs, entry_pair = np.unique(key, return_inverse=True)
    joint = np.bincount(entry_pair)
    sums = np.bincount(entry_pair, found.value)
    shrunk = _shrunken(found, pairs, sums, counts, n)
    kept = (joint >= options.min_joint) & (counts[pairs % len(types)] >= options.min_count)
    if not kept.any():
        return pl.DataFrame(schema=SCHEMA)
    observed = np.bincount(entry_pair, excess)[kept]
    pairs, joint, sums, shrunk = pairs[kept], joint[kept], sums[kept], shrunk[kept]
    feature, kind = pairs // len(types), pairs % len(types)
    mean, sd, skew = null_moments(found, excess, label, feature, kind)
    z = np.divide(observed - mean, sd, out=np.zeros_like(sd), where=sd > 0)
    shuffles = Shuffles(found, label, excess, pairs, len(types), options.seed)
    fitted = np.where(sd > 0, pearson_tail(z, skew), 1.0)
    p, tried = _permuted(shuffles, observed, mean, fitted, tested, options, progress)
    active = np.bincount(found.feature, minlength=found.n_features)[feature]
    n_token = counts[kind]
    share = joint / n_token
    lift = share / (active / n)
    exact = hypergeometric(joint, n, active, n_token)
    return pl.DataFrame(
        {
            "feature": feature,
            "token_id": types[kind],
            "n": n_token,
            "n_active": joint,
            "mean": sums / n_token,
            "shrunk_mean": shrunk,
            "p_active": share,
            "lift": lift,
            "pmi": np.log2(lift),
            "logodds_z": _log_odds(joint, n_token, active, n, options.prior),
            "z": z,
            "p": p,
            "permutations": tried,
            "q": bh_of(p, tested),
            "p_hypergeometric": exact,
            "q_hypergeometric": bh_of(exact, tested),
        },
        schema=SCHEMA,
    ).sort("feature", "p", "logodds_z", "token_id", descending=[False, False, True, False])


def bh_of(p: Float[np.ndarray, " row"], tests: int) -> Float[np.ndarray, " row"]:
    """Return q-values of the smallest p-values of `tests` tests, the others counted as p = 1."""
    order = np.argsort(p, kind="stable")
    scaled = p[order] * tests / np.arange(1, len(p) + 1)
    q = np.empty_like(p)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q


def hypergeometric(
    joint: Int[np.ndarray, " row"],
    n: int,
    active: Int[np.ndarray, " row"],
    n_token: Int[np.ndarray, " row"],
) -> Float[np.ndarray, " row"]:
    """Return P(X >= joint): active ones among `n_token` of n, where `active` of n are active."""
    k = joint.astype(np.float64)
    a, t = active.astype(np.float64), n_token.astype(np.float64)
    log = _log_choose(a, k) + _log_choose(n - a, t - k) - _log_choose(np.full_like(a, n), t)
    term = np.exp(log)
    total = term.copy()
    last = np.minimum(a, t)
    while True:
        # Each term from the one before it: C(a, k) C(n - a, t - k), k growing by one.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (a - k) * (t - k) / ((k + 1) * (n - a - t + k + 1))
        term = np.where(k < last, term * ratio, 0.0)
        k = k + 1
        total += term
        if not (term > 1e-17 * np.maximum(total, 1e-300)).any():
            return np.minimum(total, 1.0)


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    def log_factorial(x: np.ndarray) -> np.ndarray:
        return torch.lgamma(torch.from_numpy(x + 1.0)).numpy()

    return log_factorial(n) - log_factorial(k) - log_factorial(n - k)


def excess_ranks(found: Activations, n: int) -> Float[np.ndarray, " entry"]:
    """Return by how much every active entry's rank exceeds that of silence, ties sharing theirs."""
    excess = np.empty(len(found.value))
    order = np.argsort(found.feature, kind="stable")
    bounds = np.searchsorted(found.feature[order], np.arange(found.n_features + 1))
    for first, last in itertools.pairwise(bounds):
        part = order[first:last]
        if not len(part):
            continue
        _, which, tied = np.unique(found.value[part], return_inverse=True, return_counts=True)
        ends = np.cumsum(tied)
        silent = n - len(part)
        excess[part] = silent + (ends - (tied - 1) / 2)[which] - (silent + 1) / 2
    return excess


def _shrunken(
    found: Activations, pairs: np.ndarray, sums: np.ndarray, counts: np.ndarray, n: int
) -> Float[np.ndarray, " pair"]:
    """Return means of a token drawn towards the feature's mean as the spread of means asks for.

    Empirical Bayes with one variance within and one between tokens, by the method of moments.
    """
    feature, kind = pairs // len(counts), pairs % len(counts)
    size = counts[kind].astype(np.float64)
    width = found.n_features
    mean = np.bincount(found.feature, found.value, minlength=width) / n
    squares = np.bincount(found.feature, found.value**2, minlength=width)
    explained = np.bincount(feature, sums**2 / size, minlength=width)
    within = np.maximum(squares - explained, 0.0) / max(n - len(counts), 1)
    spread = explained - n * mean**2 - (len(counts) - 1) * within
    between = np.maximum(spread, 0.0) / max(n - float((counts**2.0).sum()) / n, 1e-12)
    noise = within[feature] / size
    total = between[feature] + noise
    weight = np.divide(between[feature], total, out=np.ones_like(total), where=total > 0)
    return mean[feature] + weight * (sums / size - mean[feature])


def _log_odds(
    joint: np.ndarray, n_token: np.ndarray, active: np.ndarray, n: int, prior: float
) -> Float[np.ndarray, " row"]:
    own = prior * n_token / n
    here, there = joint + own, n_token - joint + own
    rest_here, rest_there = active + prior - here, n - active + prior - there
    delta = np.log(here / rest_here) - np.log(there / rest_there)
    return delta / np.sqrt(1 / here + 1 / there)


def null_moments(
    found: Activations,
    excess: np.ndarray,
    label: np.ndarray,
    feature: np.ndarray,
    kind: np.ndarray,
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """Return mean, standard deviation and skewness of every pair's sum under shuffles in clusters.

    Labels of a cluster are drawn without replacement, so all are exact.
    """
    n_clusters = int(found.clusters[-1]) + 1
    size = np.bincount(found.clusters, minlength=n_clusters).astype(np.float64)
    cell = found.feature * n_clusters + found.clusters[found.place]
    shape = (found.n_features, n_clusters)
    held = np.maximum(size, 1)
    mean, second, third = (
        (np.bincount(cell, weights, minlength=math.prod(shape)).reshape(shape) / held).ravel()
        for weights in (excess, excess * excess, excess * excess * excess)
    )
    variance = second - mean**2
    third -= mean * (3 * second - 2 * mean**2)
    # Every kind's clusters, and how often it stands in each.
    clusters = found.clusters.astype(np.int64)
    places, times = np.unique(label * np.int64(n_clusters) + clusters, return_counts=True)
    bounds = np.searchsorted(places, np.arange(int(label.max()) + 2) * np.int64(n_clusters))
    where, times = places % n_clusters, times.astype(np.float64)
    all_of = size[where]
    free = times * (all_of - times) / np.maximum(all_of - 1, 1)
    lean = free * (all_of - 2 * times) / np.maximum(all_of - 2, 1)
    means, variances, thirds = np.zeros((3, len(kind)))
    many = np.diff(bounds)[kind]
    for rows in _within(many, _CELLS):
        each = many[rows]
        starts = np.cumsum(each) - each
        entry = np.arange(int(each.sum())) + np.repeat(bounds[kind[rows]] - starts, each)
        at = np.repeat(feature[rows] * n_clusters, each) + where[entry]
        means[rows] = np.add.reduceat(mean[at] * times[entry], starts)
        variances[rows] = np.add.reduceat(variance[at] * free[entry], starts)
        thirds[rows] = np.add.reduceat(third[at] * lean[entry], starts)
    sd = np.sqrt(np.maximum(variances, 0.0))
    return means, sd, np.divide(thirds, sd**3, out=np.zeros_like(sd), where=sd > 0)


def pearson_tail(
    z: Float[np.ndarray, " row"], skew: Float[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """Return P(|Z| >= |z|) of a gamma distribution of mean 0, variance 1 and this skewness."""
    size = np.abs(z) * (1 - 1e-12)
    return np.minimum(pearson3.sf(size, skew) + pearson3.cdf(-size, skew), 1.0)


def _within(sizes: Int[np.ndarray, " row"], most: int) -> Iterator[slice]:
    """Cut rows into slices whose sizes add up to about `most` at the most."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(first, last)
        first = last


def _permuted(
    shuffles: Shuffles,
    observed: np.ndarray,
    mean: np.ndarray,
    fitted: np.ndarray,
    tested: int,
    options: AssociationOptions,
    progress: Callable[[int, int], None] | None,
) -> tuple[Float[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """Return p and how many shuffles it rests on: none where the fitted p promises nothing.

    A pair is decided once `_STOP` shuffles reached it (Besag and Clifford, 1991), once its q is
    clearly within the false discovery rate, or once it cannot come within it any more.
    """
    reached = np.zeros(len(observed), dtype=np.int64)
    tried = np.zeros(len(observed), dtype=np.int64)
    distance = np.abs(observed - mean)
    slack = 1e-9 * np.maximum(np.abs(observed), 1.0)
    promising = bh_of(fitted, tested) < 1.0
    running = np.flatnonzero(promising)
    most, done = int(promising.sum()), 0
    p = fitted.copy()
    for block in _blocks(options.permutations):
        if not len(running):
            break
        for sums in shuffles.draw(block, running):
            reached[running] += np.abs(sums - mean[running]) >= (distance - slack)[running]
        tried[running] += block
        done += block
        if progress is not None:
            progress(done, options.permutations)
        drawn = (1 + reached) / (1 + tried)
        believed = (reached == 0) & ((tried >= _ENOUGH) | (tried >= options.permutations))
        never = np.where(believed, np.minimum(drawn, fitted), drawn)
        p = np.where(reached == 0, never, np.maximum(drawn, fitted))
        p = np.where(promising, p, fitted)
        least = 1 / (1 + options.permutations)
        best = np.where(reached == 0, np.minimum(fitted, least), (1 + reached) * least)
        settled = bh_of(p, tested) <= options.fdr / 2
        settled |= believed & (fitted <= least)  # no shuffle can make p smaller
        settled |= best * tested > options.fdr * most
        going = promising & (reached < _STOP) & ~settled
        running = np.flatnonzero(going)
    return p, tried


def _blocks(total: int) -> Iterator[int]:
    """Cut permutations into blocks that grow with what was done."""
    done = 0
    while done < total:
        block = min(max(199, done), total - done)
        yield block
        done += block
