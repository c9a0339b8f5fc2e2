"""From tokens to words: which tokens of a text make up which word, by their places in it."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import polars as pl

from layerscope.experiments.pathways.corpus import Text

# Letters and digits with what joins them; every other run of signs is a word of its own.
_WORD = re.compile(r"\w+(?:['’\-.,]\w+)*|[^\w\s]+")


def words_in(text: str) -> list[tuple[str, int, int]]:
    """Return the words of a text, without regard to case, each with its first and last place."""
    return [(each[0].lower(), each.start(), each.end()) for each in _WORD.finditer(text)]


def words_of_tokens(text: str, ids: Sequence[int], tokenizer: Any) -> list[int | None] | None:
    """Return for every token of a text the number of its word; None for a token of blanks alone.

    Args:
        text: as it was tokenized. ids: its tokens, or as many of them as were read.
        tokenizer: that made them.

    Returns:
        None where the tokenizer cannot say which characters a token stands for.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if list(encoded["input_ids"])[: len(ids)] != list(ids):
        return None
    words = words_in(text)
    ends = [end for _, _, end in words]
    found: list[int | None] = []
    for first, last in list(encoded["offset_mapping"])[: len(ids)]:
        at = bisect_right(ends, first)  # the first word that ends behind the token's beginning
        found.append(at if at < len(words) and words[at][1] < last else None)
    return found


def by_words(entries: pl.DataFrame, texts: Sequence[Text]) -> tuple[pl.DataFrame, list[str]]:
    """Return entries of words in place of tokens, and the words that their ids mean.

    A feature is worth at a word what it is worth at the word's largest token.

    Args:
        entries: of tokens, with the column ``word``. texts: by the column ``text``.
    """
    kept = entries.filter(pl.col("word").is_not_null())
    active = (
        kept.select("text", "word", "features", "values")
        .explode("features", "values")
        .drop_nulls()
        .group_by("text", "word", "features")
        .agg(pl.col("values").max())
        .sort("text", "word", "features")
        .group_by("text", "word", maintain_order=True)
        .agg("features", "values")
    )
    spoken = [
        (index, number, word)
        for index in kept["text"].unique().sort().to_list()
        for number, (word, _, _) in enumerate(words_in(texts[index].text))
    ]
    named = pl.DataFrame(
        spoken, schema={"text": pl.Int64, "word": pl.Int64, "name": pl.String}, orient="row"
    )
    strings = named["name"].unique().sort().to_list()
    ids = pl.DataFrame({"name": strings, "token_id": range(len(strings))}, schema_overrides=_IDS)
    whole = (
        kept.select("text", "word")
        .unique()
        .join(named, on=["text", "word"])
        .join(ids, on="name")
        .join(active, on=["text", "word"], how="left")
        .sort("text", "word")
        .rename({"word": "position"})
    )
    return whole.select("text", "position", "token_id", "features", "values"), strings


_IDS: dict[str, Any] = {"name": pl.String, "token_id": pl.Int64}
