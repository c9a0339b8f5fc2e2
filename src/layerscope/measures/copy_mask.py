"""Which tokens the echo detectors do not count as content, shown rather than assumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerscope.errors import TableError

SAMPLE = 16


def copy_mask(ids: Sequence[int], texts: Sequence[str | None]) -> dict[str, Any]:
    """Return the ignored ids, the first 16 of their texts, how many, and which share that is.

    `texts` holds the text of every id of the vocabulary. Raises TableError for an empty vocabulary.
    """
    if not texts:
        raise TableError("the vocabulary holds no texts; give the text of every id")
    return {
        "ignored_token_ids": list(ids),
        "ignored_token_str_sample": [texts[index] for index in ids[:SAMPLE]],
        "size": len(ids),
        "share": len(ids) / len(texts),
        "d_vocab": len(texts),
    }
