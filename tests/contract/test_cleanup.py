"""Whatever happens in a run, the model is afterwards as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from layerscope.errors import EditError, ModelError
from layerscope.models import Add, Apply, Start
from layerscope.models.backends.huggingface.hooks import Carrier, Point
from layerscope.models.sites import Site
from support.loaded import EVERY, batch_of, hf, loaded, state_of


class Trouble(RuntimeError):
    pass


def raiser(error):
    def raise_(x, context):
        raise error

    return raise_


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("error", (Trouble("no"), KeyboardInterrupt(), SystemExit(3)))
def test_hooks_are_gone_after_an_exception(family, error):
    model, batch = loaded(family), batch_of(side="left")
    plain = model.run(batch, capture="resid_pre.*")
    before = state_of(hf(model))
    site = f"resid_post.{model.n_layers - 1}"
    edits = [Add("resid_post.*", torch.ones(model.d_model)), Apply(site, raiser(error))]
    start = Start(1, plain["resid_pre.1"])
    with pytest.raises(type(error)):
        model.run(batch, edits=edits, capture=model.sites())
    with pytest.raises(type(error)):
        model.run(batch, edits=edits[1:], start=start)
    with pytest.raises(type(error)):
        model.run(batch, edits=edits, stop_after=model.n_layers - 1)
    assert state_of(hf(model)) == before
    assert torch.equal(model.run(batch).logits, plain.logits)


def test_an_exception_of_the_model_itself_cleans_up_too():
    model, batch = loaded("llama"), batch_of(0)
    before = state_of(hf(model))

    def fail(*_):
        raise Trouble

    handle = hf(model).model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Trouble):
        model.run(batch, capture="resid_post.1:", start=Start(1, torch.zeros(1, 9, 32)))
    handle.remove()
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("returned", (None, 3.0, torch.zeros(2, 2)))
def test_a_function_that_returns_nonsense_is_an_edit_error(returned):
    model = loaded("llama")
    before = state_of(hf(model))
    with pytest.raises(EditError, match=r"resid_post.1.*\[1, 9, 32\]"):
        model.run(batch_of(0), edits=[Apply("resid_post.1", lambda x, _: returned)])
    assert state_of(hf(model)) == before


def test_hooks_of_the_user_keep_working_and_see_the_run():
    model, batch = loaded("gpt2"), batch_of(0)
    seen = []
    block = hf(model).transformer.h[1]
    handles = [
        block.register_forward_hook(lambda _, args, output: seen.append(output)),
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    result = model.run(batch, capture=["resid_pre.1", "resid_post.1"])
    assert torch.equal(seen[0], result["resid_pre.1"])
    assert torch.equal(seen[1], result["resid_post.1"])
    before = state_of(hf(model))
    model.run(batch, start=Start(2, result["resid_post.1"]))
    assert len(seen) == 4 and state_of(hf(model)) == before  # skipped blocks are still called
    for handle in handles:
        handle.remove()


def test_a_run_that_ends_inside_another_leaves_its_resumption_alone():
    model, batch = loaded("llama"), batch_of(0)
    plain = model.run(batch, capture="resid_pre.*")
    before = state_of(hf(model))
    computed = []

    def once(*_):
        handles.pop().remove()
        nested.append(model.run(batch, start=Start(1, plain["resid_pre.1"])).logits)
        handles.append(
            hf(model).model.layers[1].mlp.register_forward_hook(lambda *_: computed.append(1))
        )

    nested = []
    handles = [hf(model).model.embed_tokens.register_forward_hook(once)]
    result = model.run(batch, start=Start(2, plain["resid_pre.2"]))
    handles.pop().remove()
    assert not computed  # block 1 was still passed by after the inner run had gone
    assert torch.equal(nested[0], plain.logits) and torch.equal(result.logits, plain.logits)
    assert state_of(hf(model)) == before


def test_threads_do_not_see_each_other():
    model, batch = loaded("llama"), batch_of()
    plain = model.run(batch, capture="resid_pre.*")
    expected = {
        scale: model.run(batch, edits=[Apply("resid_post.1", lambda x, _, s=scale: x * s)]).logits
        for scale in (1.0, 2.0, 3.0)
    }
    before = state_of(hf(model))
    barrier = threading.Barrier(3, timeout=60)
    failures = []

    def work(scale):
        try:
            for turn in range(8):

                def edit(x, context, turn=turn):
                    if turn == 0:
                        barrier.wait()  # all three are inside a pass at once
                    return x * scale

                start = Start(1, plain["resid_pre.1"]) if turn % 2 else None
                result = model.run(batch, edits=[Apply("resid_post.1", edit)], start=start)
                real = batch.attention_mask
                torch.testing.assert_close(
                    result.logits[real], expected[scale][real], rtol=1e-5, atol=1e-5
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state_of(hf(model)) == before


def test_a_stand_in_of_someone_else_comes_back():
    model, batch = loaded("llama"), batch_of(0)
    full = model.run(batch, capture="resid_pre.1")
    block = hf(model).model.layers[0]
    calls = []
    original = block.forward

    def theirs(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = theirs
    try:
        model.run(batch, start=Start(1, full["resid_pre.1"]))
        assert block.forward is theirs and not calls
        model.run(batch)
        assert len(calls) == 1
    finally:
        del block.forward


def test_a_site_that_never_fires_is_an_error(monkeypatch):
    model = loaded("llama")
    found, absent = model.backend._points._find, Point(Carrier(torch.nn.Identity(), "input"))
    monkeypatch.setattr(
        model.backend._points,
        "_find",
        lambda site: absent if site == Site("resid_mid", 1) else found(site),
    )
    with pytest.raises(ModelError, match=r"never reached resid_mid.1"):
        model.run(batch_of(0), capture="resid_*.1")
    with pytest.raises(ModelError, match=r"never reached resid_mid.1"):
        model.run(batch_of(0), edits=[Add("resid_mid.1", torch.zeros(32))])


def test_a_model_that_overwrites_a_captured_tensor_is_an_error():
    model = loaded("llama")

    def overwrite(_, args):
        args[0].mul_(1.5)

    handle = hf(model).model.layers[1].register_forward_pre_hook(overwrite)
    try:
        with pytest.raises(ModelError, match=r"overwrote its activation at resid_post.0"):
            model.run(batch_of(0), capture="resid_post.0")
        model.run(batch_of(0), capture="resid_post.0", positions=[0, 1])
    finally:
        handle.remove()
