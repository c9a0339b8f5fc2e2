"""Whatever happens in a run, the model is afterwards as it was; nothing handed out is its own."""

from __future__ import annotations

import threading

import pytest
import torch

from layerscope.errors import CapabilityError, EditError
from layerscope.models import Add, Apply, Start
from support.loaded import batch_of
from support.mlx_models import FAMILIES, in_mlx, mlx, native, state_of


class Trouble(RuntimeError):
    pass


def raiser(error):
    def raise_(x, context):
        raise error

    return raise_


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", (Trouble("no"), KeyboardInterrupt()))
def test_taps_are_gone_after_an_exception(family, error):
    model, batch = in_mlx(family), batch_of(side="left")
    before = state_of(native(model))
    plain = model.run(batch, capture="resid_pre.*")
    edits = [Apply("attn.1.pattern", lambda x, _: x), Apply("resid_post.2", raiser(error))]
    for options in ({"capture": model.sites()}, {"start": Start(1, plain["resid_pre.1"])}):
        with pytest.raises(type(error)):
            model.run(batch, edits=edits, **options)
    with pytest.raises(type(error)):
        model.run(batch, edits=edits, stop_after=2)
    assert state_of(native(model)) == before
    assert torch.equal(model.run(batch).logits, plain.logits)


def test_a_function_that_returns_nonsense_is_an_edit_error():
    model = in_mlx("llama")
    before = state_of(native(model))
    for returned in (None, torch.zeros(2, 2)):
        with pytest.raises(EditError, match=r"resid_post.1.*\[1, 9, 32\]"):
            model.run(batch_of(0), edits=[Apply("resid_post.1", lambda x, _, r=returned: r)])
    assert state_of(native(model)) == before


def test_a_tapped_module_shows_its_parents_everything(monkeypatch):
    model, seen = in_mlx("llama"), []
    blocks = native(model).model.layers
    original = type(blocks[1]).__call__

    def look(self, *args, **kwargs):
        seen.append((self.self_attn.n_heads, self.self_attn.rope.dims, self.use_sliding))
        seen.append((isinstance(self.mlp, kind), type(self.mlp).__name__, self.mlp is mlp))
        return original(self, *args, **kwargs)

    kind, mlp = type(blocks[0].mlp), blocks[1].mlp
    monkeypatch.setattr(type(blocks[1]), "__call__", look)
    model.run(batch_of(0), capture=model.sites(), start=None)
    assert seen[2:4] == [(4, 8, False), (True, "MLP", True)]


def test_a_run_inside_a_run_is_its_own():
    model, batch, nested = in_mlx("llama"), batch_of(), []
    plain = model.run(batch, capture=["resid_pre.*", "attn.1.pattern"])
    before = state_of(native(model))

    def inner(x, context):
        nested.append(model.run(batch, capture="attn.1.pattern"))
        nested.append(model.run(batch, start=Start(2, plain["resid_pre.2"])))
        nested.append(native(model)(mlx().array(batch.ids.numpy())))
        return x + 1

    edits = [Apply("attn_out.1", inner), Add("resid_post.1", torch.ones(32))]
    edited = model.run(batch, edits=edits, capture=["attn.1.pattern", "attn.2.pattern"])
    assert torch.equal(nested[0].logits, plain.logits)
    assert torch.equal(nested[0]["attn.1.pattern"], plain["attn.1.pattern"])
    torch.testing.assert_close(nested[1].logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.tensor(nested[2].tolist())[0], plain.logits[0])
    assert not torch.allclose(edited.logits, plain.logits)
    assert state_of(native(model)) == before


def test_threads_do_not_see_each_other():
    model, batch = in_mlx("gemma2"), batch_of(side="left")
    plain = model.run(batch, capture="resid_pre.*", keep_cache=True)
    expected = {
        scale: model.run(batch, edits=[Apply("resid_post.1", lambda x, _, s=scale: x * s)]).logits
        for scale in (1.0, 2.0, 3.0)
    }
    before = state_of(native(model))
    barrier = threading.Barrier(3, timeout=60)
    failures = []

    def work(scale):
        try:
            for turn in range(6):

                def edit(x, context, turn=turn):
                    if turn == 0:
                        barrier.wait()  # all three are inside a pass at once
                    return x * scale

                start = Start(1, plain["resid_pre.1"]) if turn % 2 else None
                result = model.run(
                    batch,
                    edits=[Apply("resid_post.1", edit)],
                    start=start,
                    capture=["attn.1.pattern", "resid_post.1"],
                )
                torch.testing.assert_close(result.logits, expected[scale], rtol=1e-4, atol=1e-4)
                assert len(result.activations) == 2
                model.run([[5], [6], [7]], cache=plain.cache)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(scale,)) for scale in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert state_of(native(model)) == before


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_nothing_handed_out_is_the_models_own(family):
    model, batch = in_mlx(family), batch_of(side="left")
    before = state_of(native(model))
    vector = torch.ones(32)
    first = model.run(batch, capture=model.sites(), edits=[Add("resid_post.1", vector)])
    kept = {site: value.clone() for site, value in first.activations.items()}
    logits = first.logits.clone()
    for value in (*first.activations.values(), first.logits, model.unembedding.weight.clone()):
        value.fill_(float("nan"))
    again = model.run(batch, capture=model.sites(), edits=[Add("resid_post.1", vector)])
    assert torch.equal(again.logits, logits) and torch.equal(vector, torch.ones(32))
    for site, value in again.activations.items():
        assert torch.equal(value, kept[site]), site
    assert state_of(native(model)) == before


def test_gradients_are_refused():
    model = in_mlx("llama")
    with pytest.raises(CapabilityError, match="mlx backend computes no gradients"):
        model.run(batch_of(0), gradients=True)
    _, norm = model.norm_at(1, "final")
    with pytest.raises(CapabilityError, match=r"no gradients through model.norm"):
        norm(torch.ones(1, 32, requires_grad=True))
