"""Runs in one shape, whatever experiment they are of: what `cross_model` compares.

A reading holds, for each fact and lens, the rows of its milestones, and what has to be equal before
two runs may be set side by side: wording, tokens of the answer, norm, lens, dtype, thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import polars as pl

from layerscope.errors import TableError
from layerscope.measures.table import LayersTable, PromptInfo

# What is compared, in reading order, and what each rests on.
KINDS: dict[str, str] = {
    "first_rank_le_10": "rank",
    "first_rank_le_5": "rank",
    "L_semantic": "rank",
    "L_semantic_run2": "rank",
    "L_semantic_confirmed": "confirmed",
    "first_kl_below_1.0": "kl",
    "first_kl_below_0.5": "kl",
    "L_semantic_strong": "probability",
    "L_copy": "probability",
}
ALL_KINDS = ("rank", "confirmed", "kl", "probability")


@dataclass(frozen=True, kw_only=True)
class LensReading:
    """One fact through one lens: rows of its milestones (None: never), and rank and KL by row."""

    milestones: Mapping[str, int | None]
    tier: str | None = None  # of raw against norm: low, medium, high
    source: str | None = None  # which lens confirms the onset
    confirming: tuple[str, ...] | None = None  # lenses that could have
    layers: tuple[int, ...] = ()
    ranks: tuple[int | None, ...] = ()
    kl_bits: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FactReading:
    """One fact as one run asked it."""

    key: str
    text: str
    form: str  # "raw", "chat", with the task template
    answer: str | None
    first_piece: str | None  # first token of the answer, as text
    n_pieces: int
    alignment: str = "ok"  # or why there is no answer token
    group: str = ""  # relation and language, of a battery
    final_rank: int | None = None  # of the answer in the model's own prediction
    final_p: float | None = None
    final_entropy_bits: float | None = None
    lenses: Mapping[str, LensReading] = field(default_factory=dict[str, LensReading])


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One run of one model.

    `lenses` describes each lens as the run knew it. `precision_holds` is what the run's check of
    another precision found, None without one. None stands for what was not recorded.
    """

    label: str
    run: str  # its id, or the place that it was read from
    experiment: str
    model: str
    n_layers: int
    d_vocab: int
    norm_choice: str | None
    facts: Mapping[str, FactReading]
    lenses: Mapping[str, Mapping[str, Any]]
    primary_lens: str = "norm"
    weights: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    prompts_sha256: str | None = None
    precision_holds: bool | None = None
    thresholds: Mapping[str, Any] = field(default_factory=dict[str, Any])
    guidance: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])


def read_layers(
    table: LayersTable,
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    run: str,
) -> Reading:
    """Return a layers run; facts in their original wording, controls and ablations left out."""
    meta = table.meta
    config: Mapping[str, Any] = provenance.get("config") or {}
    entries = {
        (entry["prompt_index"], entry["lens"]): entry for entry in summary.get("passes") or ()
    }
    curves = _curves(table.rows.filter(pl.col("is_last")))
    facts: dict[str, FactReading] = {}
    for prompt in table.passes():
        if prompt.prompt_id != "pos" or prompt.prompt_variant != "orig":
            continue
        key = prompt.fact_key or f"prompt {prompt.prompt_index}"
        tier = _tier(summary, key)
        lenses = {
            lens: _lens_reading(
                entries[prompt.prompt_index, lens], curves.get((prompt.prompt_index, lens)), tier
            )
            for lens in table.lenses
            if (prompt.prompt_index, lens) in entries
        }
        facts[key] = _fact(prompt, key, lenses, system=config.get("system"))
    return _reading(
        provenance,
        run=run,
        experiment="layers",
        model=meta.model,
        n_layers=meta.n_layers,
        d_vocab=meta.d_vocab,
        norm_choice=meta.norm_choice,
        facts=facts,
        lenses={lens: dict(meta.lenses.get(lens) or {"status": "ready"}) for lens in table.lenses}
        | {name: dict(entry) for name, entry in meta.lenses.items() if name not in table.lenses},
        primary_lens=str(summary.get("primary_lens") or "norm"),
        prompts_sha256=meta.provenance.get("prompts_sha256"),
        precision_holds=_precision(summary),
        thresholds=dict(summary.get("config") or {}),
        guidance=dict(summary.get("measurement_guidance") or {}),
    )


def read_battery(
    tables: Mapping[str, pl.DataFrame],
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    run: str,
) -> Reading:
    """Return a battery run: the plain question of every real item."""
    missing = [name for name in ("rows", "prompts") if name not in tables]
    if missing:
        raise TableError(f"{run} lacks the battery's table {missing[0]}; run the battery again")
    config: Mapping[str, Any] = provenance.get("config") or {}
    asked = tables["prompts"].filter((pl.col("variant") == "orig") & ~pl.col("invented"))
    curves = _curves(tables["rows"].join(asked.select("prompt_index").unique(), on="prompt_index"))
    lenses: dict[str, dict[str, LensReading]] = {}
    facts: dict[str, FactReading] = {}
    form = _form(_battery_format(config, provenance), None, config.get("system"))
    available = tuple(lens for lens in ("raw", "tuned") if lens in summary["lenses"])
    for row in asked.iter_rows(named=True):
        key, lens = row["item"], row["lens"]
        layers, ranks, bits = curves.get((row["prompt_index"], lens), ((), (), ()))
        lenses.setdefault(key, {})[lens] = LensReading(
            milestones={name: row.get(name) for name in KINDS if name in row},
            tier=row.get("artifact_tier"),
            source=row.get("confirmed_source"),
            confirming=available if lens == "norm" else None,
            layers=layers,
            ranks=ranks,
            kl_bits=bits,
        )
        facts[key] = FactReading(
            key=key,
            text=row["prompt"],
            form=form,
            answer=row["answer"],
            first_piece=row["answer_first"],
            n_pieces=int(row["answer_tokens"]),
            group=f"{row['relation']}/{row['language']}",
            final_rank=row.get("answer_rank_model"),
            lenses=lenses[key],
        )
    described: Mapping[str, Any] = provenance.get("lenses") or {}
    return _reading(
        provenance,
        run=run,
        experiment="battery",
        model=summary["model"],
        n_layers=int(summary["n_layers"]),
        d_vocab=int(summary["d_vocab"]),
        norm_choice=config.get("norm_choice"),
        facts=facts,
        lenses={lens: dict(described.get(lens) or {}) for lens in summary["lenses"]},
        primary_lens="norm" if "norm" in summary["lenses"] else summary["lenses"][0],
        prompts_sha256=(provenance.get("battery") or {}).get("sha256"),
        thresholds=dict(config.get("measures") or {}),
    )


