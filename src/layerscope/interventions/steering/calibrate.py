"""How strong is strong: coefficients in typical residual lengths, or for a change of KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError
from layerscope.interventions.steering.states import real_tokens
from layerscope.interventions.steering.vector import Mode, SteeringVector
from layerscope.models import LanguageModel, TokenBatch
from layerscope.models.prompts import PromptsLike

_POINTS = 5  # strengths tried in one pass of the search
_NATS = 0.6931471805599453


def typical_norm(model: LanguageModel, site: str, prompts: PromptsLike) -> float:
    """Return the median length of a site's values over the prompts' tokens, BOS left out."""
    batch = model.tokenize(prompts)
    values = model.run(batch, capture=site, logits=None)[site]
    real = real_tokens(model, batch).to(values.device)
    return float(values[real].float().norm(dim=-1).median())


def calibrate(
    model: LanguageModel, vector: SteeringVector, prompts: PromptsLike, *, target: float = 1.0
) -> tuple[SteeringVector, float]:
    """Measure the typical residual length on prompts.

    Returns:
        the vector with it, and the coefficient that makes the vector as estimated `target` of it
        long.
    """
    norm = typical_norm(model, vector.site, prompts)
    coefficient = target * norm / float(vector.vector.float().norm())
    return replace(vector, typical_norm=norm), coefficient


def kl_bits(
    model: LanguageModel,
    vector: SteeringVector,
    prompts: PromptsLike,
    alphas: Sequence[float],
    *,
    mode: Mode = "add",
) -> dict[float, float]:
    """Return KL(unsteered || steered) of the next token, in bits per token, by alpha.

    Averaged over all tokens of the prompts, each of which is steered. On texts that have nothing to
    do with the direction this is what steering damages.
    """
    batch = model.tokenize(prompts)
    logits = model.run(batch).logits
    assert logits is not None
    base = logits.float().log_softmax(-1)
    found: dict[float, float] = {}
    for alpha in alphas:  # one at a time: logits of all positions are large
        found |= _bits(model, vector, batch, base, [alpha], mode)
    return found


@dataclass(frozen=True)
class KlCurve:
    """A search for a strength: (alpha, bits per token) as tried, by rising alpha.

    `monotone` says whether more strength always changed more; where not, `alpha` is one of several
    answers.
    """

    alpha: float
    bits: float
    points: tuple[tuple[float, float], ...]
    monotone: bool
    forwards: int


def calibrate_kl(
    model: LanguageModel,
    vector: SteeringVector,
    prompts: PromptsLike,
    *,
    target_bits: float,
    largest: float = 4.0,
    forwards: int = 8,
    tolerance: float = 0.02,
    mode: Mode = "add",
) -> KlCurve:
    """Find the alpha at which steering changes the next-token distribution by so many bits.

    KL(unsteered || steered) per token, averaged over the prompts' tokens. Every pass tries several
    strengths at once and keeps the interval that holds the target.

    Args:
        model: the model.
        vector: with its typical norm.
        prompts: whose tokens count.
        target_bits: wanted, above 0.
        largest: alpha at which the search begins from above.
        forwards: most batched passes, the unsteered one included.
        tolerance: relative, of the bits.
        mode: how the vector is applied.

    Raises:
        ConfigError: the target is not positive, or lies beyond `largest`.
    """
    if not target_bits > 0:
        raise ConfigError(f"target_bits must be above 0, got {target_bits}")
    batch = model.tokenize(prompts)
    logits = model.run(batch).logits
    assert logits is not None
    base = logits.float().log_softmax(-1)
    tried: dict[float, float] = {0.0: 0.0}
    low, high = 0.0, largest
    used = 1
    while used < forwards:
        inner = [low + (high - low) * step / (_POINTS + 1) for step in range(1, _POINTS + 1)]
        alphas = [*inner, largest] if used == 1 else inner
        tried |= _bits(model, vector, batch, base, alphas, mode)
        used += 1
        if tried[largest] < target_bits:
            raise ConfigError(
                f"alpha {largest} changes {tried[largest]:.3g} bits per token, less than the "
                f"{target_bits:.3g} wanted: raise largest"
            )
        below = [alpha for alpha in sorted(tried) if tried[alpha] < target_bits]
        # The first crossing: everything up to `low` is below the target.
        ordered = sorted(tried)
        crossing = next(i for i, alpha in enumerate(ordered) if tried[alpha] >= target_bits)
        low, high = ordered[crossing - 1] if below else 0.0, ordered[crossing]
        best = min(tried, key=lambda alpha: abs(tried[alpha] - target_bits))
        if abs(tried[best] - target_bits) <= tolerance * target_bits:
            break
    best = min(tried, key=lambda alpha: abs(tried[alpha] - target_bits))
    points = tuple(sorted(tried.items()))
    rising = all(a[1] <= b[1] + 1e-9 for a, b in pairwise(points))
    return KlCurve(best, tried[best], points, rising, used)


def _bits(
    model: LanguageModel,
    vector: SteeringVector,
    batch: TokenBatch,
    base: Float[Tensor, "row pos vocab"],
    alphas: Sequence[float],
    mode: Mode,
) -> dict[float, float]:
    rows = [batch.row_ids(row) for _ in alphas for row in range(len(batch))]
    many = TokenBatch.from_ids(rows)
    each = [alpha for alpha in alphas for _ in range(len(batch))]
    logits = model.run(many, edits=[vector.edit(each, mode=mode)]).logits
    assert logits is not None
    real = batch.attention_mask.to(logits.device)
    found: dict[float, float] = {}
    for alpha, part in zip(alphas, logits.split(len(batch)), strict=True):
        after = part.float().log_softmax(-1)
        kl = (base.exp() * (base - after)).sum(-1)[real]
        found[alpha] = max(0.0, float(kl.mean()) / _NATS)
    return found
