"""What can be chosen about a tuned lens's fit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TunedOptions:
    """How translators are trained.

    Attributes:
        rank: of the translators' matrices; None for full ones.
        temperature: train one temperature per row index as well.
        start: "regression" starts each row index from the least-squares map to the last residual
            where that is better on the validation text than the identity; "identity" never does.
        baseline: train a bias-only lens on the same batches.
        epochs: times through the text, with new positions each time.
        steps: number of steps, whatever the epochs say; None for epochs.
        learning_rate: of AdamW, for all row indices. None for one each, the lesser of 0.02 and
            4 / d_model, times the 0.4th power of the bits that its start loses, at most 0.04: each
            entry of a matrix moves by about this much a step, whatever the gradient, so what a step
            does to a vector grows with the width (Yang et al., 2022, table 3), and a row that is
            almost right needs less.
        weight_decay, warmup, clip: of AdamW; warm-up is a fraction of the steps, the decay pulls
            towards the identity, and gradients are clipped per row index.
        evaluate_every: steps between looks at the validation text; None for a twentieth of all.
        patience: looks without a gain of 0.1% at any row index after which the fit ends.
    """

    rank: int | None = None
    temperature: bool = False
    start: Literal["regression", "identity"] = "regression"
    baseline: bool = True
    epochs: int = 1
    steps: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 1e-3
    warmup: float = 0.1
    clip: float = 1.0
    evaluate_every: int | None = None
    patience: int = 4

    def __post_init__(self) -> None:
        if self.start not in ("regression", "identity"):
            raise ConfigError(f"start is '{self.start}'; use 'regression' or 'identity'")
        for name in ("rank", "epochs", "steps", "evaluate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; give at least 1")
        rate = self.learning_rate
        if (rate is not None and not rate > 0) or not 0 <= self.warmup < 1 or not self.clip > 0:
            raise ConfigError("learning_rate and clip must be positive, warmup in 0 to 1")

    def rates(self, nats: Float[Tensor, " layer"], d_model: int) -> Float[Tensor, " layer"]:
        """Return the highest learning rate of each row index, from the KL of its start."""
        if self.learning_rate is not None:
            return torch.full_like(nats, self.learning_rate)
        bits = (nats / math.log(2.0)).nan_to_num(posinf=1.0).clamp_min(0.0)
        return (min(0.02, 4 / d_model) * bits**0.4).clamp_max(0.04)

    def check(self, d_model: int) -> None:
        """Raise ConfigError where the rank is beyond the model's width."""
        if self.rank is not None and self.rank > d_model:
            raise ConfigError(f"rank {self.rank} is beyond the width of the model, {d_model}")
