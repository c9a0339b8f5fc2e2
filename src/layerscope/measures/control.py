"""The control prompt: the same question about something else, whose answer must be another.

Definitions after the layer-lens reference definitions. A positive margin between two tiny
probabilities is noise, so a second version asks for a margin of at least delta that stays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import first_true, milestone
from layerscope.measures.rows import PassRows


def control_summary(part: PassRows, config: MeasureConfig) -> dict[str, Any]:
    """Return where the control's own answer beats the foil, and by how much.

    `first_control_margin_pos` and `first_control_strong_pos` are the published first rows; the
    `control_margin_*` fields ask for margin >= delta, and `stable` for staying so to the last row.
    """
    margin, gap = part.floats("control_margin"), part.floats("answer_logit_gap")
    firm = milestone(margin >= config.control_margin, part.layers, n_layers=part.n_layers)
    return {
        "prompt_index": part.prompt.prompt_index,
        "fact_key": part.prompt.fact_key,
        "answer": part.prompt.answer,
        "foil": part.prompt.foil,
        "first_control_margin_pos": first_true(margin > 0, part.layers),
        "max_control_margin": _max(margin),
        "first_control_strong_pos": first_true(
            (margin > 0) & (gap >= config.control_gap), part.layers
        ),
        "max_control_top2_logit_gap": _max(gap),
        "delta_top2_logit_ctl": config.control_gap,
        "control_margin_delta": config.control_margin,
        "control_margin_first": firm.first,
        "control_margin_stable": firm.stable,
        "control_margin_lost": list(firm.lost),
        "control_margin_last_row": _last(margin),
    }


def _max(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size else None


def _last(values: np.ndarray) -> float | None:
    return None if not values.size or np.isnan(values[-1]) else float(values[-1])
