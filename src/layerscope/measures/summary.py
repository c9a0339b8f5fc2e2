"""From a table of rows to one summary: every milestone, every check, and what to make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerscope.errors import TableError
from layerscope.files import finite
from layerscope.measures.ablation import ablation_summary
from layerscope.measures.config import MeasureConfig, decimal
from layerscope.measures.control import control_summary
from layerscope.measures.guidance import guide
from layerscope.measures.health import numeric_health
from layerscope.measures.last_row import last_row_consistency
from layerscope.measures.lens_compare import (
    attribute,
    beside_norm,
    compare_lenses,
    preferred_lens,
    tau_section,
)
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


def summarise(
    table: LayersTable,
    config: MeasureConfig | None = None,
    *,
    diagnostics: Mapping[str, Any] | None = None,
    left_out: Sequence[Mapping[str, Any]] = (),
) -> Summary:
    """Recompute every milestone and check of a table; raises TableError when it has no rows.

    `diagnostics` are sections by name that need the model again; they are kept as they are.
    `left_out` are prompts that are not in the table; those of stage "alignment" count as answers
    that could not be aligned.
    """
    unaligned = [entry for entry in left_out if entry["stage"] == "alignment"]
    return _Summariser(table, config or MeasureConfig(), diagnostics or {}, unaligned).run()


class _Summariser:
    def __init__(
        self,
        table: LayersTable,
        config: MeasureConfig,
        diagnostics: Mapping[str, Any],
        unaligned: Sequence[Mapping[str, Any]],
    ) -> None:
        self.table, self.config, self.meta = table, config, table.meta
        self.diagnostics, self.unaligned = diagnostics, unaligned
        self.rows = pass_rows(table)
        if not self.rows:
            raise TableError(
                "the table has no last-position rows of a pass in its metadata; nothing to measure"
            )
        self.lenses = table.lenses
        self.lens = PRIMARY_LENS if PRIMARY_LENS in self.lenses else self.lenses[0]
        self.main = [part for (_, lens), part in self.rows.items() if lens == self.lens]
        self.facts = [
            part
            for part in self.main
            if part.prompt.prompt_id == "pos" and part.prompt.prompt_variant == "orig"
        ]

    def run(self) -> Summary:
        checks = self._raw_against_norm()
        samples = {index: check.sample(self.config) for index, check in checks.items()}
        confirmed = {
            part.prompt.prompt_index: confirmed_semantics(part, self._others(part), self.config)
            for part in self.main
        }
        radii = {index: window_radius(sample, self.config) for index, sample in samples.items()}
        passes: dict[tuple[int, str], PassSummary] = {}
        for (index, lens), part in self.rows.items():
            passes[index, lens] = summarise_pass(
                part,
                self.config,
                d_vocab=self.meta.d_vocab,
                raw=self.rows.get((index, "raw")) if lens != "raw" else None,
                radius=radii.get(index, self.config.window_radius),
                confirmed=confirmed.get(index) if lens == self.lens else None,
            )
        base = (self.facts or self.main)[0]
        sections = self._sections(
            base, passes, self._lens_checks(passes, checks, samples, radii), confirmed
        )
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
            lens: self.rows[index, lens]
            for lens in self.lenses
            if lens != self.lens and (index, lens) in self.rows
        }

    def _raw_against_norm(self) -> dict[int, RawNorm]:
        """Return the comparison of both lenses for every pass that has both."""
        if self.lens == "raw":
            return {}
        return {
            part.prompt.prompt_index: RawNorm(part, raw)
            for part in self.main
            if (raw := self.rows.get((part.prompt.prompt_index, "raw"))) is not None
        }

    def _lens_checks(
        self,
        passes: Mapping[tuple[int, str], PassSummary],
        checks: Mapping[int, RawNorm],
        samples: Mapping[int, dict[str, Any]],
        radii: Mapping[int, int],
    ) -> dict[str, dict[str, Any]]:
        """Return the three checks of raw against norm, each by fact."""
        sections: dict[str, dict[str, Any]] = {
            name: {} for name in ("raw_lens_check", "raw_lens_window", "raw_lens_full")
        }
        for part in self.facts:
            index, key = part.prompt.prompt_index, _key(part)
            if index in checks:
                centers = _centers(passes[index, self.lens], self.config)
                sections["raw_lens_check"][key] = samples[index]
                sections["raw_lens_window"][key] = checks[index].window(
                    centers, radius=radii[index]
                )
                sections["raw_lens_full"][key] = checks[index].full(self.config)
        return sections

    def _sections(
        self,
        base: PassRows,
        passes: dict[tuple[int, str], PassSummary],
        lens_checks: dict[str, dict[str, Any]],
        confirmed: dict[int, dict[str, Any]],
    ) -> dict[str, Any]:
        def found(part: PassRows) -> PassSummary:
            return passes[part.prompt.prompt_index, self.lens]

        sections: dict[str, Any] = {"primary_lens": self.lens, "lenses": self.lenses}
        sections["confirmed_semantics"] = {
            _key(part): confirmed[part.prompt.prompt_index] for part in self.facts
        }
        sections |= lens_checks
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
        sections |= self._lenses(base, passes)
        sections["diagnostics"] = dict(self.diagnostics)
        sections["measurement_guidance"] = guide(
            [found(part) for part in self.facts or self.main],
            sections,
            self.config,
            meta=self.meta,
        )
        return sections

    def _lenses(
        self, base: PassRows, passes: Mapping[tuple[int, str], PassSummary]
    ) -> dict[str, Any]:
        """Return every lens beside the norm lens, and which one to report."""

        def at(part: PassRows) -> dict[str, PassRows]:
            return {self.lens: part, **self._others(part)}

        facts = [at(part) for part in self.facts or self.main]
        measured = [
            {lens: passes[part.prompt.prompt_index, lens] for lens, part in fact.items()}
            for fact in facts
        ]
        tuned = attribute(facts, self.meta, self.config)
        return {
            "lens_comparison": compare_lenses(facts, measured, self.meta),
            "prism_summary": beside_norm("prism", at(base), self.meta),
            "tuned_lens": {**beside_norm("tuned", at(base), self.meta), "attribution": tuned},
            "tau_norm_per_layer": tau_section(self.meta),
            "preferred_lens": preferred_lens(tuned, self.meta, self.lens),
        }

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
        partial += [
            {
                "prompt_index": None,
                "fact_key": entry["prompt"],
                "prompt_id": "ctl" if entry["variant"] == "control" else "pos",
                "prompt_variant": "orig" if entry["variant"] == "control" else entry["variant"],
                "status": "left_out",
            }
            for entry in self.unaligned
        ]
        count = len(prompts) + len(self.unaligned)
        return {
            "rate": 1.0 - len(partial) / count if count else None,
            "n": count,
            "partial": partial,
        }


def _key(part: PassRows) -> str:
    return part.prompt.fact_key or f"prompt {part.prompt.prompt_index}"


def _centers(summary: PassSummary, config: MeasureConfig) -> list[int]:
    """Return the layers that the window check looks at: onset, near-onset, convergence and echo.

    Convergence is the loosest of the configured divergences (by default 1 bit).
    """
    layers = {name: item.first for name, item in summary.milestones.items()}
    soft = [layer for layer in summary.fields["L_copy_soft"].values() if layer is not None]
    wanted = [layers.get(name) for name in ("L_semantic", "first_rank_le_5", "L_copy")]
    if config.kl_thresholds_bits:
        wanted.append(layers[f"first_kl_below_{decimal(max(config.kl_thresholds_bits))}"])
    wanted.append(min(soft, default=None))
    return sorted({layer for layer in wanted if layer is not None})
