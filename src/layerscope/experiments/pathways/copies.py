"""Whether trials are independent samples: repeats of texts, against how common the texts are.

Short answers repeat by chance, and an edit may make one of them near certain. Copies of a
generation that does not sample are told from that in two ways: a text that stands again and again
in one cell and hardly anywhere else; and no two texts in any cell, or few long texts in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

_ODDS = 10.0  # by how much an edit may raise a text's share before its repeats need another cause
_CHANCE = 1e-3  # that so many repeats of a text come about all the same
_LEAST = 4  # trials of a cell in which repeats mean anything
_LONG = 40  # characters from which on a sampled text is hardly ever said twice


@dataclass(frozen=True)
class Copies:
    """Repeats that chance does not explain.

    Attributes:
        share: by cell, how many of its trials are something else than such repeats.
        uniform: by kind of prompt, share of distinct texts where it shows that nothing was sampled.
    """

    share: Mapping[tuple[str, str], float]
    uniform: Mapping[str, float]


def find_copies(
    cells: Mapping[tuple[str, str], np.ndarray],
    lengths: Mapping[tuple[str, str], float],
    *,
    min_unique: float,
) -> Copies:
    """Look for copies among the trials of every feature and condition.

    A text's repeats in a cell are explained where so many are likely, at its share among all trials
    of the same kind of prompt outside the cell, ten times as large. Without other trials nothing is
    known of that share, and a repeat explains itself only as a single answer does.

    Args:
        cells: hashes of texts by (feature, condition); a condition begins with the kind of prompt.
        lengths: mean characters of a text, by cell.
        min_unique: least share of distinct texts of a sample of long texts.
    """
    sides: dict[str, list[tuple[str, str]]] = {}
    for key in cells:
        sides.setdefault(key[1].split("_", 1)[0], []).append(key)
    share: dict[tuple[str, str], float] = {}
    uniform: dict[str, float] = {}
    for side, keys in sorted(sides.items()):
        sizes = np.array([len(cells[key]) for key in keys])
        _, which, counts = np.unique(
            np.concatenate([cells[key] for key in keys]), return_inverse=True, return_counts=True
        )
        total = int(sizes.sum())
        mean = sum(lengths[key] * len(cells[key]) for key in keys) / max(total, 1)
        distinct = len(counts) / max(total, 1)
        owner = np.repeat(np.arange(len(keys)), sizes)
        pairs, times = np.unique(owner * len(counts) + which, return_counts=True)
        cell, text = pairs // len(counts), pairs % len(counts)
        one_each = len(pairs) == int((sizes > 0).sum())
        if int(sizes.max()) >= _LEAST and (one_each or (mean >= _LONG and distinct < min_unique)):
            uniform[side] = distinct
        # One more of each, in and out: a text seen nowhere else is rare, not impossible.
        outside = (counts[text] - times + 1) / (total - sizes[cell] + 1)
        likely = np.minimum(1.0, _ODDS * outside)
        repeated = (times > 1) & (sizes[cell] >= _LEAST)
        chance = np.ones(len(pairs))
        chance[repeated] = binom.sf(times[repeated] - 1, sizes[cell][repeated], likely[repeated])
        unexplained = np.where(chance < _CHANCE, times - 1, 0)
        lost = np.bincount(cell, unexplained, minlength=len(keys))
        for place, key in enumerate(keys):
            share[key] = 1.0 - float(lost[place]) / max(int(sizes[place]), 1)
    return Copies(share, uniform)
