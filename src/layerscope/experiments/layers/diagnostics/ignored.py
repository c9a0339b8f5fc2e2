"""Which tokens the echo detectors leave out, and what that changed in this run."""

from __future__ import annotations

import unicodedata
from collections import Counter
from typing import Any

import polars as pl

from layerscope.experiments.layers.diagnostics.material import Material, answer_id
from layerscope.experiments.layers.diagnostics.sections import Section, result
from layerscope.files import canonical_json, sha256_text
from layerscope.measures import copy_mask as measure
from layerscope.measures.tokens import is_ignorable
from layerscope.models.vocabulary import ignore_mask


def copy_mask(material: Material) -> Section:
    """Show the mask: its size, its kinds of characters, and the prompt tokens and rows it touches.

    The gates: the mask does not cover an answer, and the rows in the table were judged by this very
    mask (`top1_ignorable` of every row is what the mask says of its top-1).
    """
    model = material.model
    mask = ignore_mask(model.tokenizer, model.d_vocab)
    strings = model.token_strings()
    ids = [int(token) for token in mask.nonzero()[0]]
    answers = [
        {**material.describe(item), "answer": strings[answer_id(item)]}
        for item in material.passes
        if bool(mask[answer_id(item)])
    ]
    judged = _judged(material, set(ids))
    gates: dict[str, bool | None] = {
        "answers_not_masked": not answers,
        "rows_judged_by_this_mask": None if judged["rows"] == 0 else judged["disagree"] == 0,
    }
    warnings = [
        f"{entry['fact_key']}: its answer is a token that the mask ignores" for entry in answers
    ]
    if judged["disagree"]:
        warnings.append(f"{judged['disagree']} rows were judged by another mask than this one")
    if judged["rows"] == 0:
        warnings.append("the table does not say which top-1 tokens were ignored")
    return result(
        gates,
        warnings=warnings,
        **measure.copy_mask(ids, strings),
        sha256=sha256_text(canonical_json(ids)),
        categories=_categories(strings, ids),
        special_tokens=[strings[token] for token in ids if not is_ignorable(strings[token])][
            : measure.SAMPLE
        ],
        in_prompts=[_in_prompt(material, number) for number in range(len(material.passes))],
        rows=judged,
        masked_answers=answers,
        **material.scope,
    )


def _categories(strings: Any, ids: list[int]) -> dict[str, int]:
    """Count the masked tokens by the Unicode categories of their characters ("Po", "Zs", ...)."""
    found = Counter(
        "+".join(sorted({unicodedata.category(char) for char in strings[token]})) or "empty"
        for token in ids
    )
    return dict(sorted(found.items()))


def _in_prompt(material: Material, number: int) -> dict[str, Any]:
    item = material.passes[number]
    strings = material.model.token_strings()
    left = [strings[token] for token in item.prompt_ids if token not in set(item.echo_ids)]
    return {
        **material.describe(item),
        "prompt_tokens": len(item.prompt_ids),
        "ignored": left,
    }


def _judged(material: Material, ids: set[int]) -> dict[str, int]:
    """Compare `top1_ignorable` of the table with the mask, row by row."""
    rows = material.table.rows.filter(
        pl.col("is_last") & pl.col("top1_ignorable").is_not_null()
    ).select(pl.col("top_ids").list.first().alias("top1"), "top1_ignorable")
    known = rows.drop_nulls()
    said = known["top1_ignorable"]
    now = known["top1"].is_in(sorted(ids))
    return {
        "rows": known.height,
        "top1_ignored": int(said.sum()),
        "disagree": int((said != now).sum()),
    }
