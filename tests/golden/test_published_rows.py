"""Published rows: identities between their columns, and our readings of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from golden.published_case import CONFIG, MODELS, Case, case, same
from layerscope.measures.config import MeasureConfig
from layerscope.measures.copy import flag_columns, with_copy_flags
from layerscope.measures.raw_norm import RawNorm
from layerscope.measures.rows import Columns, pass_rows
from layerscope.measures.semantics import is_answer, margin_ok
from layerscope.measures.summary import summarise
from layerscope.measures.table import LayersTable
from layerscope.measures.tokens import is_ignorable
from layerscope.measures.trajectory import norm_trajectory

pytestmark = [pytest.mark.golden, pytest.mark.parametrize("model", MODELS)]

STEM = "Give the city name only, plain text. The capital of {} is called simply"
D_VOCAB = {"Meta-Llama-3-8B": 128256, "gemma-2-9b": 256000}
N_LAYERS = {"Meta-Llama-3-8B": 32, "gemma-2-9b": 42}


def _cells(found: Case, *suffixes: str) -> list[dict[str, float | None]]:
    """Return the numbers of every row (flags as 0 and 1)."""
    named = {"True": 1.0, "False": 0.0}
    texts = ("fact_key", "prompt_id", "prompt_variant", "token", *(f"top{i}" for i in range(1, 21)))

    def number(cell: str | None) -> float | None:
        return None if cell is None else named[cell] if cell in named else float(cell)

    return [
        {name: number(cell) for name, cell in row.items() if name not in texts}
        for suffix in suffixes
        for row in found.rows(suffix)
    ]


def _value(row: dict[str, float | None], name: str) -> float:
    value = row[name]
    assert value is not None, name
    return value


def test_shape_recovered_from_the_table(model: str) -> None:
    meta = case(model).table.meta
    assert (meta.model, meta.n_layers, meta.d_vocab) == (model, N_LAYERS[model], D_VOCAB[model])
    assert len(meta.prompts) == 11
    assert [prompt.answer for prompt in meta.prompts[:4]] == ["Berlin", "Berlin", "Paris", "Paris"]
    assert (meta.prompts[10].prompt_id, meta.prompts[10].fact_key) == ("ctl", None)
    rows = case(model).table.rows
    expected = {"norm": 11 * (meta.n_layers + 1), "raw": 11 * (meta.n_layers + 1)}
    expected |= {"tuned": 11 * meta.n_layers, "prism": 11 * (meta.n_layers + 1)}
    assert dict(rows.group_by("lens").len().iter_rows()) == expected


def test_identities_of_a_row(model: str) -> None:
    found = case(model)
    rows = _cells(found, "-pure-next-token.csv", "-pure-next-token-tuned.csv")
    assert len(rows) == 11 * (2 * N_LAYERS[model] + 1)
    for row in rows:
        probs = [_value(row, f"prob{i}") for i in range(1, 6)]
        p, echo = _value(row, "p_answer"), _value(row, "echo_mass_prompt")
        # Sums of five float32 numbers, done once in float32 and once here.
        assert _value(row, "p_top1") == probs[0]
        assert _value(row, "p_top5") == pytest.approx(sum(probs), abs=5e-7)
        assert _value(row, "rest_mass") == pytest.approx(max(0.0, 1 - sum(probs)), abs=5e-7)
        assert _value(row, "answer_mass") == p
        assert _value(row, "answer_minus_echo_mass") == pytest.approx(p - echo, abs=1e-12)
        ratio = _value(row, "mass_ratio_ans_over_prompt")
        assert ratio == pytest.approx(p / (echo + 1e-9), rel=1e-9)
        assert _value(row, "entropy") == _value(row, "entropy_bits")
        assert bool(row["is_answer"]) == (row["answer_rank"] == 1)
        assert bool(row["entropy_collapse"]) == (_value(row, "entropy_bits") <= 1.0)
        if row["cos_to_answer"] is not None:
            crossed = row["cos_to_answer"] >= _value(row, "cos_to_prompt_max") + CONFIG.geom_gamma
            assert bool(row["geom_crossover"]) == crossed
        above = _value(row, "answer_minus_uniform")
        assert above == pytest.approx(p - 1 / D_VOCAB[model], abs=1e-15)
        assert row["copy_collapse"] == row["copy_strict@0.95"]


def test_gaps_are_log_ratios(model: str) -> None:
    rows = _cells(case(model), "-pure-next-token.csv", "-pure-next-token-tuned.csv")
    leading = [row for row in rows if row["answer_logit_gap"] is not None]
    behind = [row for row in rows if row["answer_vs_top1_gap"] is not None]
    assert leading
    assert len(leading) + len(behind) == len(rows)
    for row in leading:
        ratio = math.log(_value(row, "prob1") / _value(row, "prob2"))
        assert row["answer_rank"] == 1
        assert row["answer_logit_gap"] == pytest.approx(ratio, abs=2e-3)
    checked = 0
    for row in behind:
        assert _value(row, "answer_rank") > 1
        if _value(row, "p_answer") > 1e-30:
            ratio = math.log(_value(row, "p_answer") / _value(row, "prob1"))
            assert row["answer_vs_top1_gap"] == pytest.approx(ratio, abs=2e-3)
            checked += 1
    assert checked > len(behind) / 3


def test_row_conditions_equal_the_published_flags(model: str) -> None:
    found = case(model)
    parts = pass_rows(found.table)
    checked = 0
    for (_, lens), part in parts.items():
        if lens == "raw":
            continue
        published = part.frame["is_answer"].to_numpy()
        np.testing.assert_array_equal(is_answer(part), published)
        if lens == "norm":
            rows = [
                row["semantic_margin_ok"] == "True"
                for row in found.rows("-pure-next-token.csv")
                if (row["fact_key"], row["prompt_id"], row["prompt_variant"])
                == (part.prompt.fact_key, part.prompt.prompt_id, part.prompt.prompt_variant)
            ]
            np.testing.assert_array_equal(margin_ok(part, CONFIG, D_VOCAB[model]), rows)
        checked += len(part.layers)
    assert checked == 11 * (3 * N_LAYERS[model] + 2)


def test_copy_flags_from_prompt_tokens(model: str) -> None:
    """The flags follow from the prompt's tokens and the top-1 tokens, for every row and lens.

    Ids are not published, so the prompt is cut into words (each one token of both vocabularies) and
    every text stands for its own id.
    """
    found = case(model)
    labels = ["copy_collapse", *flag_columns(CONFIG)]
    published = found.table.rows.filter(pl.col("lens") != "raw")
    numbers: dict[str, int] = {}

    def number(text: str) -> int:
        return numbers.setdefault(text, len(numbers))

    prompts = []
    for prompt in found.table.meta.prompts:
        country = (prompt.fact_key or "France→Paris").split("→")[0]
        text = STEM.format(country)
        text = text.removesuffix(" simply") if prompt.prompt_variant == "no_filler" else text
        for mark in ",.":
            text = text.replace(mark, f" \0{mark}")
        words = [word.removeprefix("\0") for word in text.split(" ")]
        marked = [word if i == 0 or word in ",." else f" {word}" for i, word in enumerate(words)]
        ids = tuple(number(word) for word in marked)
        prompts.append(replace(prompt, prompt_ids=ids))
    tops = published["top_tokens"].to_list()
    rows = published.drop(labels).with_columns(
        pl.Series("top_ids", [[number(text or "") for text in row] for row in tops]),
        pl.Series("top1_ignorable", [is_ignorable(row[0]) for row in tops]),
    )
    ours = with_copy_flags(
        LayersTable(rows=rows, meta=replace(found.table.meta, prompts=tuple(prompts))), CONFIG
    )
    assert published["copy_soft_k1@0.5"].sum() == {"gemma-2-9b": 470}.get(model, 0)
    for label in labels:
        # The publisher left the sweep of the prism lens out.
        known = published[label].is_not_null()
        swept = label in ("copy_strict@0.7", "copy_strict@0.8", "copy_strict@0.9")
        assert (~known).sum() == (11 * (N_LAYERS[model] + 1) if swept else 0)
        assert ours.rows[label].filter(known).to_list() == published[label].filter(known).to_list()


def test_published_flags_survive(model: str) -> None:
    table = case(model).table
    ours = with_copy_flags(table)
    labels = ["copy_collapse", *flag_columns(MeasureConfig())]
    known = table.rows["lens"] != "raw"
    assert ours.rows.filter(known).select(labels).equals(table.rows.filter(known).select(labels))


def test_raw_table_agrees_with_the_main_one(model: str) -> None:
    found = case(model)
    raw, pure = found.rows("-pure-next-token-rawlens.csv"), found.rows("-pure-next-token.csv")
    key = ("fact_key", "prompt_id", "prompt_variant", "layer")
    index = {tuple(row[name] for name in key): row for row in raw}
    for row in pure:
        other = index[tuple(row[name] for name in key)]
        assert other["answer_rank_norm"] == row["answer_rank"]
        # The raw table keeps its entropies with 1e-30 inside the logarithm.
        assert float(other["entropy_bits_norm"] or "nan") == pytest.approx(
            float(row["entropy_bits"] or "nan"), rel=1e-4, abs=1e-4
        )
    parts = pass_rows(found.table)
    for prompt in found.table.meta.prompts:
        pair = RawNorm(parts[prompt.prompt_index, "norm"], parts[prompt.prompt_index, "raw"])
        published = [
            row["norm_only_semantics"] == "True"
            for row in raw
            if (row["fact_key"], row["prompt_id"], row["prompt_variant"])
            == (prompt.fact_key, prompt.prompt_id, prompt.prompt_variant)
        ]
        np.testing.assert_array_equal(pair.norm_only, published)


def test_overlaps_come_from_the_raw_table(model: str) -> None:
    # In the main table later facts overwrote them.
    found = case(model)
    ours = found.table.last(lens="norm", prompt_index=0)
    columns = {
        "topk_jaccard_raw_norm": "topk_jaccard_raw_norm@50",
        "topk_jaccard_consecutive": "topk_jaccard_consecutive@50",
    }
    n = N_LAYERS[model] + 1
    for name, published in columns.items():
        right = [row[published] for row in found.rows("-pure-next-token-rawlens.csv")[:n]]
        wrong = [row[published] for row in found.rows("-pure-next-token.csv")[:n]]
        assert ours[name].to_list() == [None if cell is None else float(cell) for cell in right]
        assert right != wrong


def test_window_rows_are_those_of_the_window(model: str) -> None:
    found = case(model)
    rows = [
        row
        for row in found.rows("-pure-next-token-rawlens-window.csv")
        if (row["fact_index"], row["prompt_variant"]) == ("0", "orig")
    ]
    window = found.ours["raw_lens_window"]
    assert sorted({int(row["layer"] or -1) for row in rows}) == window["layers_checked"]
    largest = max(float(row["kl_norm_vs_raw_bits"] or "nan") for row in rows)
    assert window["max_kl_norm_vs_raw_bits_window"] == largest


def test_window_widens_with_the_facts_own_risk(model: str) -> None:
    found = case(model)
    summary = summarise(found.table).to_dict()
    for key, check in summary["raw_lens_check"].items():
        risky = check["summary"]["lens_artifact_risk"] == "high"
        assert summary["raw_lens_window"][key]["radius"] == (8 if risky else 4)
    assert summary["raw_lens_window"]["Germany→Berlin"]["radius"] == 8
    assert found.published["raw_lens_window"]["radius"] == 4


def test_trajectory_with_the_published_lengths(model: str) -> None:
    found = case(model)
    lengths = [
        entry["raw_resid_norm"]
        for entry in found.published["normalization_provenance"]["per_layer"]
    ]
    part = pass_rows(found.table)[0, "norm"]
    frame = part.frame.with_columns(pl.Series("resid_norm", lengths))
    ours = norm_trajectory(
        replace(part, columns=Columns(frame), start=0), CONFIG, semantic=found.ours["L_semantic"]
    )
    published = found.published["norm_trajectory"]
    for name in ("shape", "slope", "r2", "n_spikes", "sampled_layers"):
        assert same(ours[name], published[name]), name
    assert (ours["growth_spikes"], ours["growth_shape"]) == ([], "monotonic")


def test_teacher_entropy_is_that_of_the_final_prediction(model: str) -> None:
    found = case(model)
    teacher = found.ours["raw_lens_full"]["teacher_entropy_bits"]
    assert teacher == pytest.approx(found.published["final_prediction"]["entropy"], rel=1e-6)


def test_guidance_tells_models_apart(model: str) -> None:
    guidance = case(model).ours["measurement_guidance"]
    codes = [reason["code"] for reason in guidance["reasons"]]
    expected = {
        "Meta-Llama-3-8B": ("medium", "answer_not_final_top1", "rank_only_near_uniform"),
        "gemma-2-9b": ("low", "warn_high_last_layer_kl", "high_lens_artifact_score"),
    }
    assert (guidance["trust"], codes[0], codes[1]) == expected[model]
    # Gates that fired for every published model do not fire for these.
    assert not {"normalization_spike", "pos_window_low_stability"} & set(codes)
