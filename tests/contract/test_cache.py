"""A pass that continues stored keys and values gives what one pass over everything gives."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.errors import CapabilityError, PromptError
from layerscope.models import Add, Replace, Start, TokenBatch, ZeroAblate
from layerscope.models.backends.base import Capability
from support.loaded import EVERY, SEQUENCES, batch_of, hf, loaded, state_of
from support.tiny_models import tiny, tiny_tokenizer

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SIDES = ("left", "right")
MORE = ((11, 95, 230, 4), (301, 60, 9, 77), (35, 36, 37, 38))

# Windows, sinks, chunks, latent attention, mixtures of experts: what the table does not list.
OTHERS = ("mistral_wide_heads", "qwen2_window", "olmo3", "gpt_oss", "deepseek_v3", "mixtral")


def longer(counts):
    return [
        [*first, *more[:count]] for first, more, count in zip(SEQUENCES, MORE, counts, strict=True)
    ]


def vector(seed):
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


def cached(family):
    """Return the model of a family; one that keeps more than keys and values must refuse."""
    if family in EVERY:
        model = loaded(family)
    else:
        model = layerscope.load(tiny(family), tokenizer=tiny_tokenizer())
    if Capability.CACHE not in model.backend.capabilities:
        with pytest.raises(CapabilityError, match="run the whole sequence instead"):
            model.run(batch_of(), keep_cache=True)
        pytest.skip("has no cache of keys and values")
    return model


@pytest.mark.parametrize("family", (*EVERY, *OTHERS))
@pytest.mark.parametrize("side", SIDES)
def test_token_by_token_equals_one_pass(family, side):
    model = cached(family)
    result = model.run(batch_of(side=side), keep_cache=True, logits="last")
    for step in range(4):
        ids = [[row[step]] for row in MORE]
        result = model.run(ids, cache=result.cache, keep_cache=True, logits="last")
        expected = model.run(longer([step + 1] * 3), logits="last")
        torch.testing.assert_close(result.logits, expected.logits, **CLOSE)


@pytest.mark.parametrize("family", (*EVERY, *OTHERS))
@pytest.mark.parametrize("side", SIDES)
def test_continuations_of_different_lengths_equal_one_pass(family, side):
    model, counts = cached(family), (3, 1, 2)
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


@pytest.mark.parametrize("family", EVERY)
def test_activations_edits_and_a_start_continue_too(family):
    model = cached(family)
    edits = [Add("resid_post.1", vector(1), positions=[2, 9], rows=0)]
    prompt = model.run(
        batch_of(0), edits=[Add("resid_post.1", vector(1), positions=2)], keep_cache=True
    )
    rest = [list(MORE[0])]
    wanted = ["resid_pre.*", "attn_out.*", "mlp_out.*", "final_norm"]
    whole = model.run(longer([4] * 3)[:1], edits=edits, capture=wanted)
    later = model.run(
        rest,
        cache=prompt.cache,
        edits=[Add("resid_post.1", vector(1), positions=9)],
        capture=wanted,
    )
    torch.testing.assert_close(later.logits, whole.logits[:, 9:], **CLOSE)
    for site in later:
        torch.testing.assert_close(later[site], whole[site][:, 9:], **CLOSE)
    start = Start(2, later["resid_pre.2"])
    resumed = model.run(rest, cache=prompt.cache, start=start)
    torch.testing.assert_close(resumed.logits, whole.logits[:, 9:], **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "gpt_neox"))
def test_inside_attention_only_the_new_tokens_are_seen(family):
    model = loaded(family)
    wanted = ["attn.1.q", "attn.1.k", "attn.1.v", "attn.1.z"]
    whole = model.run(longer([4] * 3)[:1], capture=[*wanted, "attn.1.pattern"])
    prompt = model.run(batch_of(0), keep_cache=True)
    later = model.run([list(MORE[0])], cache=prompt.cache, capture=[*wanted, "attn.1.pattern"])
    for site in wanted:
        torch.testing.assert_close(later[site], whole[site][:, 9:], **CLOSE)
    pattern = later["attn.1.pattern"]
    torch.testing.assert_close(pattern, whole["attn.1.pattern"][:, :, 9:], **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "gpt_neox"))
@pytest.mark.parametrize("site", ("attn.1.k", "attn.1.v", "attn.0.k_pre", "attn.0.head.1.v"))
def test_edited_keys_and_values_are_what_is_kept(family, site):
    model = loaded(family)
    if family in ("gpt2", "gpt_neox") and site == "attn.0.k_pre":
        pytest.skip("one projection gives queries and keys")
    if family in ("llama", "gemma2") and site == "attn.0.head.1.v":
        site = "attn.0.kv_head.1.v"
    edit = ZeroAblate(site, positions=[1, 3], rows=[0, 2])
    prompt = model.run(batch_of(), edits=[edit], keep_cache=True, logits=None)
    later = model.run([list(row) for row in MORE], cache=prompt.cache)
    whole = model.run(longer([4] * 3), edits=[edit])
    plain = model.run(longer([4] * 3))
    for row, sequence in enumerate(SEQUENCES):
        part = slice(len(sequence), len(sequence) + 4)
        torch.testing.assert_close(later.logits[row], whole.logits[row, part], **CLOSE)
    assert not torch.allclose(plain.logits[0, 9:13], whole.logits[0, 9:13], **CLOSE)


@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2"))
def test_a_cache_is_never_changed_and_can_be_continued_twice(family):
    model = loaded(family)
    before = state_of(hf(model))
    cache = model.run(batch_of(), keep_cache=True, logits=None).cache
    stored = [layer.keys.clone() for layer in cache.native().layers]
    ids = [[5], [6], [7]]
    first = model.run(ids, cache=cache, keep_cache=True)
    edit = Replace("resid_post.0", vector(3))
    model.run([list(row) for row in MORE], cache=cache, edits=[edit], keep_cache=True)
    again = model.run(ids, cache=cache, keep_cache=True)
    assert torch.equal(first.logits, again.logits)
    for layer, keys in zip(cache.native().layers, stored, strict=True):
        assert torch.equal(layer.keys, keys)
    assert cache.mask.shape[1] == 9 and first.cache.mask.shape[1] == 10
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2"))
def test_rows_and_columns_of_a_cache_can_be_chosen(family):
    model = loaded(family)
    cache = model.run(batch_of(), keep_cache=True, logits=None).cache
    picked = model.run([[5], [6], [5]], cache=cache.select([2, 0, 2]), logits="last").logits
    sequences = [[*SEQUENCES[2], 5], [*SEQUENCES[0], 6], [*SEQUENCES[2], 5]]
    torch.testing.assert_close(picked, model.run(sequences, logits="last").logits, **CLOSE)
    single = model.run(batch_of(0), keep_cache=True, logits=None).cache
    cut = model.run([list(SEQUENCES[0][6:])], cache=single.before(6), logits="last").logits
    expected = model.run(batch_of(0), logits="last").logits
    torch.testing.assert_close(cut, expected, **CLOSE)


def test_what_a_cache_cannot_take_is_refused():
    model = loaded("llama")
    cache = model.run(batch_of(), keep_cache=True, logits=None).cache
    with pytest.raises(PromptError, match="2 prompts cannot continue a cache of 3 rows"):
        model.run([[5], [6]], cache=cache)
    with pytest.raises(PromptError, match=r"9 tokens in the cache and 120 more.*holds 128"):
        model.run([[5] * 120, [6], [7]], cache=cache)


@pytest.mark.parametrize("family", ("kimi_linear", "deepseek_v32"))
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(family):
    model = layerscope.load(tiny(family), tokenizer=tiny_tokenizer())
    with pytest.raises(CapabilityError, match="run the whole sequence instead"):
        model.run(batch_of(), keep_cache=True)
