"""What a causal-feature run is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from layerscope.errors import ConfigError
from layerscope.models import Scope

GATE = 0.8
FDR = 0.05


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """Settings of a run.

    Attributes:
        layers: dictionaries to use; None for all.
        top_per_layer: features of each layer that are patched: the largest |d| with q below 0.05.
        trials: independent sampled answers per condition.
        controls: random features per patched feature, moved as far.
        temperature: of the answers; above 0, since greedy answers are copies of one another.
        max_new_tokens: of an answer.
        stop: strings that end an answer.
        scope: tokens that are patched.
        min_effect: smallest change of a rate that counts.
        high_bet: if given, the risky side counts bets above this sum rather than all.
        batch_rows: answers generated side by side; the results do not depend on it.
        seed: of the draws.
    """

    layers: tuple[int, ...] | None = None
    top_per_layer: int = 3
    trials: int = 100
    controls: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 12
    stop: tuple[str, ...] = ()
    scope: str = "last_k:1"
    min_effect: float = 0.05
    high_bet: float | None = None
    batch_rows: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_per_layer", "trials", "max_new_tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.controls < 0:
            raise ConfigError(f"controls cannot be negative, got {self.controls}")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature {self.temperature:g} would make all trials of a prompt copies of one "
                "another: use one above 0"
            )
        if not 0.0 <= self.min_effect < 1.0:
            raise ConfigError(f"min_effect is a change of a rate, below 1, not {self.min_effect}")
        Scope.parse(self.scope)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        layers = None if self.layers is None else list(self.layers)
        return {**asdict(self), "layers": layers, "stop": list(self.stop)}
