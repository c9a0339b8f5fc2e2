"""Cached generation against passes over everything so far: the same logits, edited or not."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import CapabilityError
from layerscope.models import Add, Apply, ProjectOut, Replace, Scale, Scope, TokenBatch, ZeroAblate
from layerscope.models.backends.base import Capability
from support.loaded import EVERY, LISTED, SEQUENCES, batch_of, hf, loaded, state_of

CLOSE = {"rtol": 3e-5, "atol": 3e-5}
STEPS = 6
D = 32


def cached(family):
    """Return the model of a family; one that keeps more than keys and values must refuse."""
    model = loaded(family)
    if Capability.CACHE not in model.backend.capabilities:
        with pytest.raises(CapabilityError, match="which generation needs"):
            model.generate(batch_of())
        pytest.skip("has no cache of keys and values")
    return model


def vector(seed):
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def token_by_token(model, prompt, steps, edits_at=lambda length: ()):
    """Continue one prompt greedily with a whole uncached pass per token: the slow reference."""
    ids, logits = list(prompt), []
    for _ in range(steps):
        result = model.run(TokenBatch.from_ids([ids]), edits=edits_at(len(ids)), logits="last")
        logits.append(result.logits[0, 0])
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :], torch.stack(logits)


# What each scope means, spelt out: prompt length, length so far -> positions.
SCOPES = {
    "all": (Scope.all(), lambda prompt, now: range(now)),
    "prompt": (Scope.prompt(), lambda prompt, now: range(prompt)),
    "after_prompt": ("after_prompt", lambda prompt, now: range(prompt, now)),
    "last_k": (Scope.last_k(2), lambda prompt, now: range(prompt - 2, now)),
    "last_k beyond": (Scope.last_k(7), lambda prompt, now: range(max(0, prompt - 7), now)),
    "last_k of prompt": (
        Scope.last_k(2, prefill_only=True),
        lambda prompt, now: range(prompt - 2, prompt),
    ),
    "from_position": (Scope.from_position(3), lambda prompt, now: range(3, now)),
    # Within the prompt of one row, among the new tokens of the others.
    "from_position later": ("from_position:8", lambda prompt, now: range(8, now)),
    "generated tokens": (
        Scope.steps(1, 4),
        lambda prompt, now: range(prompt + 1, min(now, prompt + 4)),
    ),
    "generated tokens from": ("steps:2:", lambda prompt, now: range(prompt + 2, now)),
    "from_position of prompt": (
        Scope.from_position(4, prefill_only=True),
        lambda prompt, now: range(4, prompt),
    ),
}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("side", ("left", "right"))
def test_generation_equals_passes_over_everything_so_far(family, side):
    model = cached(family)
    made = model.generate(batch_of(side=side), max_new_tokens=STEPS, eos=False, keep_logits=True)
    for row, prompt in enumerate(SEQUENCES):
        ids, logits = token_by_token(model, prompt, STEPS)
        torch.testing.assert_close(made.logits[row], logits, **CLOSE)
        assert made.ids[row] == tuple(ids)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("name", SCOPES)
def test_an_edit_acts_on_the_tokens_of_its_scope(family, name):
    model = cached(family)
    scope, meaning = SCOPES[name]
    made = model.generate(
        batch_of(side="left"),
        edits=[Add("resid_post.1", vector(1), coefficient=2.0, scope=scope)],
        max_new_tokens=STEPS,
        eos=False,
        keep_logits=True,
    )
    for row, prompt in enumerate(SEQUENCES):

        def edits(now, prompt=prompt):
            positions = list(meaning(len(prompt), now))
            add = Add("resid_post.1", vector(1), coefficient=2.0, positions=positions)
            return [add] if positions else []

        ids, logits = token_by_token(model, prompt, STEPS, edits)
        torch.testing.assert_close(made.logits[row], logits, **CLOSE)
        assert made.ids[row] == tuple(ids)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "gpt_neox", "mistral"))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name", SCOPES)
def test_rows_have_edits_and_scopes_of_their_own(family, side, name):
    model = cached(family)
    scope, meaning = SCOPES[name]
    made = model.generate(
        batch_of(side=side),
        edits=[
            Add(
                "resid_mid.0" if family != "gpt_neox" else "attn_out.0",
                vector(1),
                rows=0,
                scope=scope,
            ),
            Replace("mlp_out.1", vector(2), rows=[0, 2], scope=scope),
            Scale("resid_post.1", 1.5, rows=1, scope="after_prompt"),
            Apply("attn.1.z", lambda values, context: -values, rows=2, scope=scope),
            ProjectOut("resid_pre.2", vector(4), rows=[1, 2], scope=Scope.prompt()),
        ],
        max_new_tokens=STEPS,
        eos=False,
        keep_logits=True,
    )
    for row, prompt in enumerate(SEQUENCES):

        def edits(now, row=row, prompt=prompt):
            chosen = list(meaning(len(prompt), now))
            new = list(range(len(prompt), now))
            every = [
                (
                    0,
                    Add(
                        "resid_mid.0" if family != "gpt_neox" else "attn_out.0",
                        vector(1),
                        positions=chosen,
                    ),
                ),
                (0, Replace("mlp_out.1", vector(2), positions=chosen)),
                (2, Replace("mlp_out.1", vector(2), positions=chosen)),
                (1, Scale("resid_post.1", 1.5, positions=new)),
                (2, Apply("attn.1.z", lambda values, context: -values, positions=chosen)),
                (1, ProjectOut("resid_pre.2", vector(4), positions=list(range(len(prompt))))),
                (2, ProjectOut("resid_pre.2", vector(4), positions=list(range(len(prompt))))),
            ]
            return [edit for where, edit in every if where == row and edit.positions]

        _, logits = token_by_token(model, prompt, STEPS, edits)
        torch.testing.assert_close(made.logits[row], logits, **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
@pytest.mark.parametrize("site", ("attn.1.k", "attn.1.v", "attn.0.q", "logits", "embed"))
def test_scopes_hold_inside_attention_and_at_the_ends(family, site):
    model = cached(family)
    made = model.generate(
        batch_of(side="right"),
        edits=[Scale(site, -0.5, scope="last_k:2")],
        max_new_tokens=STEPS,
        eos=False,
        keep_logits=True,
    )
    for row, prompt in enumerate(SEQUENCES):
        ids = [*prompt, *made.ids[row]]
        edit = Scale(site, -0.5, positions=list(range(len(prompt) - 2, len(ids))))
        whole = model.run(TokenBatch.from_ids([ids]), edits=[edit]).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(made.logits[row], whole, **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2"))
def test_positions_count_the_whole_sequence(family):
    model = cached(family)
    edits = [
        ZeroAblate("mlp_out.0", positions=-1),  # of the prompt
        Replace("resid_post.1", torch.stack([vector(5), vector(6)]), positions=[0, 2], rows=1),
        Add("resid_post.0", vector(7), positions=[[10], [6], [7]]),  # all are new tokens
        Add("resid_post.0", vector(8), positions=[4, 8]),  # 8 is in the prompt of row 0 alone
    ]
    made = model.generate(
        batch_of(side="left"), edits=edits, max_new_tokens=STEPS, eos=False, keep_logits=True
    )
    for row, prompt in enumerate(SEQUENCES):
        ids = [*prompt, *made.ids[row]]
        plain = [
            ZeroAblate("mlp_out.0", positions=len(prompt) - 1),
            Add("resid_post.0", vector(7), positions=(10, 6, 7)[row]),
            Add("resid_post.0", vector(8), positions=[4, 8]),
        ]
        if row == 1:
            plain.append(
                Replace("resid_post.1", torch.stack([vector(5), vector(6)]), positions=[0, 2])
            )
        whole = model.run(TokenBatch.from_ids([ids]), edits=plain).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(made.logits[row], whole, **CLOSE)


@pytest.mark.parametrize("family", LISTED)
@pytest.mark.parametrize("hooked", (False, True))
def test_sixty_four_greedy_tokens_equal_the_uncached_reference(family, hooked):
    model = cached(family)
    edit = Add("resid_post.1", vector(9), scope="all")
    edits = [edit] if hooked else []
    widths = []
    hook = (
        hf(model)
        .get_input_embeddings()
        .register_forward_pre_hook(lambda module, args: widths.append(tuple(args[0].shape)))
    )
    try:
        made = model.generate(
            batch_of(0), edits=edits, max_new_tokens=64, eos=False, keep_logits=True
        )
    finally:
        hook.remove()
    assert widths == [(1, 9)] + [(1, 1)] * 63  # every token is read once
    expected, _ = token_by_token(model, SEQUENCES[0], 64, lambda now: edits)
    assert made.ids == (tuple(expected),)
    if hooked:
        plain = model.generate(batch_of(0), max_new_tokens=64, eos=False, keep_logits=True)
        assert not torch.allclose(made.logits, plain.logits, atol=1e-2)


@pytest.mark.parametrize("family", ("llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox"))
def test_greedy_tokens_are_those_of_hugging_face(family):
    model, batch = cached(family), batch_of(side="left")
    before = state_of(hf(model))
    with torch.no_grad():
        expected = hf(model).generate(
            batch.ids,
            attention_mask=batch.attention_mask.long(),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, batch.width :]
    made = model.generate(batch, max_new_tokens=16, eos=False)
    assert made.ids == tuple(map(tuple, expected.tolist()))
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2", "gpt_neox"))
def test_activations_are_those_of_the_generated_tokens(family):
    model = cached(family)
    wanted = ["resid_post.*", "attn.1.z", "attn.0.k", "final_norm"]
    edit = Add("resid_post.0", vector(3), scope="after_prompt")
    made = model.generate(batch_of(), edits=[edit], capture=wanted, max_new_tokens=STEPS, eos=False)
    assert made.steps.all() and made.steps.shape == (3, STEPS)
    for row, (prompt, ids) in enumerate(zip(SEQUENCES, made.sequences, strict=True)):
        new = list(range(len(prompt), len(ids)))
        whole = model.run(
            TokenBatch.from_ids([ids]),
            capture=wanted,
            edits=[Add("resid_post.0", vector(3), positions=new)],
        )
        assert set(whole) == set(made.activations)
        for site in whole:
            torch.testing.assert_close(made[site][row], whole[site][0, len(prompt) :], **CLOSE)


def test_nothing_is_left_behind_when_a_stream_is_dropped_or_an_edit_raises():
    model = loaded("llama")
    before = state_of(hf(model))
    expected = model.generate(batch_of(), max_new_tokens=4, eos=False).ids

    stream = model.stream(
        batch_of(), edits=[Add("resid_post.0", vector(1))], max_new_tokens=20, eos=False
    )
    next(iter(stream))
    assert state_of(hf(model)) == before
    # Another generation in between changes neither.
    assert model.generate(batch_of(), max_new_tokens=4, eos=False).ids == expected
    whole = stream.result
    fresh = model.generate(
        batch_of(), edits=[Add("resid_post.0", vector(1))], max_new_tokens=20, eos=False
    )
    assert whole.ids == fresh.ids

    def fail(values, context):
        if values.shape[1] == 1:
            raise RuntimeError("mine")
        return values

    with pytest.raises(RuntimeError, match="mine"):
        model.generate(batch_of(), edits=[Apply("resid_post.0", fail)], max_new_tokens=4)
    assert state_of(hf(model)) == before
