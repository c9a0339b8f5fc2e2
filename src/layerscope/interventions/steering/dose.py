"""Dose and response: how a preference moves with the strength of a direction, example by example.

The propensity of an example is log P(positive) - log P(negative) of what may follow its prompt, in
nats. Its slope against alpha is its steerability (Tan et al. 2024, arXiv 2407.12404), which that
paper found to differ, even in sign, from one example to the next: so every slope is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from layerscope.errors import ConfigError
from layerscope.interventions.steering.contrasts import Contrast, join
from layerscope.interventions.steering.operations import AddKeepingNorm
from layerscope.interventions.steering.vector import Mode, SteeringVector
from layerscope.models import Add, Edit, LanguageModel, Scope, TokenBatch, align_answer
from layerscope.models.scopes import scoped


@dataclass(frozen=True)
class Example:
    """A prompt with two continuations, as ids.

    Attributes:
        text: the prompt.
        prompt: its ids, BOS included.
        positive, negative: ids of what may follow.
    """

    text: str
    prompt: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]


def examples_of(
    model: LanguageModel, contrasts: Sequence[Contrast]
) -> tuple[tuple[Example, ...], int]:
    """Return the contrasts that are a choice after a prompt, and how many are not.

    Contrasts without a prompt are cut where their texts part, at a space; those that share no word
    at their beginning are left out, because texts of different lengths cannot be compared.
    """
    found: list[Example] = []
    for contrast in contrasts:
        cut = _cut(contrast)
        if cut is None:
            continue
        prompt, positive, negative = cut
        sides = [
            align_answer(model.tokenizer, prompt, side, strict=False)
            for side in (positive, negative)
        ]
        if not all(side.ok for side in sides) or sides[0].ids == sides[1].ids:
            continue
        ids = model.tokenize(prompt).row_ids(0)
        found.append(Example(prompt, tuple(ids), sides[0].ids, sides[1].ids))
    return tuple(found), len(contrasts) - len(found)


def _cut(contrast: Contrast) -> tuple[str, str, str] | None:
    if contrast.prompt:
        return contrast.prompt, contrast.positive, contrast.negative
    ones, others = contrast.texts
    same = 0
    while same < min(len(ones), len(others)) and ones[same] == others[same]:
        same += 1
    space = ones.rfind(" ", 0, same) if same < len(ones) else -1
    if space <= 0 or not ones[space:].strip() or not others[space:].strip():
        return None
    return ones[:space], ones[space:], others[space:]


@dataclass(frozen=True, eq=False)
class Dose:
    """One direction at one strength.

    Attributes:
        vector: the direction, with its typical norm.
        alpha: strength in typical residual lengths.
    """

    vector: SteeringVector
    alpha: float


@torch.no_grad()
def propensities(
    model: LanguageModel,
    examples: Sequence[Example],
    doses: Sequence[Dose],
    *,
    mode: Mode = "add",
    scope: Scope | str = "all",
    rows: int = 64,
) -> Float[np.ndarray, "dose example"]:
    """Return the propensity of every example at every dose, in nats.

    Doses and both continuations of the examples share batches, each row with a vector of its own.
    A scope is understood as in generation: the continuation is what comes after the prompt.

    Args:
        model: the model.
        examples: prompts and their continuations.
        doses: all at one site.
        mode: how vectors are applied; "add" or "norm_preserving".
        scope: which tokens are steered.
        rows: most rows of one pass; does not change the result beyond rounding.

    Raises:
        ConfigError: the doses are at different sites, or the mode has no strength.
    """
    if mode not in ("add", "norm_preserving"):
        raise ConfigError(f"mode '{mode}' has no dose; use add or norm_preserving")
    if len({dose.vector.site for dose in doses}) != 1:
        raise ConfigError("doses are compared at one site; measure others apart")
    cells = [
        (dose, number, side)
        for dose in range(len(doses))
        for number in range(len(examples))
        for side in (0, 1)
    ]
    result = np.zeros((len(doses), len(examples), 2))
    for begin in range(0, len(cells), rows):
        chunk = cells[begin : begin + rows]
        values = _continuation_logprobs(
            model,
            [
                (
                    examples[number].prompt,
                    (examples[number].positive, examples[number].negative)[side],
                )
                for _, number, side in chunk
            ],
            [doses[dose] for dose, _, _ in chunk],
            mode,
            Scope.parse(scope),
        )
        for (dose, number, side), value in zip(chunk, values, strict=True):
            result[dose, number, side] = value
    return result[:, :, 0] - result[:, :, 1]


def _continuation_logprobs(
    model: LanguageModel,
    rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    doses: Sequence[Dose],
    mode: Mode,
    scope: Scope,
) -> list[float]:
    # The last token predicts nothing that is asked for.
    batch = TokenBatch.from_ids([prompt + follows[:-1] for prompt, follows in rows])
    longest = max(len(follows) for _, follows in rows)
    places = [
        [len(prompt) - 1 + min(step, len(follows) - 1) for step in range(longest)]
        for prompt, follows in rows
    ]
    edits = scoped([rows_edit(doses, mode, scope)], batch, [len(prompt) for prompt, _ in rows])
    logits = model.run(batch, edits=edits, logits=places).logits
    assert logits is not None
    logprobs = logits.double().log_softmax(-1).cpu()
    return [
        float(sum(logprobs[row, step, token] for step, token in enumerate(follows)))
        for row, (_, follows) in enumerate(rows)
    ]


def rows_edit(doses: Sequence[Dose], mode: Mode, scope: Scope | str) -> Edit:
    """Return one edit that gives every row of a batch its own dose."""
    value = torch.stack([dose.vector.per_alpha().cpu() * dose.alpha for dose in doses])[:, None]
    kind = Add if mode == "add" else AddKeepingNorm.of
    return kind(doses[0].vector.site, value, scope=Scope.parse(scope))


def random_directions(
    vector: SteeringVector, count: int, *, seed: int = 0
) -> tuple[SteeringVector, ...]:
    """Return directions drawn at random, as long as the vector: the control of every dose."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, len(vector.vector), generator=generator)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True) * vector.vector.float().norm().cpu()
    return tuple(
        SteeringVector(vector.site, each, vector.typical_norm, "random", {"draw": number})
        for number, each in enumerate(drawn)
    )


