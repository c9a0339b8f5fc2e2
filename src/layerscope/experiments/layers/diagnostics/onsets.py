"""Milestones of a reading that is not in the table: the same rules, on tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import first_true, run_of_two
from layerscope.measures.rows import PassRows
from layerscope.measures.semantics import semantic_milestones

# The most demanding milestone that exists is the one a check is made at.
PREFERRED = ("L_semantic_strong_run2", "L_semantic_strong", "L_semantic")
TARGETS = (*PREFERRED, "first_rank_le_5", "first_rank_le_10")


@dataclass(frozen=True, eq=False)
class Answers:
    """How one pass reads its answer at every row.

    Attributes:
        rank: 1 + number of tokens that are strictly more likely; 0 where not known.
        probability: of the answer's first token.
        lead: logits by which it leads the runner-up, NaN where it is not top-1.
    """

    rank: Int[np.ndarray, " row"]
    probability: Float[np.ndarray, " row"]
    lead: Float[np.ndarray, " row"]


def onsets(answers: Answers, config: MeasureConfig, d_vocab: int) -> dict[str, int | None]:
    """Return the first row of every target milestone, None where there is none."""
    layers = np.arange(len(answers.rank))
    first = answers.rank == 1
    clear = answers.probability - 1.0 / d_vocab >= config.semantic_margin
    strong = first & clear & (answers.lead >= config.semantic_gap)
    return {
        "L_semantic_strong_run2": first_true(run_of_two(strong), layers[:-1]),
        "L_semantic_strong": first_true(strong, layers),
        "L_semantic": first_true(first, layers),
        "first_rank_le_5": first_true((answers.rank > 0) & (answers.rank <= 5), layers),
        "first_rank_le_10": first_true((answers.rank > 0) & (answers.rank <= 10), layers),
    }


def recorded(part: PassRows, config: MeasureConfig, d_vocab: int) -> dict[str, int | None]:
    """Return the same milestones of a pass of the table."""
    found = semantic_milestones(part, config, d_vocab=d_vocab)
    return {name: found[name].first for name in TARGETS if name in found}


def preferred(found: dict[str, int | None]) -> tuple[str, int] | None:
    """Return name and row of the most demanding milestone there is."""
    for name in PREFERRED:
        layer = found.get(name)
        if layer is not None:
            return name, layer
    return None
