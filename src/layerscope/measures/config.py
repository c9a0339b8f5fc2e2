"""Every threshold of the measures, in one frozen object that travels with each summary."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from layerscope.errors import ConfigError
from layerscope.measures.table import JACCARD_K


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Thresholds of all detectors; defaults are those of the layer-lens reference definitions.

    Probabilities lie in [0, 1], divergences and entropies are bits, gaps are logits, radii and
    windows count rows. Raises ConfigError for values outside their range.
    """

    # echo of the prompt
    copy_threshold: float = 0.95
    copy_margin: float = 0.10
    copy_window_k: int = 1
    copy_thresholds: tuple[float, ...] = (0.70, 0.80, 0.90, 0.95)
    copy_soft_threshold: float = 0.50
    copy_soft_window_ks: tuple[int, ...] = (1, 2, 3)
    copy_soft_extra_thresholds: tuple[float, ...] = ()
    entropy_collapse_bits: float = 1.0
    # onset of the answer
    rank_thresholds: tuple[int, ...] = (1, 5, 10)
    kl_thresholds_bits: tuple[float, ...] = (0.5, 1.0)
    cos_thresholds: tuple[float, ...] = (0.2, 0.4, 0.6)
    semantic_margin: float = 0.002  # probability above uniform
    semantic_gap: float = 0.5  # logits between the answer and the runner-up
    gap_thresholds: tuple[float, ...] = (0.5, 1.0)
    confirm_window: int = 2
    # surface and geometry
    surface_delta: float = 0.05
    geom_gamma: float = 0.02
    topk_decay_k: int = JACCARD_K  # fixed when a table is made; here for the record
    topk_decay_tau: float = 0.33
    # control
    control_gap: float = 0.5
    control_margin: float = 0.05  # of the robust version that must stay true
    # raw against norm
    raw_kl_high_bits: float = 1.0
    raw_kl_medium_bits: float = 0.5
    window_radius: int = 4
    window_radius_high: int = 8
    js_threshold_bits: float = 0.1
    l1_threshold: float = 0.5
    jaccard_threshold: float = 0.5
    score_weights: tuple[float, float, float] = (0.6, 0.3, 0.1)
    score_tiers: tuple[float, float] = (0.2, 0.5)
    score_v2_addends: tuple[float, float] = (0.1, 0.05)
    # last row against the model's head
    last_row_kl_bits: float = 0.25
    last_row_exact_bits: float = 0.01
    # norm trajectory
    spike_ratio: float = 3.0
    spike_cos: float = 0.8
    plateau_slope: float = 0.01
    monotonic_r2: float = 0.70
    growth_z: float = 8.0
    growth_factor: float = 3.0
    # the same prompt twice
    repeat_rank_dev: float = 5.0
    repeat_flip_rate: float = 0.02
    repeat_tolerance_layers: int = 1
    repeat_jaccard: float = 0.5
    # another norm, scaled logits, another lens
    decoding_jaccard: float = 0.5
    gate_scales: tuple[float, ...] = (0.90, 0.95, 1.05, 1.10)
    gate_pass_share: float = 0.75
    consistency_min: float = 0.30
    # other positions
    position_share: float = 0.5
    position_in_dist: float = 0.92  # fractions of the sequence up to here were trained on
    position_ood: float = 0.96  # and from here on were not
    # the tuned lens
    tuned_rotation_bits: float = 0.2
    tuned_temperature_share: float = 0.8
    prefer_tuned_rows: int = 2
    prefer_tuned_depth: float = 0.05
    skip_increase: float = 0.05  # of perplexity, with 2 blocks left out

    def __post_init__(self) -> None:
        self._check_unit()
        self._check_lengths()
        self._check_counts()
        self._check_scales()
        self._check_labels()

    def _check_unit(self) -> None:
        unit = {
            "copy_threshold": self.copy_threshold,
            "copy_margin": self.copy_margin,
            "copy_soft_threshold": self.copy_soft_threshold,
            **_numbered("copy_thresholds", self.copy_thresholds),
            **_numbered("copy_soft_extra_thresholds", self.copy_soft_extra_thresholds),
            "semantic_margin": self.semantic_margin,
            "surface_delta": self.surface_delta,
            "topk_decay_tau": self.topk_decay_tau,
            "control_margin": self.control_margin,
        }
        for name, value in unit.items():
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}; it is a probability and must be in [0, 1]")
        for name in (
            *("repeat_flip_rate", "repeat_jaccard", "decoding_jaccard", "gate_pass_share"),
            *("position_share", "position_in_dist", "position_ood", "prefer_tuned_depth"),
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it is a share and must be in [0, 1]"
                )

    def _check_lengths(self) -> None:
        """Refuse tuples whose entries have a meaning each and that are too short or too long."""
        parts = {
            "score_weights": "share of rows, any norm-only row, largest KL",
            "score_tiers": "where medium begins, where it ends",
            "score_v2_addends": "median JS, median L1",
        }
        for name, meaning in parts.items():
            given: tuple[float, ...] = getattr(self, name)
            wanted = len(meaning.split(","))
            if len(given) != wanted or not all(math.isfinite(value) for value in given):
                raise ConfigError(f"{name} is {given}; give {wanted} numbers ({meaning})")
        if self.score_tiers[0] > self.score_tiers[1]:
            raise ConfigError(f"score_tiers is {self.score_tiers}; give the lower one first")

    def _check_counts(self) -> None:
        windows = (self.copy_window_k, *self.copy_soft_window_ks)
        if not self.copy_soft_window_ks or min(windows) < 1:
            raise ConfigError("copy windows must have a length of at least 1; give e.g. 1,2,3")
        if self.rank_thresholds and min(self.rank_thresholds) < 1:
            raise ConfigError(f"rank_thresholds is {self.rank_thresholds}; ranks begin at 1")
        for name in (
            *("confirm_window", "window_radius", "window_radius_high"),
            *("repeat_tolerance_layers", "prefer_tuned_rows"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; it counts rows, give 0 or more"
                )
        if self.topk_decay_k != JACCARD_K:
            raise ConfigError(
                f"topk_decay_k is {self.topk_decay_k}; tables hold the mass of the {JACCARD_K} "
                f"most likely tokens and no other, leave it at {JACCARD_K}"
            )

    def _check_scales(self) -> None:
        """Refuse what cannot divide, or compare, a divergence or a length."""
        for name in ("js_threshold_bits", "l1_threshold", "growth_factor"):
            value: float = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it divides, give a number above 0")
        if not self.gate_scales or not all(0.0 < s < math.inf for s in self.gate_scales):
            raise ConfigError(f"gate_scales is {self.gate_scales}; give numbers above 0, e.g. 0.9")
        if not self.raw_kl_medium_bits <= self.raw_kl_high_bits:
            raise ConfigError(
                f"raw_kl_medium_bits is {self.raw_kl_medium_bits}; give at most raw_kl_high_bits, "
                f"which is {self.raw_kl_high_bits}"
            )

    def _check_labels(self) -> None:
        """Refuse thresholds that would share a column or milestone: repeats, or nearly so."""
        for name in (
            *("copy_thresholds", "copy_soft_extra_thresholds", "copy_soft_window_ks"),
            *("rank_thresholds", "kl_thresholds_bits", "cos_thresholds", "gap_thresholds"),
        ):
            given: tuple[float, ...] = getattr(self, name)
            if not all(math.isfinite(value) for value in given):
                raise ConfigError(f"{name} is {given}; give finite numbers")
            if len({trimmed(value) for value in given}) < len(given):
                raise ConfigError(
                    f"{name} is {given}; name each value once (they count to 6 decimals)"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return every threshold under its name, tuples as lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def _numbered(name: str, values: tuple[float, ...]) -> dict[str, float]:
    return {f"{name}[{index}]": value for index, value in enumerate(values)}


def trimmed(value: float) -> str:
    """Format a threshold as in column labels: trailing zeros are dropped (0.70 -> 0.7)."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def decimal(value: float) -> str:
    """Format a threshold as in milestone names: at least one decimal (1 -> 1.0, 0.25 -> 0.25)."""
    text = trimmed(value)
    return text if "." in text else f"{text}.0"
