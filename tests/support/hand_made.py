"""Passes written out by hand, column by column; what is not given is null."""

from __future__ import annotations

from typing import Any

import polars as pl

from layerscope.measures.rows import PassRows, pass_rows
from layerscope.measures.table import LayersTable, PromptInfo, TableMeta, conform

D_VOCAB = 1000


def hand_made_pass(
    lens: str = "norm",
    *,
    layers: list[int] | None = None,
    n_layers: int | None = None,
    top1: list[int | None] | None = None,
    p1: list[float | None] | None = None,
    p2: list[float | None] | None = None,
    prompt: dict[str, Any] | None = None,
    **columns: list[Any],
) -> PassRows:
    """Return one pass; `top1`, `p1` and `p2` fill the token lists, `prompt` its PromptInfo."""
    return one_pass(
        hand_made_table(
            {lens: columns | _tops(top1, p1, p2)}, layers=layers, n_layers=n_layers, prompt=prompt
        ),
        lens,
    )


def hand_made_table(
    columns: dict[str, dict[str, list[Any]]],
    *,
    layers: list[int] | None = None,
    n_layers: int | None = None,
    prompt: dict[str, Any] | None = None,
) -> LayersTable:
    """Return a table of one pass through several lenses, each with its columns."""
    frames: list[pl.DataFrame] = []
    info = {
        "prompt_index": 0,
        "fact_key": "Germany→Berlin",
        "fact_index": 0,
        "prompt_id": "pos",
        "prompt_variant": "orig",
    }
    given = prompt or {}
    info |= {name: value for name, value in given.items() if name in info}
    for lens, values in columns.items():
        height = len(next(iter(values.values())))
        identity = info | {"lens": lens, "pos": 3, "is_last": True, "token": " is"}
        identity |= {"norm_choice": "final", "norm_module": "norm"}
        rows = {"layer": layers or list(range(height)), **values}
        frame = pl.DataFrame(rows, strict=False)
        frames.append(frame.with_columns(pl.lit(v).alias(k) for k, v in identity.items()))
    rows = conform(pl.concat(frames, how="diagonal_relaxed"))
    about = {"text": "", "prompt_ids": (), "tokens": ()} | info | given
    last = rows["layer"].max()
    assert isinstance(last, int)
    meta = TableMeta(
        model="hand-made",
        n_layers=last if n_layers is None else n_layers,
        d_vocab=D_VOCAB,
        prompts=(PromptInfo(**about),),
    )
    return LayersTable(rows=rows, meta=meta)


def one_pass(table: LayersTable, lens: str = "norm") -> PassRows:
    return pass_rows(table)[table.meta.prompts[0].prompt_index, lens]


def _tops(
    top1: list[int | None] | None, p1: list[float | None] | None, p2: list[float | None] | None
) -> dict[str, list[Any]]:
    given = [values for values in (top1, p1, p2) if values is not None]
    if not given:
        return {}
    height = len(given[0])
    ids, first, second = (values or [None] * height for values in (top1, p1, p2))
    return {
        "top_ids": [[id_, 999] for id_ in ids],
        "top_probs": [list(pair) for pair in zip(first, second, strict=True)],
    }
