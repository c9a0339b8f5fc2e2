"""Equal prompts read once: the same tokens as when every row reads its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from layerscope.models import Add, Edit, Generation, LanguageModel, Scope, TokenBatch
from layerscope.models.generation.prefix import untouched
from support.loaded import SEQUENCES, loaded

ROWS = [SEQUENCES[index] for index in (0, 1, 0, 2, 0, 1)]
SEEDS = [5, 5, 6, 5, 5, 8]


def made(model: LanguageModel, edits: Sequence[Edit], **options: Any) -> Generation:
    return model.generate(
        TokenBatch.from_ids(ROWS, padding_side="left"),
        max_new_tokens=6,
        temperature=1.0,
        seed=SEEDS,
        edits=edits,
        eos=False,
        **options,
    )


def vector(model: LanguageModel, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(rows, model.d_model, generator=generator)
    return found[0] if rows == 1 else found[:, None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "scope", [None, "last_k:1", "last_k:3", "after_prompt", "from_position:4", "all", "rows"]
)
def test_the_answers_are_those_of_rows_read_one_by_one(
    family: str, scope: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(family)
    edits: list[Edit] = []
    if scope == "rows":
        edits = [Add("resid_post.0", vector(model), scope="last_k:2", rows=[row]) for row in (0, 4)]
    elif scope is not None:
        edits = [Add("resid_post.0", vector(model), scope=scope)]
    expected = made(model, edits, capture="resid_post.1")
    read: list[int] = []
    real = LanguageModel.run

    def counted(self: LanguageModel, prompts: Any, **options: Any) -> Any:
        read.append(int(prompts.attention_mask.sum()))
        return real(self, prompts, **options)

    monkeypatch.setattr(LanguageModel, "run", counted)
    found = made(model, edits, capture="resid_post.1", share_prompts=True)
    assert found.ids == expected.ids
    assert found.texts == expected.texts
    for a, b in zip(found.logprobs, expected.logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    torch.testing.assert_close(
        found["resid_post.1"], expected["resid_post.1"], rtol=1e-4, atol=1e-4
    )
    # An edit of the first token leaves nothing to share.
    batch = TokenBatch.from_ids(ROWS, padding_side="left")
    kept = [0] * len(ROWS) if scope == "all" else untouched(batch, edits)
    once = {ids[:n]: n for ids, n in zip(ROWS, kept, strict=True)}
    tokens = sum(once.values()) + sum(map(len, ROWS)) - sum(kept)
    assert sum(read[:-6]) == tokens
    assert (tokens < sum(map(len, ROWS))) == (scope != "all")


def test_what_no_edit_acts_on_ends_before_the_first_edit_and_the_last_token() -> None:
    batch = TokenBatch.from_ids(ROWS[:2], padding_side="left")  # 9 and 5 tokens
    value = torch.zeros(1)

    def ends(**options: Any) -> list[int]:
        return untouched(batch, [Add("resid_post.0", value, **options)])

    assert untouched(batch, []) == [8, 4]
    assert ends() == [0, 0]
    assert ends(scope="last_k:3") == [6, 2]
    assert ends(scope=Scope.from_position(7)) == [7, 4]
    assert ends(scope="after_prompt") == [8, 4]
    assert ends(positions=-2) == [7, 3]
    assert ends(positions=[3, -1]) == [3, 3]
    assert ends(positions=[[2], [1]], rows=[0, 1]) == [1, 1]
