"""Whether texts look like language, before anything is concluded from their words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 50
_GRAM = 4


@dataclass(frozen=True)
class TextQuality:
    """Whether texts look like language.

    Attributes:
        texts, words: how many.
        type_token: mean share of distinct words in windows of 50 words.
        repeated: mean share of four-word sequences that occurred earlier in the same text.
        nats_per_token: mean surprise of the model at its own tokens; None where it was not taken.
    """

    texts: int
    words: int
    type_token: float | None
    repeated: float | None
    nats_per_token: float | None = None

    def degenerate(self, usual: TextQuality | None = None) -> str | None:
        """Return why association over these texts is not to be trusted; None where nothing is.

        Args:
            usual: quality of texts without any edit, which surprise is compared with.
        """
        if self.type_token is not None and self.type_token < 0.3:
            return f"few distinct words ({self.type_token:.0%})"
        if self.repeated is not None and self.repeated > 0.3:
            return f"texts repeat themselves ({self.repeated:.0%} of four-word sequences)"
        if usual is not None and None not in (self.nats_per_token, usual.nats_per_token):
            more = (self.nats_per_token or 0.0) - (usual.nats_per_token or 0.0)
            if more > math.log(3):
                return f"the model is surprised by them (perplexity {math.exp(more):.1f} times)"
        return None


def text_quality(texts: Sequence[str], *, nats_per_token: float | None = None) -> TextQuality:
    """Measure repetition in texts, words being what white space separates."""
    ratios: list[float] = []
    repeats: list[float] = []
    total = 0
    for text in texts:
        words = text.lower().split()
        total += len(words)
        for first in range(0, len(words) - 9, _WINDOW):
            window = words[first : first + _WINDOW]
            ratios.append(len(set(window)) / len(window))
        grams = [tuple(words[at : at + _GRAM]) for at in range(len(words) - _GRAM + 1)]
        if len(grams) >= 4:
            repeats.append(1 - len(set(grams)) / len(grams))
    return TextQuality(
        texts=len(texts),
        words=total,
        type_token=sum(ratios) / len(ratios) if ratios else None,
        repeated=sum(repeats) / len(repeats) if repeats else None,
        nats_per_token=nats_per_token,
    )
