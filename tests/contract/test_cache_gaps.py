"""Rows of unlike length continue exactly in every backend, beyond the windows of their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerscope
from layerscope.models import LanguageModel, TokenBatch
from support.loaded import SEQUENCES, loaded
from support.mlx_models import in_mlx
from support.tiny_models import tiny, tiny_tokenizer

# Longer than every tiny window even after the cut, and of three lengths.
ROWS = [[*sequence, *sequence] for sequence in SEQUENCES]
CUT, STEP = 5, 2


def in_a_bridge(family: str) -> LanguageModel:
    from support.lens_objects import BRIDGE, wrapped

    return layerscope.load(wrapped(BRIDGE, tiny(family)), tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("family", ("mistral", "gemma2", "gemma3", "gpt2"))
@pytest.mark.parametrize("backend", (loaded, in_mlx, in_a_bridge))
def test_padding_between_the_past_and_the_next_token_changes_nothing(
    backend: Any, family: str, side: Any
) -> None:
    model: LanguageModel = backend(family)
    first = TokenBatch.from_ids([row[:-CUT] for row in ROWS], padding_side=side)
    cache = model.run(first, keep_cache=True, logits="last").cache
    # The second piece is ragged as well: 2, 3 and 4 tokens.
    cuts = [len(row) - CUT + STEP + index for index, row in enumerate(ROWS)]
    middle = [row[len(row) - CUT : cut] for row, cut in zip(ROWS, cuts, strict=True)]
    cache = model.run(middle, cache=cache, keep_cache=True, logits="last").cache
    rest = [row[cut:] for row, cut in zip(ROWS, cuts, strict=True)]
    found = model.run(rest, cache=cache, logits="last").logits
    assert found is not None
    for index, row in enumerate(ROWS):
        expected = model.run([row], logits="last").logits
        assert expected is not None
        torch.testing.assert_close(found[index], expected[0], rtol=1e-4, atol=1e-4)
