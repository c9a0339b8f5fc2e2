"""From a table of rows to one summary: every milestone, every check, and what to make of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerscope.errors import TableError
from layerscope.measures.ablation import ablation_summary
from layerscope.measures.config import MeasureConfig
from layerscope.measures.control import control_summary
from layerscope.measures.guidance import guide
from layerscope.measures.health import numeric_health
from layerscope.measures.last_row import last_row_consistency
from layerscope.measures.micro_suite import fact_entry, micro_suite
from layerscope.measures.pass_summary import PassSummary, summarise_pass
from layerscope.measures.raw_norm import RawNorm, window_radius
from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.semantics import confirmed_semantics
from layerscope.measures.table import SCHEMA_VERSION, LayersTable
from layerscope.measures.trajectory import norm_trajectory

PRIMARY_LENS = "norm"


@dataclass(frozen=True)
class Summary:
    """What a table says. `sections` holds the checks by name, JSON-able; see `to_dict`."""

    table: LayersTable
    config: MeasureConfig
    passes: tuple[PassSummary, ...]
    baseline: int
    sections: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return one JSON-able dict; values that are not finite become null."""
        meta = self.table.meta
        head: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "model": meta.model,
            "n_layers": meta.n_layers,
            "d_vocab": meta.d_vocab,
            "norm_choice": meta.norm_choice,
            "config": self.config.to_dict(),
            "passes": [item.to_dict() for item in self.passes],
            "baseline": self.baseline,
        }
        return finite(head | dict(self.sections))


