"""From surface to meaning: probability and geometry of prompt tokens against the answer.

Definitions after the layer-lens reference definitions. Prompt tokens are the distinct tokens of the
prompt that are not only white space or punctuation.
"""

from __future__ import annotations

from typing import Any

from layerscope.measures.config import MeasureConfig
from layerscope.measures.detectors import Milestone, milestone
from layerscope.measures.rows import PassRows

MASS_RATIO_EPSILON = 1e-9


def surface_milestones(part: PassRows, config: MeasureConfig) -> dict[str, Milestone]:
    """Return where the answer passes the prompt by mass and by direction, and where echo ends.

    - L_surface_to_meaning: answer mass >= echo mass + delta.
    - L_geom: cosine to the answer >= largest cosine to a prompt token + gamma.
    - L_topk_decay: mass of prompt tokens among the K most likely <= tau.
    """
    answer, echo = part.floats("p_answer"), part.floats("echo_mass_prompt")
    to_answer, to_prompt = part.floats("cos_to_answer"), part.floats("cos_to_prompt_max")
    conditions = {
        "L_surface_to_meaning": answer >= echo + config.surface_delta,
        "L_geom": to_answer >= to_prompt + config.geom_gamma,
        "L_topk_decay": part.floats("topk_prompt_mass") <= config.topk_decay_tau,
    }
    return {
        name: milestone(hits, part.layers, n_layers=part.n_layers)
        for name, hits in conditions.items()
    }


def surface_fields(
    part: PassRows, found: dict[str, Milestone], config: MeasureConfig
) -> dict[str, Any]:
    """Return the published surface fields of one pass; names carry the lens as their suffix."""
    surface, geom, decay = (
        found[name].first for name in ("L_surface_to_meaning", "L_geom", "L_topk_decay")
    )
    lens = part.lens
    return {
        "L_surface_to_meaning": surface,
        "L_geom": geom,
        "L_topk_decay": decay,
        f"L_surface_to_meaning_{lens}": surface,
        f"answer_mass_at_L_surface_{lens}": part.at("p_answer", surface),
        f"echo_mass_at_L_surface_{lens}": part.at("echo_mass_prompt", surface),
        f"L_geom_{lens}": geom,
        f"cos_to_answer_at_L_geom_{lens}": part.at("cos_to_answer", geom),
        f"cos_to_prompt_max_at_L_geom_{lens}": part.at("cos_to_prompt_max", geom),
        f"L_topk_decay_{lens}": decay,
        f"topk_prompt_mass_at_L_{lens}": part.at("topk_prompt_mass", decay),
        f"topk_prompt_tau_{lens}": config.topk_decay_tau,
        f"surface_delta_{lens}": config.surface_delta,
        f"geom_gamma_{lens}": config.geom_gamma,
    }
