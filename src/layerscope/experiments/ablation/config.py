"""What an ablation run does: what is taken away, where, and what is put in its place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerscope.errors import ConfigError, nearest
from layerscope.experiments.patching.gather import AnsweredBy
from layerscope.interventions.patching import DEFAULT_BUDGET, KINDS, metric_of
from layerscope.interventions.patching.ablations import ABLATIONS, Ablation
from layerscope.products import Products

ABLATED = tuple(kind for kind in KINDS if kind != "pattern")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Settings of an ablation run.

    Attributes:
        sites: kinds of sites, each a sweep of its own.
        how: what is put in place, each for itself: "zero"; the "mean" over all tokens of the
            reference prompts; "position_mean", position by position over those of the same length;
            "resample", the values of one of these; "noise" on the prompt's own value, of
            `noise_factor` times the standard deviation over the reference.
        positions: "all" at once, "each" by itself, or the "last". A BOS is never touched, nor does
            it count in a mean: it is the same in every prompt, and large.
        metrics: the first is ranked; None for logit_diff (logprob where a prompt has no foil) and
            kl.
        layers, units: None for all.
        draws: random disturbances beside each of the strongest, and random sets beside the top
            sets.
        sets: sizes of the sets of strongest nodes that are ablated together.
        verify: cells of a prompt and kind that are computed a second time, by a full pass each.
    """

    sites: tuple[str, ...] = ("heads",)
    how: tuple[Ablation, ...] = ("mean",)
    positions: Literal["all", "each", "last"] = "all"
    metrics: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    noise_factor: float = 1.0
    draws: int = 3
    sets: tuple[int, ...] = (2, 5, 10)
    answered: AnsweredBy = "foil"
    keep_wrong: bool = False
    verify: int = 1
    seed: int = 0
    products: Products = "default"
    budget_bytes: int = DEFAULT_BUDGET
    max_seconds: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.sites or not self.how:
            raise ConfigError("an ablation needs at least one kind of site and one way")
        for kind in self.sites:
            if kind == "pattern":
                raise ConfigError(
                    "a pattern without a head is none: ablate heads, or patch the pattern"
                )
        for way in self.how:
            if way not in ABLATIONS:
                raise ConfigError(
                    f"unknown ablation '{way}'{nearest(way, ABLATIONS)}; use {', '.join(ABLATIONS)}"
                )
        for name in self.metrics or ():
            metric_of(name)
        if self.positions not in ("all", "each", "last"):
            raise ConfigError(f"positions={self.positions!r}; use 'all', 'each' or 'last'")
        if self.answered not in ("foil", "top1"):
            raise ConfigError(f"answered={self.answered!r}; use 'foil' or 'top1'")
        if min(self.verify, self.draws) < 0 or self.budget_bytes <= 0:
            raise ConfigError("verify and draws must not be negative, budget_bytes be positive")
        if any(size < 2 for size in self.sets):
            raise ConfigError("a set is of 2 or more; leave sets empty for none")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)
