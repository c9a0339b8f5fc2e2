"""What does held-out text cost when the last blocks are replaced by a lens?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from layerscope.experiments.layers.diagnostics.material import Material
from layerscope.experiments.layers.diagnostics.scoring import LN2, score
from layerscope.experiments.layers.diagnostics.sections import Section, Skipped, result
from layerscope.measures import skip_layers as measure

_SURE = 2.0  # standard errors by which a difference must exceed zero


def skip_layers_sanity(material: Material) -> Section:
    """Score held-out text, token by token, with row n - m of every lens in place of m blocks.

    A lens whose row is worse than the norm lens's at the same row, by more than two standard errors
    of the paired differences, has made things worse: its gate fails. The increase over the whole
    model is reported with the reference's threshold of 5%, for the tuned lens.
    """
    scores = material.once("scores", score)
    if not scores.skipped["norm"]:
        raise Skipped("the model has too few blocks to leave any out")
    if len(scores.full) < 2:
        raise Skipped("there is no text to score")
    config = material.config.measures
    by_lens: dict[str, Any] = {}
    gates: dict[str, bool | None] = {}
    warnings: list[str] = []
    for name, by_skip in scores.skipped.items():
        section = measure.skip_layers(
            float(scores.full.mean()),
            {m: float(nats.mean()) for m, nats in by_skip.items()},
            tokens=len(scores.full),
            config=config,
        )
        against = {
            f"m={m}": _against(nats, scores.skipped["norm"][m]) for m, nats in by_skip.items()
        }
        by_lens[name] = {**section, "against_norm": against}
        if name == "norm":
            continue
        worse = [m for m, entry in against.items() if entry["worse"]]
        gates[f"no_worse_than_norm.{name}"] = not worse
        warnings += [
            f"at {m} the {name} lens costs {against[m]['bits_more']:.3g} bits a token more than "
            "the norm lens does"
            for m in worse
        ]
    tuned = by_lens.get("tuned")
    if tuned is not None and tuned["tuned_lens_regression"]:
        warnings.append(
            f"with 2 blocks left out the tuned lens raises the perplexity by "
            f"{tuned['tuned_lens_skip_warning']:.0%}: it is no stand-in for them"
        )
    if not gates:
        warnings.append("the run has no fitted lens: the norm lens was only measured")
    return result(
        gates,
        thresholds={"skip_increase": config.skip_increase, "standard_errors": _SURE},
        warnings=[*warnings, *scores.text.notes],
        **(tuned or by_lens["norm"]),
        lens="tuned" if tuned else "norm",
        by_lens=by_lens,
        full_bits_per_token=float(scores.full.mean()) / LN2,
        full_perplexity=math.exp(float(scores.full.mean())),
        text={"source": scores.text.source, "tokens": scores.text.tokens},
    )


def _against(
    nats: Float[np.ndarray, " token"], norm: Float[np.ndarray, " token"]
) -> dict[str, Any]:
    """Return the paired difference of a lens and the norm lens, bits per token."""
    difference = (nats - norm) / LN2
    mean = float(difference.mean())
    error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
    return {
        "bits_more": mean,
        "standard_error": error,
        "worse": bool(mean > _SURE * error and mean > 0.0),
    }
