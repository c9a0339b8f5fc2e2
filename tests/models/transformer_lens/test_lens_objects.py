"""What a run leaves behind in a TransformerLens object, and what is refused."""

from __future__ import annotations

import copy
import sys
import threading

import numpy as np
import polars as pl
import pytest
import torch

import layerscope
from layerscope.errors import CapabilityError, IdentityError, ModelError, SiteError
from layerscope.experiments.layers import Fact, PromptSet, analyze
from layerscope.models import Add, Apply, Start
from support.lens_objects import BRIDGE, HOOKED, bridge, hooked, lens, skip_without, wrapped
from support.loaded import batch_of, loaded, real, state_of
from support.tiny_models import tiny, tiny_tokenizer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=(BRIDGE, HOOKED))
def kind(request):
    skip_without(request.param)
    return request.param


def fresh(kind, family="llama"):
    return layerscope.load(wrapped(kind, tiny(family)), tokenizer=tiny_tokenizer())


class Trouble(RuntimeError):
    pass


@pytest.mark.parametrize("error", (Trouble("no"), KeyboardInterrupt()))
def test_nothing_is_left_behind_after_an_exception(kind, error):
    model, batch = lens(kind, "llama"), batch_of(side="left")
    plain = model.run(batch, capture="resid_pre.*")
    before = state_of(model.backend.model)

    def fail(values, context):
        raise error

    edits = [Add("resid_post.*", torch.ones(32)), Apply("attn.2.z", fail)]
    start = Start(1, plain["resid_pre.1"])
    capture = [*model.sites(), "attn.1.head.0.out"]
    for request in ({"capture": capture}, {"logits": "last"}, {"stop_after": 2}):
        with pytest.raises(type(error)):
            model.run(batch, edits=edits, **request)
    with pytest.raises(type(error)):
        model.run(batch, edits=edits[1:], start=start)
    assert state_of(model.backend.model) == before
    assert torch.equal(model.run(batch).logits, plain.logits)


def test_the_objects_own_hooks_act_and_stay(kind):
    model = fresh(kind)
    batch, seen = batch_of(0), []
    vector = torch.ones(32)

    def add(value, hook):
        seen.append(hook.name)
        return value + vector

    made = model.backend.model
    made.add_hook("blocks.1.hook_resid_post", add)
    with torch.no_grad():
        own = made(batch.ids)
    found = model.run(batch, capture="resid_post.1")
    assert torch.equal(found.logits, own)
    expected = loaded("llama").run(
        batch, edits=[Add("resid_post.1", vector)], capture="resid_post.1"
    )
    torch.testing.assert_close(found["resid_post.1"], expected["resid_post.1"], **CLOSE)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert len(seen) == 2
    made.reset_hooks()
    torch.testing.assert_close(model.run(batch).logits, loaded("llama").run(batch).logits, **CLOSE)
    assert len(seen) == 2


def test_a_run_within_a_run_sees_none_of_its_edits(kind):
    model, batch = lens(kind, "gpt2"), batch_of(0)
    plain, inner = model.run(batch).logits, []

    def nested(values, context):
        inner.append(model.run(batch_of(1, 2), capture="resid_post.1"))
        return values * 0

    outer = model.run(batch, edits=[Apply("embed", nested)], capture="embed")
    assert not outer["embed"].any()
    assert not torch.allclose(outer.logits, plain, atol=1e-3)
    again = model.run(batch_of(1, 2), capture="resid_post.1")
    assert torch.equal(inner[0].logits, again.logits)
    assert torch.equal(inner[0]["resid_post.1"], again["resid_post.1"])


def test_threads_do_not_see_each_other(kind):
    model = lens(kind, "gpt2")
    batches = [batch_of(row) for row in range(3)]
    vectors = [torch.full((32,), float(row)) for row in range(3)]
    edits = [[Add("resid_post.0", vector)] for vector in vectors]
    alone = [model.run(b, edits=e).logits for b, e in zip(batches, edits, strict=True)]
    wrong = []

    def work(row):
        for _ in range(8):
            found = model.run(batches[row], edits=edits[row], capture="resid_pre.1")
            if not torch.equal(found.logits, alone[row]):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_flow_to_edits(kind):
    found = []
    for model in (lens(kind, "llama"), loaded("llama")):
        vector = torch.zeros(32, requires_grad=True)
        result = model.run(
            batch_of(0), edits=[Add("resid_post.0", vector)], logits="last", gradients=True
        )
        result.logits[0, 0, 7].backward()
        found.append(vector.grad)
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize("family", ("llama", "gpt2", "gpt_neox"))
def test_processed_weights_keep_probabilities_and_patterns(kind, family):
    if kind == BRIDGE:
        made = bridge(copy.deepcopy(tiny(family)))
        made.enable_compatibility_mode()
    else:
        made = hooked(tiny(family), folded=True)
    model, batch = layerscope.load(made, tokenizer=tiny_tokenizer()), batch_of()
    assert model.identities.passed
    found = model.run(batch, capture="attn.*.pattern")
    expected = loaded(family).run(batch, capture="attn.*.pattern")
    for row in range(3):
        for site in expected:
            torch.testing.assert_close(
                real(found[site].movedim(2, 1), batch, row),
                real(expected[site].movedim(2, 1), batch, row),
                **CLOSE,
            )
        ours, theirs = (real(x.logits, batch, row) for x in (found, expected))
        torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), **CLOSE)
        assert not torch.allclose(ours, theirs, atol=1e-2)
    fact = Fact(key="one", prompt="The capital of Japan is", answer=" Rome")
    tables = [analyze(m, PromptSet("one", (fact,))).table.rows for m in (model, loaded(family))]
    for name in ("p_answer", "answer_rank", "entropy_bits", "kl_to_final_bits"):
        of_norm = [rows.filter(pl.col("lens") == "norm")[name].to_numpy() for rows in tables]
        np.testing.assert_allclose(*of_norm, rtol=1e-3, atol=1e-3)


