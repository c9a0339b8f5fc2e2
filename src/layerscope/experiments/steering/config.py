"""What a steering run is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from layerscope.errors import ConfigError, nearest
from layerscope.experiments.steering.builtin import NEUTRAL
from layerscope.interventions.steering.estimators import ESTIMATORS, Estimator
from layerscope.interventions.steering.states import READ_AT, ReadAt
from layerscope.interventions.steering.vector import Mode
from layerscope.models import Scope


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """Settings of a run.

    Attributes:
        method: estimator of the direction.
        read_at: "last", "mean" or "label", see `read_states`.
        alphas: strengths in typical residual lengths.
        layers: blocks to choose from; None for all.
        mode: "add" or "norm_preserving".
        scope: which tokens are steered.
        random_directions: how many, as control.
        shots: texts put in front of a prompt, as the prompting baseline.
        validation, test: shares of the contrasts for choosing the layer and for the test.
        max_new_tokens: of the texts.
        neutral: texts that have nothing to do with the property; how much steering changes the
            next-token distribution there is what it damages.
        kl_bits: also find the strength that changes it by so many bits per token; None does not.
        temperature: of the texts; 0 takes the most likely token.
        seed: of every draw.
    """

    method: Estimator = "mean_difference"
    read_at: ReadAt = "last"
    alphas: tuple[float, ...] = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5)
    layers: tuple[int, ...] | None = None
    mode: Mode = "add"
    scope: str = "all"
    random_directions: int = 20
    shots: int = 3
    validation: float = 0.2
    test: float = 0.3
    max_new_tokens: int = 40
    neutral: tuple[str, ...] = NEUTRAL
    kl_bits: float | None = None
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ESTIMATORS:
            raise ConfigError(
                f"unknown method '{self.method}'{nearest(self.method, ESTIMATORS)}; use "
                f"{', '.join(ESTIMATORS)}"
            )
        if self.read_at not in READ_AT:
            raise ConfigError(f"unknown position '{self.read_at}'; use {', '.join(READ_AT)}")
        if self.mode not in ("add", "norm_preserving"):
            raise ConfigError(f"mode '{self.mode}' has no dose; use add or norm_preserving")
        alphas = tuple(sorted({0.0, *(float(alpha) for alpha in self.alphas)}))
        if len(alphas) < 3:
            raise ConfigError("give two strengths or more beside 0")
        object.__setattr__(self, "alphas", alphas)
        Scope.parse(self.scope)
        for name in ("random_directions", "shots", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not self.neutral or not all(text.strip() for text in self.neutral):
            raise ConfigError("neutral needs one text or more, none of them empty")
        if self.kl_bits is not None and not self.kl_bits > 0:
            raise ConfigError(f"kl_bits must be above 0, got {self.kl_bits}")
        if min(self.validation, self.test) <= 0 or self.validation + self.test >= 1:
            raise ConfigError("validation and test are shares above 0 that leave some for training")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, ready for JSON."""
        layers = None if self.layers is None else list(self.layers)
        lists = {"alphas": list(self.alphas), "neutral": list(self.neutral), "layers": layers}
        return {**asdict(self), **lists}
