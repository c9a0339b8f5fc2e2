"""Starting in the middle from a stored residual, and stopping early."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.errors import EditError, SiteError
from layerscope.models import Add, Capture, Start
from layerscope.models.backends.huggingface.backend import HuggingFaceBackend
from layerscope.models.run import plan
from support.loaded import EVERY, batch_of, hf, loaded, real, state_of
from support.tiny_models import tiny, tiny_tokenizer


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("side", ("right", "left"))
def test_start_at_any_layer_equals_the_full_pass(family, side):
    model, batch = loaded(family), batch_of(side=side)
    before = state_of(hf(model))
    full = model.run(batch, capture="resid_*.*")
    for layer in range(model.n_layers):
        calls = CallCounter(model)
        resumed = model.run(
            batch,
            start=Start(layer, full[f"resid_pre.{layer}"]),
            capture=[f"resid_pre.{layer}", f"resid_post.{layer}", "resid_post.-1"],
        )
        assert calls.stop() == model.n_layers - layer
        for row in range(3):
            torch.testing.assert_close(
                real(resumed.logits, batch, row),
                real(full.logits, batch, row),
                rtol=1e-5,
                atol=1e-5,
            )
            for site in resumed:
                torch.testing.assert_close(
                    real(resumed[site], batch, row),
                    real(full[site], batch, row),
                    rtol=1e-5,
                    atol=1e-5,
                )
    assert state_of(hf(model)) == before


class CallCounter:
    """Counts how many MLPs compute: what a resumed pass must not do below its start."""

    def __init__(self, model):
        self.count = 0
        self.handles = [
            block.mlp.module.register_forward_hook(self) for block in model.backend.structure.blocks
        ]

    def __call__(self, *_):
        self.count += 1

    def stop(self):
        for handle in self.handles:
            handle.remove()
        return self.count


@pytest.mark.parametrize("family", EVERY)
def test_a_start_with_another_residual_takes_effect(family):
    model, batch = loaded(family), batch_of(0)
    residual = torch.randn(1, batch.width, model.d_model)
    result = model.run(batch, start=Start(-1, residual), capture="resid_pre.-1")
    assert torch.equal(result["resid_pre.-1"], residual)
    assert not torch.allclose(result.logits, model.run(batch).logits, atol=0.1)


@pytest.mark.parametrize("family", EVERY)
def test_stop_after_a_layer_gives_its_residual_and_computes_no_more(family):
    model, batch = loaded(family), batch_of()
    before = state_of(hf(model))
    full = model.run(batch, capture="resid_post.*")
    for layer in range(model.n_layers):
        calls = CallCounter(model)
        result = model.run(batch, stop_after=layer, capture=f"resid_post.{layer}")
        assert calls.stop() == layer + 1
        assert result.logits is None
        assert torch.equal(result[f"resid_post.{layer}"], full[f"resid_post.{layer}"])
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", ("llama", "gemma3", "gpt2"))
def test_start_and_stop_together_compute_one_block(family):
    model, batch = loaded(family), batch_of()
    full = model.run(batch, capture="resid_*.1")
    calls = CallCounter(model)
    result = model.run(
        batch, start=Start(1, full["resid_pre.1"]), stop_after=1, capture="resid_post.1"
    )
    assert calls.stop() == 1
    assert torch.equal(result["resid_post.1"], full["resid_post.1"])


@pytest.mark.parametrize("family", EVERY)
def test_a_lean_pass_gives_the_positions_asked_for(family):
    model, batch = loaded(family), batch_of()
    before = state_of(hf(model))
    end = Capture("final_norm", positions=[-1])
    full = model.run(batch, capture=end, logits="last")
    lean = model.run(batch, capture=end, logits="last", lean=True)
    torch.testing.assert_close(lean.logits, full.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lean["final_norm"], full["final_norm"], rtol=1e-5, atol=1e-5)
    # An edit inside the last block, and everything that wants all positions, acts as ever.
    edit = Add("mlp_out.-1", torch.ones(model.d_model), positions=-1)
    for options in ({"edits": [edit]}, {"capture": "mlp_out.-1"}, {"logits": "all"}):
        plain = model.run(batch, **{"logits": "last", **options})
        again = model.run(batch, **{"logits": "last", **options}, lean=True)
        for row in range(3):
            last = -1 if plain.logits.shape[1] == 1 else batch.lengths[row] - 1
            torch.testing.assert_close(
                again.logits[row, last], plain.logits[row, last], rtol=1e-5, atol=1e-5
            )
        for site in plain:
            torch.testing.assert_close(again[site], plain[site], rtol=1e-5, atol=1e-5)
    assert state_of(hf(model)) == before


def test_a_lean_pass_computes_less():
    model, batch = loaded("llama"), batch_of()
    seen = []
    mlp = model.backend.structure.blocks[-1].mlp.module
    handle = mlp.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    try:
        model.run(batch, logits="last", lean=True)
        model.run(batch, logits="last")
        model.run(batch, logits="all", lean=True)
    finally:
        handle.remove()
    assert seen == [1, 9, 9]


def test_sites_out_of_reach_are_named():
    model, batch = loaded("llama"), batch_of(0)
    start = Start(1, torch.zeros(1, batch.width, model.d_model))
    with pytest.raises(SiteError, match=r"'resid_post.0' lies before the start at block 1"):
        model.run(batch, start=start, capture="resid_post.*")
    with pytest.raises(SiteError, match="'embed' lies before"):
        model.run(batch, start=start, capture="embed")
    with pytest.raises(SiteError, match=r"'resid_post.2' lies beyond stop_after=1"):
        model.run(batch, stop_after=1, capture=["resid_post.1", "resid_post.2"])
    with pytest.raises(SiteError, match="'final_norm' lies beyond"):
        model.run(batch, stop_after=-1, capture="final_norm")
    with pytest.raises(SiteError, match="starts at block 1 but stops after block 0"):
        model.run(batch, start=start, stop_after=0)
    with pytest.raises(SiteError, match="layers 0 to 2"):
        model.run(batch, stop_after=3)


def test_a_residual_of_another_shape_is_refused():
    model, batch = loaded("llama"), batch_of(0)
    with pytest.raises(EditError, match=r"has shape \[1, 3, 32\]; this batch needs \[1, 9, 32\]"):
        model.run(batch, start=Start(1, torch.zeros(1, 3, model.d_model)))


def test_the_first_run_may_be_a_resumed_one():
    model = layerscope.load(tiny("gpt2"), tokenizer=tiny_tokenizer(), verify=False)
    full = loaded("gpt2").run(batch_of(0), capture="resid_pre.2")  # the same weights
    result = model.run(batch_of(0), start=Start(2, full["resid_pre.2"]))
    assert torch.equal(result.logits, full.logits)


def test_a_resumed_first_run_learns_that_blocks_return_tuples():
    # Six layers: a tensor taken for a tuple would run out of dimensions on the way.
    model = layerscope.load(tiny("gptj", num_hidden_layers=6), tokenizer=tiny_tokenizer())
    batch = batch_of(0)
    full = model.run(batch, capture="resid_pre.5")
    fresh = HuggingFaceBackend(hf(model), model.backend.structure)
    for _ in range(2):
        request = plan(fresh, batch, start=Start(5, full["resid_pre.5"]))
        assert torch.equal(fresh.execute(request).logits, full.logits)
