"""Items of a tiny model's own words, and frames written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from layerscope.experiments.battery import Battery, Item, Wordings
from layerscope.experiments.battery.items import shared_answers

ANSWERS = ("Berlin", "Paris", "Rome", "Tokyo", "Madrid", "Lily", "park", "seven")
STARTS = ("One two", "Once upon a time", "Question: what is it?", "She loved", "The answer")


def battery(count: int = 8) -> Battery:
    """Return items with prompts of different lengths; each has two paraphrases."""
    items = tuple(
        Item(
            relation="word" if number % 2 else "other",
            subject=f"s{number}",
            answer=ANSWERS[number % len(ANSWERS)],
            frequency=("high", "low")[number % 2],
            prompts={
                "orig": f"{STARTS[number % 5]} three {'four ' * (number % 4)}is",
                "p01": f"{STARTS[number % 5]} was",
                "p02": f"{'ten ' * number}is called",
            },
        )
        for number in range(count)
    )
    return Battery("planted", items, Wordings.builtin(), shared=shared_answers(items))


def prompts_frame(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Return milestones by hand: item, variant, onset row, delta_hat of an 8-layer model."""
    return pl.DataFrame(
        [
            {
                "prompt_index": index,
                "lens": "norm",
                "part": "paraphrases" if row["variant"].startswith("p0") else row["variant"],
                "onset": None if row["L_semantic"] is None else row["L_semantic"] / 8,
                "delta_hat": None,
                **row,
            }
            for index, row in enumerate(rows)
        ],
        schema_overrides={
            "prompt_index": pl.Int32,
            "delta_hat": pl.Float64,
            "onset": pl.Float64,
            "L_semantic": pl.Int64,
        },
        infer_schema_length=None,
    )
