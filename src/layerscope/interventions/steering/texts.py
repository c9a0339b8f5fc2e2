"""What steered text is like: how likely without steering, how repetitive, and what it says."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerscope.errors import ConfigError
from layerscope.interventions.steering.dose import Dose, rows_edit
from layerscope.interventions.steering.vector import Mode
from layerscope.models import Generation, LanguageModel, Scope


@dataclass(frozen=True)
class SteeredText:
    """One text and its coherence.

    Attributes:
        prompt, text: what was given, and what followed.
        alpha: strength.
        perplexity: of the generated tokens under the unsteered model; None where there are none.
        repeated: by n = 2, 3, 4, share of n-grams of the generated ids that occurred before.
    """

    prompt: str
    text: str
    alpha: float
    perplexity: float | None
    repeated: Mapping[int, float]


def steered_texts(
    model: LanguageModel,
    prompts: Sequence[str],
    doses: Sequence[Dose],
    *,
    mode: Mode = "add",
    scope: Scope | str = "all",
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[SteeredText]:
    """Continue every prompt at every dose, in one batch, and measure the coherence.

    Returns the texts dose by dose. With a temperature, a prompt draws with other random numbers at
    every dose.
    """
    rows = [(prompt, dose) for dose in doses for prompt in prompts]
    made = model.generate(
        [prompt for prompt, _ in rows],
        edits=[rows_edit([dose for _, dose in rows], mode, scope)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    scores = perplexities(model, made)
    return [
        SteeredText(prompt, text, dose.alpha, score, repetition(ids))
        for (prompt, dose), text, score, ids in zip(rows, made.texts, scores, made.ids, strict=True)
    ]


@torch.no_grad()
def perplexities(model: LanguageModel, made: Generation) -> list[float | None]:
    """Return the perplexity of every continuation under the model itself, without edits."""
    batch = made.batch()
    logits = model.run(batch).logits
    assert logits is not None
    logprobs = logits.float().log_softmax(-1).cpu()
    found: list[float | None] = []
    for row, (prompt, ids) in enumerate(zip(made.prompt_ids, made.ids, strict=True)):
        first = len(prompt) - 1
        steps = logprobs[row, first : first + len(ids)].gather(1, torch.tensor([ids]).T)
        found.append(math.exp(min(-float(steps.double().mean()), 700.0)) if ids else None)
    return found


def repetition(ids: Sequence[int]) -> dict[int, float]:
    """Return, for n = 2, 3, 4, the share of n-grams that repeat an earlier one."""
    shares: dict[int, float] = {}
    for n in (2, 3, 4):
        grams = [tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)]
        shares[n] = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
    return shares


class BagOfWords:
    """A naive Bayes classifier of texts by their words, which knows nothing of the model.

    Train it on texts that no direction was made from; `accuracy` tells its error.
    """

    def __init__(self, positive: Sequence[str], negative: Sequence[str]) -> None:
        """Count the words of both sides; add-one smoothing.

        Raises:
            ConfigError: a side is empty.
        """
        if not positive or not negative:
            raise ConfigError("a classifier needs texts of both sides")
        counts = [
            Counter(word for text in side for word in _words(text)) for side in (positive, negative)
        ]
        known = set(counts[0]) | set(counts[1])
        totals = [sum(count.values()) + len(known) for count in counts]
        self._weights = {
            word: math.log((counts[0][word] + 1) / totals[0])
            - math.log((counts[1][word] + 1) / totals[1])
            for word in known
        }

    def score(self, text: str) -> float:
        """Return the log-odds of the positive side in nats; unknown words say nothing."""
        return sum(self._weights.get(word, 0.0) for word in _words(text))

    def accuracy(self, positive: Sequence[str], negative: Sequence[str]) -> float:
        """Return the share of texts on whose side the score is."""
        right = [self.score(text) > 0 for text in positive]
        right += [self.score(text) < 0 for text in negative]
        return sum(right) / len(right)

    def to_dict(self, count: int = 10) -> dict[str, Any]:
        """Return the words that weigh most on either side."""
        ranked = sorted(self._weights, key=lambda word: (self._weights[word], word))
        return {"negative": ranked[:count], "positive": ranked[::-1][:count]}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