def finite(value: Any) -> Any:
    """Return the value with every NaN and infinity in it replaced by None, tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def summarise(table: LayersTable, config: MeasureConfig | None = None) -> Summary:
    """Recompute every milestone and check of a table; raises TableError when it has no rows."""
    return _Summariser(table, config or MeasureConfig()).run()


class _Summariser:
    def __init__(self, table: LayersTable, config: MeasureConfig) -> None:
        self.table, self.config, self.meta = table, config, table.meta
        self.rows = pass_rows(table)
        if not self.rows:
            raise TableError(
                "the table has no last-position rows of a pass in its metadata; nothing to measure"
            )
        lenses = table.lenses
        self.lens = PRIMARY_LENS if PRIMARY_LENS in lenses else lenses[0]
        self.main = [part for (_, lens), part in self.rows.items() if lens == self.lens]
        self.facts = [
            part
            for part in self.main
            if part.prompt.prompt_id == "pos" and part.prompt.prompt_variant == "orig"
        ]

    def run(self) -> Summary:
        checks = {part.prompt.prompt_index: self._raw_norm(part) for part in self.main}
        confirmed = {
            part.prompt.prompt_index: confirmed_semantics(part, self._others(part), self.config)
            for part in self.main
        }
        radii = {
            index: window_radius(check.sample(self.config), self.config) if check else None
            for index, check in checks.items()
        }
        passes: dict[tuple[int, str], PassSummary] = {}
        for (index, lens), part in self.rows.items():
            passes[index, lens] = summarise_pass(
                part,
                self.config,
                d_vocab=self.meta.d_vocab,
                raw=self.rows.get((index, "raw")) if lens != "raw" else None,
                radius=radii.get(index) or self.config.window_radius,
                confirmed=confirmed.get(index) if lens == self.lens else None,
            )
        base = (self.facts or self.main)[0]
        sections = self._sections(base, passes, checks, radii, confirmed)
        order = list(passes)
        return Summary(
            table=self.table,
            config=self.config,
            passes=tuple(passes.values()),
            baseline=order.index((base.prompt.prompt_index, self.lens)),
            sections=sections,
        )

    def _others(self, part: PassRows) -> dict[str, PassRows]:
        index = part.prompt.prompt_index
        return {
            lens: other
            for (number, lens), other in self.rows.items()
            if number == index and lens != self.lens
        }

    def _raw_norm(self, part: PassRows) -> RawNorm | None:
        raw = self.rows.get((part.prompt.prompt_index, "raw"))
        return RawNorm(part, raw) if raw is not None and self.lens != "raw" else None

    def _sections(
        self,
        base: PassRows,
        passes: dict[tuple[int, str], PassSummary],
        checks: dict[int, RawNorm | None],
        radii: dict[int, int | None],
        confirmed: dict[int, dict[str, Any]],
    ) -> dict[str, Any]:
        def found(part: PassRows) -> PassSummary:
            return passes[part.prompt.prompt_index, self.lens]

        sections: dict[str, Any] = {"primary_lens": self.lens, "lenses": self.table.lenses}
        sections["confirmed_semantics"] = {
            _key(part): confirmed[part.prompt.prompt_index] for part in self.facts
        }
        for name in ("raw_lens_check", "raw_lens_window", "raw_lens_full"):
            sections[name] = {}
        for part in self.facts:
            index = part.prompt.prompt_index
            check, radius = checks[index], radii[index]
            if check is None or radius is None:
                continue
            sections["raw_lens_check"][_key(part)] = check.sample(self.config)
            sections["raw_lens_window"][_key(part)] = check.window(
                _centers(found(part)), radius=radius
            )
            sections["raw_lens_full"][_key(part)] = check.full(self.config)
        sections["last_layer_consistency"] = [
            last_row_consistency(part, self.meta, self.config) for part in self.main
        ]
        sections["control_summary"] = self._controls()
        sections["ablation_summary"] = self._ablations(found)
        sections["norm_trajectory"] = norm_trajectory(
            base, self.config, semantic=found(base).milestones["L_semantic"].first
        )
        sections["numeric_health"] = numeric_health(self.table, lens=self.lens)
        sections["micro_suite"] = self._micro(found, confirmed)
        sections["gold_alignment"] = self._alignment()
        sections["unembed_bias"] = dict(self.meta.unembed_bias) if self.meta.unembed_bias else None
        sections["copy_mask"] = {
            "size": self.meta.ignored_token_count,
            "ignored_token_str_sample": list(self.meta.ignored_token_sample),
        }
        sections["measurement_guidance"] = guide(
            [found(part) for part in self.facts or self.main],
            sections,
            self.config,
            meta=self.meta,
        )
        return sections

    def _controls(self) -> dict[str, Any] | None:
        """Return the first control's summary, and all of them under `controls`."""
        found = [
            control_summary(part, self.config)
            for part in self.main
            if part.prompt.prompt_id == "ctl"
        ]
        return {**found[0], "controls": found} if found else None

    def _ablations(self, found: Any) -> dict[str, Any]:
        ablated = {
            part.prompt.fact_key: part
            for part in self.main
            if part.prompt.prompt_id == "pos" and part.prompt.prompt_variant == "no_filler"
        }
        return {
            _key(part): ablation_summary(
                found(part).milestones, found(ablated[part.prompt.fact_key]).milestones
            )
            for part in self.facts
            if part.prompt.fact_key in ablated
        }

    def _micro(self, found: Any, confirmed: dict[int, dict[str, Any]]) -> dict[str, Any]:
        starts: dict[int, int] = {}
        count = 0
        for part in self.main:
            starts[part.prompt.prompt_index] = count
            count += len(part.layers)
        entries: list[dict[str, Any]] = []
        for part in self.facts:
            index, summary = part.prompt.prompt_index, found(part).to_dict()
            layer = summary["L_semantic"]
            at = None if layer is None else int((part.layers < layer).sum())
            entries.append(
                fact_entry(
                    summary,
                    confirmed=confirmed[index]["L_semantic_confirmed"],
                    row_index=None if at is None else starts[index] + at,
                    n_layers=self.meta.n_layers,
                )
            )
        return micro_suite(entries)

    def _alignment(self) -> dict[str, Any]:
        prompts = self.meta.prompts
        partial = [
            {
                "prompt_index": prompt.prompt_index,
                "fact_key": prompt.fact_key,
                "prompt_id": prompt.prompt_id,
                "prompt_variant": prompt.prompt_variant,
                "status": prompt.alignment_status,
            }
            for prompt in prompts
            if prompt.alignment_status != "ok"
        ]
        rate = 1.0 - len(partial) / len(prompts) if prompts else None
        return {"rate": rate, "n": len(prompts), "partial": partial}


def _key(part: PassRows) -> str:
    return part.prompt.fact_key or f"prompt {part.prompt.prompt_index}"


def _centers(summary: PassSummary) -> list[int]:
    """Return the layers that the window check looks at: onset, near-onset, convergence and echo."""
    layers = {name: item.first for name, item in summary.milestones.items()}
    soft = [layer for layer in summary.fields["L_copy_soft"].values() if layer is not None]
    wanted = [layers.get(name) for name in ("L_semantic", "first_rank_le_5", "first_kl_below_1.0")]
    wanted += [layers["L_copy"], min(soft) if soft else None]
    return sorted({layer for layer in wanted if layer is not None})