def test_identities_are_proved_and_a_hooked_lie_is_refused(kind):
    made = wrapped(kind, tiny("llama"))
    report = layerscope.load(made, tokenizer=tiny_tokenizer()).identities
    assert {"embedding", "stream", "attention_sum", "next_norm", "unembedding"} <= {
        identity.name for identity in report.identities
    }
    assert not report.failures
    made.add_hook("hook_embed", lambda value, hook: value * 1.01)
    with pytest.raises(IdentityError, match="embedding"):
        layerscope.load(made, tokenizer=tiny_tokenizer())
    assert layerscope.load(made, tokenizer=tiny_tokenizer(), verify=False).identities is None


def test_shared_heads_are_read_by_head_and_edited_by_group(kind):
    model, reference, batch = lens(kind, "llama"), loaded("llama"), batch_of(0)
    sites = ["attn.0.head.3.k", "attn.0.kv_head.1.v", "attn.0.head.3.out", "attn.0.head.1.scores"]
    found, expected = (m.run(batch, capture=sites) for m in (model, reference))
    for site in sites:
        torch.testing.assert_close(found[site], expected[site], **CLOSE)
    with pytest.raises(CapabilityError, match=r"attn\.0\.kv_head\.1\.k"):
        model.run(batch, edits=[Add("attn.0.head.3.k", torch.zeros(8))])
    edit = [Add("attn.0.kv_head.1.k", torch.ones(8), positions=2)]
    torch.testing.assert_close(
        model.run(batch, edits=edit).logits, reference.run(batch, edits=edit).logits, **CLOSE
    )


def test_missing_sites_say_why(kind):
    model = lens(kind, "gpt_neox")
    for site, reason in (("resid_mid.0", "parallel"), ("mlp.0.up", "no gate")):
        with pytest.raises(CapabilityError, match=reason):
            model.run(batch_of(0), capture=site)
    with pytest.raises(SiteError):
        model.run(batch_of(0), capture="resid_pre.9")
    with pytest.raises(CapabilityError, match=r"head\.0"):
        model.run(batch_of(0), capture="attn.0.kv_head.0.v")


def test_an_object_without_a_branch_to_read_is_refused():
    made = wrapped(BRIDGE, tiny("granite"))  # its attention's output has no hook point
    with pytest.raises(ModelError, match=r"attn_out\.0.*Hugging Face backend"):
        layerscope.load(made, tokenizer=tiny_tokenizer())


def test_bad_requests_name_the_fix(kind):
    made = wrapped(kind, tiny("llama"))
    with pytest.raises(CapabilityError, match="move or cast"):
        layerscope.load(made, tokenizer=tiny_tokenizer(), dtype="bfloat16")
    made.tokenizer = None
    with pytest.raises(ModelError, match="tokenizer"):
        layerscope.load(made)
    model = layerscope.load(made, tokenizer=tiny_tokenizer())
    made.train()
    with pytest.raises(ModelError, match="eval"):
        model.run(batch_of(0))


def test_keys_edited_after_the_rotary_embedding_are_kept_or_refused(kind):
    model, batch = lens(kind, "llama"), batch_of(0)
    edit = [Add("attn.0.k", torch.ones(2, 8))]
    if kind == HOOKED:
        with pytest.raises(CapabilityError, match="k_pre"):
            model.run(batch, edits=edit, keep_cache=True)
        return
    found, expected = (m.run(batch, edits=edit, keep_cache=True) for m in (model, loaded("llama")))
    more = [[5, 6]]
    torch.testing.assert_close(
        model.run(more, cache=found.cache).logits,
        loaded("llama").run(more, cache=expected.cache).logits,
        **CLOSE,
    )


@pytest.mark.parametrize("option", ("use_attn_in", "use_split_qkv_input"))
def test_inputs_split_by_head_are_refused_whenever_they_are_split(kind, option):
    model = fresh(kind, "gpt2")
    made = model.backend.model
    getattr(made, f"set_{option}")(True)
    with pytest.raises(CapabilityError, match=option):
        model.run(batch_of(0), capture="attn_in.0")
    with pytest.raises(CapabilityError, match=option):
        layerscope.load(made, tokenizer=tiny_tokenizer())
    getattr(made, f"set_{option}")(False)
    assert torch.equal(model.run(batch_of(0)).logits, lens(kind, "gpt2").run(batch_of(0)).logits)


def test_the_missing_extra_names_the_pip_line(monkeypatch, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    with pytest.raises(ModelError, match=r"pip install 'layerscope\[transformer-lens\]'"):
        layerscope.load(tmp_path, tokenizer=tiny_tokenizer(), backend="transformer_lens")


def test_a_bridge_that_computes_something_else_is_refused(tmp_path):
    """TransformerLens wraps Cohere, and gets other logits than the model it wraps."""
    tiny("cohere").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(IdentityError, match=r"gives other logits than the model itself .* use the"):
        layerscope.load(tmp_path, backend="transformer_lens")
