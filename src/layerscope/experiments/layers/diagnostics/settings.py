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
        rank_deviation: largest deviation from rank 1 of another arithmetic's top-1.
        flip_rate: largest share of rows whose top-1 changes although it was decided.
        decided_gap: logits by which a top-1 must lead to count as decided.
        milestone_shift: rows by which a milestone may move.
        jaccard: least overlap of the ten most likely tokens at a milestone.
        exact_bits, exact_bits_low: largest KL of the last row from the head, in float32 and in
            half precision.
    """

    passes: int = 8
    repeats: int = 8
    text_tokens: int = 2048
    rank_deviation: int = 5
    flip_rate: float = 0.02
    decided_gap: float = 0.5
    milestone_shift: int = 1
    jaccard: float = 0.5
    exact_bits: float = 1e-6
    exact_bits_low: float = 1e-3

    @staticmethod
    def of(level: str) -> Settings:
        """Return the settings of a level; raises ConfigError for an unknown one."""
        if level not in LEVELS:
            raise ConfigError(
                f"unknown level {level!r}{nearest(level, LEVELS)}; use {' or '.join(LEVELS)}"
            )
        return Settings(passes=1_000_000, text_tokens=16_384) if level == "full" else Settings()

    def to_dict(self) -> dict[str, Any]:
        """Return every setting under its name."""
        return asdict(self)
