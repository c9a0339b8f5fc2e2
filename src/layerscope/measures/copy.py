"""Echo of the prompt: rows whose most likely tokens are a stretch of the prompt itself.

Definitions after the layer-lens reference definitions. A window of length k holds the top-1 ids of
k consecutive layers of one pass through one lens; a new pass starts with an empty window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from layerscope.errors import TableError
from layerscope.measures.config import MeasureConfig, trimmed
from layerscope.measures.detectors import (
    Milestone,
    depth_fraction,
    difference,
    milestone,
)
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.table import LayersTable


@dataclass(frozen=True)
class Flag:
    """One flag per row, and where it is known (a flag that is not known is not true)."""

    true: Bool[np.ndarray, " row"]
    known: Bool[np.ndarray, " row"]


def strict_label(threshold: float) -> str:
    """Return the column name of a strict flag, e.g. copy_strict@0.95."""
    return f"copy_strict@{trimmed(threshold)}"


def soft_label(k: int, threshold: float) -> str:
    """Return the column name of a soft flag, e.g. copy_soft_k2@0.5."""
    return f"copy_soft_k{k}@{trimmed(threshold)}"


def flag_columns(config: MeasureConfig) -> list[str]:
    """Return the flag columns of a table in their published order, without repeats."""
    labels = [strict_label(config.copy_threshold)]
    labels += [strict_label(tau) for tau in config.copy_thresholds]
    labels += [soft_label(k, config.copy_soft_threshold) for k in config.copy_soft_window_ks]
    labels += [
        soft_label(k, tau)
        for tau in sorted(config.copy_soft_extra_thresholds)
        for k in sorted(config.copy_soft_window_ks)
    ]
    return list(dict.fromkeys(labels))


def in_prompt(
    top1: list[int | None], prompt_ids: tuple[int, ...], *, k: int
) -> Bool[np.ndarray, " row"]:
    """Say per row whether the last k top-1 ids are a contiguous stretch of the prompt.

    Rows before the window is full, windows with an unknown id and empty prompts are false.
    """
    stretches = {prompt_ids[i : i + k] for i in range(len(prompt_ids) - k + 1)}
    windows = (tuple(top1[max(0, i - k + 1) : i + 1]) for i in range(len(top1)))
    return np.array([window in stretches for window in windows], dtype=bool)


def margin_exceeds(
    p1: Float[np.ndarray, " row"], p2: Float[np.ndarray, " row"], margin: float
) -> Bool[np.ndarray, " row"]:
    """Say where p1 - p2 > margin; an unknown p2 is taken at its largest possible value, 1 - p1."""
    runner_up = np.where(np.isnan(p2), 1.0 - p1, p2)
    return p1 - runner_up > margin


class CopyFlags:
    """Flags of one pass: from token ids where the prompt's are known, else as published."""

    def __init__(self, part: PassRows, config: MeasureConfig) -> None:
        self._part, self._config = part, config
        self._p1, self._p2 = (part.entry_floats("top_probs", index) for index in (0, 1))
        self._echoes: dict[int, Bool[np.ndarray, " row"]] = {}
        published = any(name.startswith(STRICT) for name in part.names)
        self._as_published = published and not part.prompt.prompt_ids

    def _echo(self, k: int) -> Bool[np.ndarray, " row"]:
        """Say where the window of k layers is a stretch of the prompt; the same for every tau."""
        if k not in self._echoes:
            top1 = self._part.entries("top_ids", 0)
            self._echoes[k] = in_prompt(top1, self._part.prompt.prompt_ids, k=k)
        return self._echoes[k]

    def strict(self, threshold: float) -> Flag:
        """Top-1 stretch in the prompt, p1 > threshold, p1 - p2 > margin, top-1 not ignorable."""
        confident = (self._p1 > threshold) & margin_exceeds(
            self._p1, self._p2, self._config.copy_margin
        )
        if self._as_published:
            return self._tighten(STRICT, threshold, confident)
        echo = self._echo(self._config.copy_window_k)
        return _all_known(echo & confident & ~self._part.true("top1_ignorable"))

    def soft(self, k: int, threshold: float) -> Flag:
        """Top-1 stretch of exactly k layers in the prompt and p1 > threshold; nothing else."""
        confident = self._p1 > threshold
        if self._as_published:
            return self._tighten(f"copy_soft_k{k}@", threshold, confident)
        return _all_known(self._echo(k) & confident)

    def _tighten(self, stem: str, threshold: float, confident: Bool[np.ndarray, " row"]) -> Flag:
        """Derive a flag from the published one of the nearest threshold that is not above it."""
        columns = {
            float(name.removeprefix(stem)): name
            for name in self._part.names
            if name.startswith(stem)
        }
        below = [tau for tau in columns if tau <= threshold]
        margin = self._config.copy_margin if stem == STRICT else PUBLISHED_MARGIN
        if not below or margin < PUBLISHED_MARGIN:
            known = ", ".join(trimmed(tau) for tau in sorted(columns)) or "none"
            raise TableError(
                f"{stem}{trimmed(threshold)} cannot be recomputed from this table: it lacks the "
                f"prompt's token ids and holds such flags for thresholds {known}, margin "
                f"{PUBLISHED_MARGIN}; give a threshold and a margin that are not below those, and "
                "window lengths that it has"
            )
        name = columns[max(below)]
        base = self._part.true(name)
        if max(below) == threshold and margin == PUBLISHED_MARGIN:
            return Flag(true=base, known=self._part.known(name))
        return Flag(true=base & confident, known=self._part.known(name))


