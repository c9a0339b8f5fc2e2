"""What an edit can and cannot reach, in every dtype, and how much a cached step reads."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.models import Add, Replace, TokenBatch
from support.loaded import hf, loaded
from support.tiny_models import tiny, tiny_tokenizer

IDS = (1, 17, 40, 5, 300, 251)
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_block_leaves_cannot_change_its_own_keys_and_values(family: str) -> None:
    model = loaded(family)
    sites = [f"attn.{layer}.{part}" for layer in range(model.n_layers) for part in ("k", "v")]
    batch, at = TokenBatch.from_ids([IDS]), 3
    plain = model.run(batch, capture=sites)
    value = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    edit = Replace("resid_post.0", value=3 * value, positions=at)
    edited = model.run(batch, capture=sites, edits=[edit])
    for site in sites:
        before, after = plain[site][0], edited[site][0]
        if ".0." in site:
            assert torch.equal(before, after), site
            continue
        assert torch.equal(before[:at], after[:at]), site
        assert not torch.equal(before[at], after[at]), site
    assert plain.logits is not None and edited.logits is not None
    assert torch.equal(plain.logits[0, :at], edited.logits[0, :at])
    assert not torch.equal(plain.logits[0, at], edited.logits[0, at])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_nothing_is_added_bit_for_bit_and_no_vector_changes_the_dtype(dtype: torch.dtype) -> None:
    model = layerscope.load(
        tiny("llama").to(dtype), tokenizer=tiny_tokenizer(), dtype=dtype, device="cpu"
    )
    batch = TokenBatch.from_ids([IDS])
    sites = ["resid_post.0", "resid_post.2"]
    plain = model.run(batch, capture=sites)
    wide = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1)).double()
    for edit in (
        Add("resid_post.0", wide, 0.0),
        Add("resid_post.0", torch.zeros(model.d_model, dtype=torch.float64)),
    ):
        found = model.run(batch, capture=sites, edits=[edit])
        assert torch.equal(found.logits, plain.logits)
    moved = model.run(batch, capture=sites, edits=[Add("resid_post.0", wide)])
    assert moved.logits.dtype == plain.logits.dtype
    assert all(moved[site].dtype == dtype for site in sites)
    assert not torch.equal(moved.logits, plain.logits)


def test_every_step_reads_one_token_also_when_it_is_steered() -> None:
    model = loaded("llama")
    widths: list[int] = []
    block = hf(model).model.layers[0]
    handle = block.register_forward_pre_hook(
        lambda _module, args, kwargs: widths.append(
            (args[0] if args else kwargs["hidden_states"]).shape[1]
        ),
        with_kwargs=True,
    )
    try:
        for edits in ((), [Add("resid_post.1", torch.ones(model.d_model), 0.1)]):
            widths.clear()
            model.generate(TokenBatch.from_ids([IDS]), max_new_tokens=8, edits=edits, eos=False)
            assert widths == [len(IDS)] + [1] * 7
    finally:
        handle.remove()


def test_cached_steps_in_bfloat16_choose_what_whole_passes_choose() -> None:
    model = layerscope.load(
        tiny("llama").to(torch.bfloat16), tokenizer=tiny_tokenizer(), dtype="bfloat16", device="cpu"
    )
    rows = [[1, *range(start, start + 5)] for start in range(10, 26)]
    made = model.generate(TokenBatch.from_ids(rows), max_new_tokens=16, eos=False)
    whole = [[*row, *ids] for row, ids in zip(rows, made.ids, strict=True)]
    logits = model.run(TokenBatch.from_ids(whole)).logits
    assert logits is not None
    agreed = [
        int(logits[row, column - 1].argmax()) == whole[row][column]
        for row in range(len(rows))
        for column in range(6, len(whole[row]))
    ]
    assert sum(agreed) >= 0.99 * len(agreed) and len(agreed) == 16 * 16
