"""Configuration of a causal follow-up: frozen, serialised with every run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from layerscope.errors import ConfigError
from layerscope.experiments.battery import BatteryConfig
from layerscope.products import Products

ALPHAS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class FollowUpConfig:
    """What to test of each fact whose onset is confirmed.

    Attributes:
        battery: how the facts are asked and read first; its parts play no role here.
        min_bits: gain of the answer from which, with rank 1, a patch counts as causal.
        reach: blocks below and above the onset whose heads are scanned.
        curve: heads of the cumulative curve.
        random_sets: sets of as many random heads beside every point of that curve.
        paraphrases: rewordings per held-out fact that a direction is tried on.
        alphas: what multiples of the fitted direction are added; negative ones remove.
        random_directions: directions of the same length beside it.
        top_tokens: the most likely tokens whose mass the specificity index watches.
        train_share, most_train: of the facts a direction is fitted on, and heads are ranked on.
        language: the language that onsets, heads and directions are taken from.
        seed: of partners, the split and everything random.
    """

    battery: BatteryConfig = field(default_factory=lambda: BatteryConfig(parts=()))
    min_bits: float = 0.5
    reach: int = 2
    curve: int = 10
    random_sets: int = 3
    paraphrases: int = 3
    alphas: tuple[float, ...] = ALPHAS
    random_directions: int = 3
    top_tokens: int = 50
    train_share: float = 0.7
    most_train: int = 150
    language: str = "en"
    seed: int = 0
    products: Products = "default"
    facts_per_unit: int = 16

    def __post_init__(self) -> None:
        for name in ("curve", "top_tokens", "most_train", "facts_per_unit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("reach", "random_sets", "paraphrases", "random_directions"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 < self.train_share < 1:
            raise ConfigError(f"train_share is {self.train_share}; use a share between 0 and 1")
        if not (math.isfinite(self.min_bits) and self.min_bits >= 0):
            raise ConfigError(f"min_bits is {self.min_bits}; use 0 or a positive number")
        if not all(math.isfinite(alpha) and alpha != 0 for alpha in self.alphas):
            raise ConfigError("alphas must be finite and not 0, which changes nothing")
        if "norm" not in self.battery.lenses:
            raise ConfigError("the onset is confirmed of the norm lens; add norm to the lenses")

    def content(self) -> dict[str, Any]:
        """Return what decides the bytes of a result."""
        return {**asdict(self), "battery": self.battery.content()}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON-able values."""
        return {**asdict(self), "battery": self.battery.to_dict()}