STRICT = "copy_strict@"
PUBLISHED_MARGIN = 0.10  # behind the flags of published tables


def _all_known(true: Bool[np.ndarray, " row"]) -> Flag:
    return Flag(true=true, known=np.ones(len(true), dtype=bool))


def entropy_collapse(part: PassRows, config: MeasureConfig) -> Bool[np.ndarray, " row"]:
    """Say where the entropy is at most the collapse threshold (inclusive)."""
    return part.floats("entropy_bits") <= config.entropy_collapse_bits


def stability_tag(layers: dict[float, int | None], *, n_layers: int) -> str:
    """Say how much the copy layer depends on the threshold: none, stable, mixed or fragile.

    Compares the lowest with the highest threshold: stable when they differ by at most 2 rows or 5%
    of the depth, fragile from 6 rows or 15% on; a missing end is mixed.
    """
    if all(layer is None for layer in layers.values()):
        return "none"
    low, high = layers[min(layers)], layers[max(layers)]
    if low is None or high is None:
        return "mixed"
    distance = abs(high - low)
    if distance <= 2 or distance / n_layers <= 0.05:
        return "stable"
    return "fragile" if distance >= 6 or distance / n_layers >= 0.15 else "mixed"


def norm_only_flag(
    layer: int | None, raw: PassRows | None, flag: Flag | None, *, radius: int
) -> bool | None:
    """Say whether no raw-lens row within `radius` rows of `layer` carries the same strict flag.

    None when there is no such layer, no raw lens, or a raw flag nearby that is not known.
    """
    if layer is None or raw is None or flag is None:
        return None
    near = np.abs(raw.layers - layer) <= radius
    if (flag.true & near).any():
        return False
    return True if (flag.known | ~near).all() and near.any() else None


def copy_summary(
    part: PassRows,
    config: MeasureConfig,
    *,
    raw: PassRows | None = None,
    radius: int,
    semantic: int | None,
) -> tuple[dict[str, Any], dict[str, Milestone]]:
    """Return the published copy fields of one pass and its copy milestones."""
    flags, layers, n = CopyFlags(part, config), part.layers, part.n_layers

    def find(flag: Bool[np.ndarray, " row"]) -> Milestone:
        return milestone(flag, layers, n_layers=n)

    strict = find(flags.strict(config.copy_threshold).true)
    collapse = find(entropy_collapse(part, config))
    soft = {
        k: find(flags.soft(k, config.copy_soft_threshold).true) for k in config.copy_soft_window_ks
    }
    sweep = {tau: find(flags.strict(tau).true) for tau in config.copy_thresholds}
    raw_flags = CopyFlags(raw, config) if raw is not None else None
    names = {tau: trimmed(tau) for tau in sweep}
    fields: dict[str, Any] = {
        "L_copy": strict.first,
        "L_copy_H": collapse.first,
        "delta_layers": difference(semantic, strict.first),
        "copy_thresh": config.copy_threshold,
        "copy_window_k": config.copy_window_k,
        "copy_match_level": "id_subsequence",
        "copy_soft_threshold": config.copy_soft_threshold,
        "copy_soft_window_ks": list(config.copy_soft_window_ks),
        "L_copy_soft": {str(k): found.first for k, found in soft.items()},
        "delta_layers_soft": {
            str(k): difference(semantic, found.first) for k, found in soft.items()
        },
        "copy_detector": _detector(config, strict, soft, semantic),
        "copy_thresholds": {
            "tau_list": list(config.copy_thresholds),
            "L_copy_strict": {names[tau]: found.first for tau, found in sweep.items()},
            "L_copy_strict_frac": {names[tau]: found.fraction for tau, found in sweep.items()},
            "norm_only_flags": {
                names[tau]: norm_only_flag(
                    found.first, raw, _raw_strict(raw_flags, tau), radius=radius
                )
                for tau, found in sweep.items()
            },
            "stability": stability_tag(
                {tau: found.first for tau, found in sweep.items()}, n_layers=n
            ),
        },
    }
    found = {"L_copy": strict, "L_copy_H": collapse}
    found |= {f"L_copy_soft_k{k}": item for k, item in soft.items()}
    found |= {f"L_copy_strict@{names[tau]}": item for tau, item in sweep.items()}
    for tau in config.copy_soft_extra_thresholds:
        for k in config.copy_soft_window_ks:
            found[f"L_copy_soft_k{k}@{trimmed(tau)}"] = find(flags.soft(k, tau).true)
    return fields, found