@dataclass(frozen=True, eq=False)
class Response:
    """Straight-line fits of propensity against alpha, one per example.

    Attributes:
        slopes: nats per typical residual length.
        residuals: root mean square distance from the line, in nats.
        rank_correlations: Spearman's, between alpha and propensity.
    """

    slopes: Float[np.ndarray, " example"]
    residuals: Float[np.ndarray, " example"]
    rank_correlations: Float[np.ndarray, " example"]

    def summary(self, *, seed: int = 0, draws: int = 1000) -> dict[str, Any]:
        """Return mean slope with a 95% bootstrap interval, quartiles, and the share below zero."""
        rng = np.random.default_rng(seed)
        index = rng.integers(len(self.slopes), size=(draws, len(self.slopes)))
        low, high = np.quantile(self.slopes[index].mean(axis=1), [0.025, 0.975])
        quartiles = np.quantile(self.slopes, [0.25, 0.5, 0.75])
        return {
            "examples": len(self.slopes),
            "mean_slope": float(self.slopes.mean()),
            "low": float(low),
            "high": float(high),
            "quartiles": [float(value) for value in quartiles],
            "anti_steerable": float((self.slopes < 0).mean()),
            "mean_residual": float(self.residuals.mean()),
            "mean_rank_correlation": float(self.rank_correlations.mean()),
        }


def fit_response(alphas: Sequence[float], values: Float[np.ndarray, "alpha example"]) -> Response:
    """Fit a line per example.

    Raises:
        ConfigError: there are fewer than two different alphas.
    """
    x = np.asarray(alphas, dtype=np.float64)
    if len(np.unique(x)) < 2:
        raise ConfigError("a slope needs two strengths or more")
    centred = x - x.mean()
    slopes = centred @ values / (centred @ centred)
    rest = values - values.mean(axis=0) - centred[:, None] * slopes
    return Response(slopes, np.sqrt((rest**2).mean(axis=0)), _spearman(x, values))


def _spearman(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    a, b = _ranks(x[:, None]), _ranks(values)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    size = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), size, out=np.zeros(b.shape[1]), where=size > 0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the first axis, equal values sharing their mean rank."""
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def prompted(
    model: LanguageModel, examples: Sequence[Example], shots: Sequence[Contrast], side: int
) -> tuple[Example, ...]:
    """Return the examples after texts of one side: the prompting baseline of steering.

    `side` 0 puts positive texts in front, 1 negative ones. Examples that outgrow the context are
    left without.
    """
    front = "\n".join(contrast.texts[side] for contrast in shots)
    found: list[Example] = []
    for example in examples:
        text = join(front + "\n", example.text)
        longest = max(len(example.positive), len(example.negative))
        ids = tuple(model.tokenize(text).row_ids(0)) if _fits(model, text, longest) else None
        found.append(
            example if ids is None else Example(text, ids, example.positive, example.negative)
        )
    return tuple(found)


def _fits(model: LanguageModel, text: str, more: int) -> bool:
    if model.n_ctx is None:
        return True
    ids: Any = model.tokenizer(text, verbose=False)["input_ids"]
    return len(ids) + more <= model.n_ctx
