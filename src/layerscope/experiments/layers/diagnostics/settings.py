"""How much the checks read, and the thresholds of their gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from layerscope.errors import ConfigError, nearest

LEVELS = ("standard", "full")
# Where a prompt is looked at, as fractions of its last position.
GRID = (0.20, 0.40, 0.60, 0.80, 0.92, 0.96, 0.98, 1.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a level reads, and what its gates ask for.

    Attributes:
        passes: most passes of the run that are looked at again.
        repeats: most of these that are run anew for repeatability.
        text_tokens: tokens of held-out text.
        text_length: longest sequence of it.
        sample_tokens, sample_length: the same for text that the model writes itself.
        audit_places: positions of it that every variant of a tuned lens reads.
        decided_gap: logits by which a top-1 must lead for a change of it to count.
        exact_bits, exact_bits_low: largest KL of the last row from the head, in float32 and in
            half precision.
        bias_bits: largest KL that a reading may owe to the head's constant part.
        norm_error: largest relative error of a norm against its own formula in float64, and of a
            norm against what the model computed with it.
    """

    passes: int = 8
    repeats: int = 8
    text_tokens: int = 2048
    text_length: int = 512
    sample_tokens: int = 960
    sample_length: int = 128
    audit_places: int = 128
    decided_gap: float = 0.5
    exact_bits: float = 1e-6
    exact_bits_low: float = 1e-3
    bias_bits: float = 0.5
    norm_error: float = 1e-4
    norm_error_low: float = 2e-2

    @staticmethod
    def of(level: str) -> Settings:
        """Return the settings of a level; raises ConfigError for an unknown one."""
        if level not in LEVELS:
            raise ConfigError(
                f"unknown level {level!r}{nearest(level, LEVELS)}; use {' or '.join(LEVELS)}"
            )
        if level == "standard":
            return Settings()
        return Settings(passes=1_000_000, text_tokens=16_384, sample_tokens=8192, audit_places=512)

    def to_dict(self) -> dict[str, Any]:
        """Return every setting under its name."""
        return asdict(self)
