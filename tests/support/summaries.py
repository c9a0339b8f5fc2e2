"""A small summary of a table, enough for the reports; its thresholds are not the point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from layerscope.measures.table import LayersTable

CONDITIONS = {
    "L_copy": lambda row: (row["p_top1"] or 0) > 0.95 and row["layer"] < 3,
    "first_rank_le_5": lambda row: (row["answer_rank"] or 10**9) <= 5,
    "L_semantic": lambda row: row["answer_rank"] == 1,
    "L_semantic_strong": lambda row: row["answer_rank"] == 1 and row["answer_logit_gap"] > 0.5,
    "first_kl_below_0.5": lambda row: row["kl_to_final_bits"] <= 0.5,
}


def milestone(flags: list[bool]) -> dict[str, Any]:
    """Return first, stable and lost rows of one flag per layer."""
    first = flags.index(True) if True in flags else None
    stable = len(flags)
    while stable and flags[stable - 1]:
        stable -= 1
    lost = [i for i in range(1, len(flags)) if flags[i - 1] and not flags[i]]
    return {"first": first, "stable": stable if stable < len(flags) else None, "lost": lost}


def small_summary(table: LayersTable) -> dict[str, Any]:
    """Return passes with milestones, a guidance of two reasons, and the raw-lens block."""
    passes: list[dict[str, Any]] = []
    last = table.rows.filter(pl.col("is_last")).sort("layer")
    parts = last.partition_by("prompt_index", "lens", as_dict=True)
    for prompt in table.passes():
        for lens in table.lenses:
            rows = parts[prompt.prompt_index, lens]
            flags = {
                name: [bool(test(row)) for row in rows.iter_rows(named=True)]
                for name, test in CONDITIONS.items()
            }
            passes.append(
                {
                    "prompt_index": prompt.prompt_index,
                    "fact_key": prompt.fact_key,
                    "prompt_id": prompt.prompt_id,
                    "prompt_variant": prompt.prompt_variant,
                    "lens": lens,
                    "milestones": {name: milestone(values) for name, values in flags.items()},
                }
            )
    baseline = next((i for i, entry in enumerate(passes) if entry["lens"] == "norm"), 0)
    raw = {
        key: {
            "pct_layers_kl_ge_1.0": 0.25,
            "n_norm_only_semantics_layers": 1,
            "max_kl_norm_vs_raw_bits": 3.21,
            "score": {"lens_artifact_score": 0.42, "tier": "medium"},
        }
        for key in table.rows["fact_key"].unique().to_list()
        if key is not None
    }
    return {
        "schema_version": 1,
        "model": table.meta.model,
        "n_layers": table.meta.n_layers,
        "d_vocab": table.meta.d_vocab,
        "passes": passes,
        "baseline": baseline,
        "raw_lens_full": raw,
        "micro_suite": {"aggregates": {"L_semantic_norm_median": 5, "n": 2, "n_missing": 0}},
        "measurement_guidance": {
            "trust": "medium",
            "reasons": [
                {
                    "code": "norm_only_semantics_window",
                    "severity": "medium",
                    "message": "In 1 layer only the norm lens puts the answer on top.",
                    "evidence": {"layers": [4], "share": 0.125},
                    "action": "Confirm the onset with a second lens before citing it.",
                },
                {
                    "code": "normalization_spike",
                    "severity": "low",
                    "message": "Early states are small, so normalising magnifies them.",
                    "evidence": {"max_ratio": 12.5},
                    "action": "Do not read much into the first layers.",
                },
            ],
            "prefer_ranks": True,
            "suppress_abs_probs": True,
            "preferred_lens_for_reporting": "norm",
            "use_confirmed_semantics": True,
        },
    }


def with_tokens(table: LayersTable, tokens: list[str]) -> LayersTable:
    """Return the table with every prompt token, top token and text replaced by the given ones."""

    def swap(values: list[str]) -> list[str]:
        return [tokens[i % len(tokens)] for i in range(len(values))]

    rows = table.rows.with_columns(
        pl.col("top_tokens").map_elements(
            lambda values: swap(list(values)), return_dtype=pl.List(pl.String())
        ),
        pl.lit(tokens[0]).alias("token"),
    )
    prompts = tuple(
        replace(
            prompt,
            text=" ".join(tokens),
            fact_key=None if prompt.fact_key is None else f"{tokens[0]}{prompt.fact_index}",
            tokens=tuple(swap(list(prompt.tokens))),
            answer=tokens[0],
            answer_pieces=(tokens[0],),
            head=None
            if prompt.head is None
            else replace(prompt.head, top_tokens=tuple(swap(list(prompt.head.top_tokens)))),
        )
        for prompt in table.meta.prompts
    )
    return LayersTable(rows=rows, meta=replace(table.meta, model=tokens[0], prompts=prompts))


def many_passes(table: LayersTable, count: int) -> LayersTable:
    """Return a table of ``count`` facts: the first pass repeated under new numbers and names."""
    first = table.meta.prompts[0]
    rows = table.rows.filter(pl.col("prompt_index") == first.prompt_index)
    frames = [
        rows.with_columns(
            pl.lit(i, pl.Int32()).alias("prompt_index"), pl.lit(f"fact {i}").alias("fact_key")
        )
        for i in range(count)
    ]
    prompts = tuple(
        replace(first, prompt_index=i, fact_key=f"fact {i}", fact_index=i) for i in range(count)
    )
    return LayersTable(rows=pl.concat(frames), meta=replace(table.meta, prompts=prompts))