def _raw_strict(flags: CopyFlags | None, tau: float) -> Flag | None:
    return None if flags is None else flags.strict(tau)


def _detector(
    config: MeasureConfig, strict: Milestone, soft: dict[int, Milestone], semantic: int | None
) -> dict[str, Any]:
    return {
        "strict": {
            "thresh": config.copy_threshold,
            "k": config.copy_window_k,
            "L_copy_strict": strict.first,
        },
        "soft": {
            "thresh": config.copy_soft_threshold,
            "window_ks": list(config.copy_soft_window_ks),
            "L_copy_soft": {f"k{k}": found.first for k, found in soft.items()},
        },
        "deltas": {
            "Δ_sem_minus_copy_strict": difference(semantic, strict.first),
            "Δ_sem_minus_copy_soft": {
                f"k{k}": difference(semantic, found.first) for k, found in soft.items()
            },
        },
    }


def copy_fractions(fields: dict[str, Any], *, n_layers: int) -> dict[str, float | None]:
    """Return the depth fractions of the copy milestones under their published names."""
    soft: dict[str, int | None] = fields["L_copy_soft"]
    return {"L_copy_strict_frac": depth_fraction(fields["L_copy"], n_layers)} | {
        f"L_copy_soft_k{k}_frac": depth_fraction(layer, n_layers) for k, layer in soft.items()
    }


def with_copy_flags(table: LayersTable, config: MeasureConfig | None = None) -> LayersTable:
    """Add copy_collapse and the flag columns of `flag_columns` to a table's last-position rows.

    Other rows get nulls. Columns that a published table brought along are replaced by equal ones.
    """
    config = config or MeasureConfig()
    names = ["copy_collapse", *flag_columns(config)]
    parts = list(pass_rows(table).values())
    rows = table.rows.drop(names, strict=False)
    if not parts:
        empty = [pl.lit(None, pl.Boolean).alias(name) for name in names]
        return LayersTable(rows=rows.with_columns(empty), meta=table.meta)
    found = [_flags_by_column(part, config) for part in parts]
    heights = [len(part.layers) for part in parts]
    flags = pl.DataFrame(
        {
            "prompt_index": np.repeat([part.prompt.prompt_index for part in parts], heights),
            "lens": np.repeat([part.lens for part in parts], heights),
            "layer": np.concatenate([part.layers for part in parts]),
            "is_last": np.ones(sum(heights), dtype=bool),
            **{name: _nullable([columns[name] for columns in found]) for name in names},
        },
        schema_overrides={"prompt_index": pl.Int32, "lens": pl.String, "layer": pl.Int32},
    )
    keys = ["prompt_index", "lens", "layer", "is_last"]
    return LayersTable(
        rows=rows.join(flags, on=keys, how="left", maintain_order="left"), meta=table.meta
    )


def _flags_by_column(part: PassRows, config: MeasureConfig) -> dict[str, Flag]:
    flags = CopyFlags(part, config)
    columns = {
        strict_label(tau): flags.strict(tau)
        for tau in (config.copy_threshold, *config.copy_thresholds)
    }
    for tau in (config.copy_soft_threshold, *config.copy_soft_extra_thresholds):
        for k in config.copy_soft_window_ks:
            columns[soft_label(k, tau)] = flags.soft(k, tau)
    return {"copy_collapse": columns[strict_label(config.copy_threshold)], **columns}


def _nullable(flags: Sequence[Flag]) -> pl.Series:
    """Join the flags of several passes into one column, null where a flag is not known."""
    true = pl.Series(np.concatenate([flag.true for flag in flags]))
    known = pl.Series(np.concatenate([flag.known for flag in flags]))
    return true.set(~known, None)
