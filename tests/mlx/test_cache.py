"""A pass that continues stored keys and values gives what one pass over everything gives."""

from __future__ import annotations

import pytest
import torch

from layerscope.models import Add, Start, TokenBatch, ZeroAblate
from support.loaded import SEQUENCES, batch_of
from support.mlx_models import FAMILIES, FOUR, in_hugging_face, in_mlx, mlx, native, state_of

CLOSE = {"rtol": 1e-4, "atol": 5e-5}
MORE = ((11, 95, 230, 4), (301, 60, 9, 77), (35, 36, 37, 38))


def longer(counts):
    return [
        [*first, *more[:count]] for first, more, count in zip(SEQUENCES, MORE, counts, strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ("left", "right"))
def test_continuations_equal_one_pass(family, side):
    model, counts = in_mlx(family), (3, 1, 2)
    start = model.run(batch_of(side=side), keep_cache=True, logits=None)
    chunk = TokenBatch.from_ids(
        [row[:count] for row, count in zip(MORE, counts, strict=True)], padding_side=side
    )
    second = model.run(chunk, cache=start.cache, keep_cache=True, logits="last")
    expected = model.run(longer(counts), logits="last")
    torch.testing.assert_close(second.logits, expected.logits, **CLOSE)
    third = model.run([[5], [6], [7]], cache=second.cache, logits="last")
    expected = model.run([[*row, 5 + i] for i, row in enumerate(longer(counts))], logits="last")
    torch.testing.assert_close(third.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("family", FOUR)
def test_greedy_text_with_edits_is_that_of_hugging_face(family):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    edits = [Add("resid_post.1", vector, coefficient=2.0)]

    def continued(model, steps=12):
        result = model.run(batch_of(), edits=edits, keep_cache=True, logits="last")
        rows = [[] for _ in SEQUENCES]
        for _ in range(steps):
            tokens = result.logits[:, -1].argmax(-1).tolist()
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            ids = TokenBatch.from_ids([[token] for token in tokens])
            result = model.run(ids, edits=edits, cache=result.cache, keep_cache=True, logits="last")
        return rows

    assert continued(in_mlx(family)) == continued(in_hugging_face(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_and_edited_in_a_continuation_is_of_the_new_tokens(family):
    model = in_mlx(family)
    wanted = ["attn.1.q", "attn.1.k", "attn.1.z", "attn.1.pattern", "resid_pre.2", "final_norm"]
    whole = model.run(
        longer([4] * 3)[:1], capture=wanted, edits=[ZeroAblate("attn.0.v", positions=[2, 10])]
    )
    prompt = model.run(batch_of(0), keep_cache=True, edits=[ZeroAblate("attn.0.v", positions=2)])
    later = model.run(
        [list(MORE[0])],
        cache=prompt.cache,
        capture=wanted,
        edits=[ZeroAblate("attn.0.v", positions=10)],
    )
    torch.testing.assert_close(later.logits, whole.logits[:, 9:], **CLOSE)
    for site in later:
        expected = whole[site].narrow(site.pos_axis, 9, 4)
        torch.testing.assert_close(later[site], expected, **CLOSE)
    resumed = model.run([list(MORE[0])], cache=prompt.cache, start=Start(2, later["resid_pre.2"]))
    torch.testing.assert_close(resumed.logits, later.logits, **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_a_cache_is_never_changed_and_its_rows_and_columns_can_be_chosen(family):
    core, model = mlx(), in_mlx(family)
    before = state_of(native(model))
    cache = model.run(batch_of(side="left"), keep_cache=True, logits=None).cache
    stored = [core.array(keys) for keys, _ in cache.layers]
    ids = [[5], [6], [7]]
    first = model.run(ids, cache=cache, keep_cache=True)
    model.run([list(row) for row in MORE], cache=cache, edits=[ZeroAblate("attn.1.k")])
    assert torch.equal(model.run(ids, cache=cache).logits, first.logits)
    for (keys, _), old in zip(cache.layers, stored, strict=True):
        assert core.array_equal(keys, old).item()
    picked = model.run([[5], [6], [5]], cache=cache.select([2, 0, 2]), logits="last").logits
    sequences = [[*SEQUENCES[2], 5], [*SEQUENCES[0], 6], [*SEQUENCES[2], 5]]
    torch.testing.assert_close(picked, model.run(sequences, logits="last").logits, **CLOSE)
    single = model.run(batch_of(0), keep_cache=True, logits=None).cache
    cut = model.run([list(SEQUENCES[0][6:])], cache=single.before(6), logits="last").logits
    torch.testing.assert_close(cut, model.run(batch_of(0), logits="last").logits, **CLOSE)
    assert state_of(native(model)) == before


@pytest.mark.parametrize("family", FOUR)
def test_generation_steered_at_the_generated_tokens_is_that_of_hugging_face(family):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    edits = [Add("attn_out.1", vector, coefficient=3.0)]
    found, expected = (
        load(family).generate(batch_of(side="left"), max_new_tokens=8, edits=edits, eos=False)
        for load in (in_mlx, in_hugging_face)
    )
    assert found.ids == expected.ids
    plain = in_mlx(family).generate(batch_of(side="left"), max_new_tokens=8, eos=False)
    assert found.logprobs != plain.logprobs
