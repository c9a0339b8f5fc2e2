"""What a back-patching run does: from which blocks into which, at which positions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerscope.errors import ConfigError
from layerscope.interventions.patching import DEFAULT_BUDGET, metric_of
from layerscope.products import Products


@dataclass(frozen=True, kw_only=True)
class BackPatchConfig:
    """Settings of a back-patching run.

    Attributes:
        positions: the "last" token, or "each" label (each token but the BOS, without labels).
        sources: blocks whose input is taken. targets: blocks that read it instead of their own;
            None for all. Every source above a target is a cell.
        metric: beside the answer's rank, which decides whether a prompt is answered.
        max_new_tokens: of the texts that the best cell is judged by.
        verify: cells of a prompt that are computed a second time, by a full pass each.
        seed: of the controls' positions and layers.
    """

    positions: Literal["last", "each"] = "last"
    sources: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None
    metric: str = "logprob"
    max_new_tokens: int = 8
    verify: int = 1
    seed: int = 0
    products: Products = "default"
    budget_bytes: int = DEFAULT_BUDGET
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if metric_of(self.metric).name == "rank":
            raise ConfigError("the rank is measured in any case; choose logprob or another metric")
        if self.positions not in ("last", "each"):
            raise ConfigError(f"positions={self.positions!r}; use 'last' or 'each'")
        if self.verify < 0 or min(self.max_new_tokens, self.budget_bytes) < 1:
            raise ConfigError("verify must not be negative, max_new_tokens and budget be positive")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)
