"""What a patching run does: sites, positions, metrics, direction, and how much it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerscope.errors import ConfigError
from layerscope.interventions.patching import (
    DEFAULT_BUDGET,
    KINDS,
    Direction,
    Where,
    metric_of,
)
from layerscope.products import Products


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Settings of a patching run.

    Attributes:
        sites: kinds of sites, each a sweep of its own: keys of `KINDS`.
        positions: "each" position (or label) for itself, the "last" token, or "all" at once; heads,
            neurons and what lies inside attention default to "last", all others to "each".
        metrics: names of `METRICS`; the first is the one that is ranked and drawn.
        direction: "denoise" puts clean values into the corrupt run, "noise" the other way about.
        layers: blocks to patch; None for all.
        units: heads or neurons; None for all.
        answered: what counts as answering a clean prompt: answers above the foils ("foil"; best of
            all where there is no foil), or an answer best of all ("top1").
        keep_wrong: also patch pairs whose clean prompt the model does not answer.
        verify: cells per sweep of a pair that are computed a second time, by a full pass each.
        control: also patch the strongest cells with another pair's values.
        budget_bytes: what a batch of cells may take.
        max_seconds, max_bytes: refuse a run that is predicted to take more.
    """

    sites: tuple[str, ...] = ("resid_pre",)
    positions: Mapping[str, Where] | Where | None = None
    metrics: tuple[str, ...] = ("logit_diff",)
    direction: Direction = "denoise"
    layers: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    answered: Literal["foil", "top1"] = "foil"
    keep_wrong: bool = False
    verify: int = 1
    control: bool = True
    products: Products = "default"
    budget_bytes: int = DEFAULT_BUDGET
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.sites or not self.metrics:
            raise ConfigError("a patching run needs at least one kind of site and one metric")
        for name in self.metrics:
            metric_of(name)
        if self.direction not in ("denoise", "noise"):
            raise ConfigError(f"direction={self.direction!r}; use 'denoise' or 'noise'")
        if self.answered not in ("foil", "top1"):
            raise ConfigError(f"answered={self.answered!r}; use 'foil' or 'top1'")
        if self.verify < 0 or self.budget_bytes <= 0:
            raise ConfigError("verify must not be negative, and budget_bytes must be positive")

    def where(self, kind: str) -> Where:
        """Return the positions at which sites of a kind are patched."""
        inner = KINDS.get(kind, ("", False))[1]
        default: Where = "last" if inner else "each"
        if self.positions is None:
            return default
        if isinstance(self.positions, str):
            return self.positions
        return self.positions.get(kind, default)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)