def with_labels(readings: Sequence[Reading]) -> list[Reading]:
    """Name every reading by its model; where models share a name, by the run as well."""
    places: dict[str, list[str]] = {}
    for reading in readings:
        places.setdefault(reading.model, []).append(reading.run)
    labelled: list[Reading] = []
    for reading in readings:
        others = places[reading.model]
        short = _distinct(others)[others.index(reading.run)]
        label = reading.model if len(others) == 1 else f"{reading.model} ({short})"
        labelled.append(replace(reading, label=label))
    return labelled


def _distinct(places: Sequence[str]) -> list[str]:
    """Leave out what paths share at their beginnings and ends."""
    parts = [place.split("/") for place in places]
    shortest = min(len(entry) for entry in parts)
    start, end = 0, 0
    while start < shortest - 1 and len({entry[start] for entry in parts}) == 1:
        start += 1
    while end < shortest - start - 1 and len({entry[-1 - end] for entry in parts}) == 1:
        end += 1
    return ["/".join(entry[start : len(entry) - end]) for entry in parts]


def _reading(provenance: Mapping[str, Any], **fields: Any) -> Reading:
    model: Mapping[str, Any] = provenance.get("model") or {}
    return Reading(
        label=fields["model"],
        weights=model.get("weights_sha256"),
        tokenizer=model.get("tokenizer_sha256"),
        dtype=model.get("dtype"),
        config=dict(provenance.get("config") or {}),
        **fields,
    )


def _fact(
    prompt: PromptInfo, key: str, lenses: Mapping[str, LensReading], *, system: str | None
) -> FactReading:
    head = prompt.head
    return FactReading(
        key=key,
        text=prompt.text,
        form=_form(prompt.format, prompt.template, system),
        answer=prompt.answer,
        first_piece=prompt.answer_pieces[0] if prompt.answer_pieces else None,
        n_pieces=len(prompt.answer_pieces),
        alignment=prompt.alignment_status if prompt.answer is not None else "no answer was given",
        final_rank=head.answer_rank if head else None,
        final_p=head.p_answer if head else None,
        final_entropy_bits=head.entropy_bits if head else None,
        lenses=lenses,
    )


def _battery_format(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return how prompts were written; auto means chat for an instruct model, raw for a base."""
    written = str(config.get("format") or "")
    if written != "auto":
        return written
    return "chat" if (provenance.get("model") or {}).get("instruct") else "raw"


def _form(written: str, template: str | None, system: str | None) -> str:
    parts = [written or "format not recorded"]
    parts += [f"template {template}"] if template else []
    parts += [f"system message “{system}”"] if system else []
    return ", ".join(parts)


Curve = tuple[tuple[int, ...], tuple[int | None, ...], tuple[float | None, ...]]


def _lens_reading(entry: Mapping[str, Any], curve: Curve | None, tier: str | None) -> LensReading:
    found: Mapping[str, Any] = entry.get("milestones") or {}
    rows: dict[str, int | None] = {
        name: (found[name] or {}).get("first") for name in KINDS if name in found
    }
    test = cast("Mapping[str, Any] | None", entry.get("confirmed_semantics"))
    if test is not None:
        rows["L_semantic_confirmed"] = entry.get("L_semantic_confirmed")
    layers, ranks, bits = curve or ((), (), ())
    return LensReading(
        milestones=rows,
        tier=tier,
        source=test.get("confirmed_source") if test else None,
        confirming=tuple(test.get("lenses_available") or ()) if test is not None else None,
        layers=layers,
        ranks=ranks,
        kl_bits=bits,
    )


def _curves(rows: pl.DataFrame) -> dict[tuple[int, str], Curve]:
    """Return layers, ranks and KL of every pass and lens."""
    grouped = (
        rows.sort("prompt_index", "lens", "layer")
        .group_by("prompt_index", "lens", maintain_order=True)
        .agg("layer", "answer_rank", "kl_to_final_bits")
    )
    return {
        (index, lens): (tuple(layers), tuple(ranks), tuple(bits))
        for index, lens, layers, ranks, bits in grouped.iter_rows()
    }


def _tier(summary: Mapping[str, Any], key: str) -> str | None:
    full: Mapping[str, Any] = (summary.get("raw_lens_full") or {}).get(key) or {}
    return (full.get("score") or {}).get("tier")


def _precision(summary: Mapping[str, Any]) -> bool | None:
    """Return whether the run's own check of another precision held."""
    section: Mapping[str, Any] = (summary.get("diagnostics") or {}).get("repeatability") or {}
    return (section.get("gates") or {}).get("repeatable.precision")
