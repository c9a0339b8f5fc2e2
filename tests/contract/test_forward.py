"""What every family must do on a plain pass: the model's own numbers, whatever the padding."""

from __future__ import annotations

import pytest
import torch

from layerscope.models import Capture, Site
from support.loaded import EVERY, SEQUENCES, batch_of, hf, loaded, real, state_of

SIDES = ("right", "left")


def hugging_face_logits(model, batch):
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask.long(),
        "position_ids": batch.position_ids(),
    }
    with torch.no_grad():
        return hf(model)(**inputs, use_cache=False).logits


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("side", SIDES)
def test_no_edit_and_no_capture_is_bit_equal_to_hugging_face(family, side):
    model, batch = loaded(family), batch_of(side=side)
    before = state_of(hf(model))
    assert torch.equal(model.run(batch).logits, hugging_face_logits(model, batch))
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", EVERY)
def test_one_prompt_is_bit_equal_to_hugging_face_without_a_mask(family):
    model, batch = loaded(family), batch_of(0)
    with torch.no_grad():
        expected = hf(model)(input_ids=batch.ids, use_cache=False).logits
    assert torch.equal(model.run(batch).logits, expected)


@pytest.mark.parametrize("family", EVERY)
def test_capturing_everything_changes_nothing_and_every_site_fires(family):
    model, batch = loaded(family), batch_of(side="left")
    result = model.run(batch, capture=model.sites())
    assert torch.equal(result.logits, hugging_face_logits(model, batch))
    assert list(result.activations) and set(result.activations) == set(model.sites())
    for site, value in result.activations.items():
        shape = [len(batch), *model.backend.trailing(site, batch.width)]
        shape.insert(site.pos_axis, batch.width)
        assert value.shape == tuple(shape), site
        assert not value.requires_grad


@pytest.mark.parametrize("family", EVERY)
def test_padding_and_batching_do_not_change_the_numbers(family):
    model = loaded(family)
    capture = ["resid_pre.0", "resid_post.*"]
    single = [model.run(batch_of(row), capture=capture) for row in range(len(SEQUENCES))]
    for side in SIDES:
        batch = batch_of(side=side)
        result = model.run(batch, capture=capture)
        for row, alone in enumerate(single):
            torch.testing.assert_close(
                real(result.logits, batch, row), alone.logits[0], rtol=1e-5, atol=1e-5
            )
            for site in result:
                torch.testing.assert_close(
                    real(result[site], batch, row), alone[site][0], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("side", SIDES)
def test_selected_logits_are_those_of_the_full_pass(family, side):
    model, batch = loaded(family), batch_of(side=side)
    full = model.run(batch).logits
    last = model.run(batch, logits="last").logits
    some = model.run(batch, logits=[0, -2]).logits
    per_row = model.run(batch, logits=[[8], [1], [3]]).logits
    assert last.shape == (3, 1, model.d_vocab) and some.shape == (3, 2, model.d_vocab)
    for row, sequence in enumerate(SEQUENCES):
        expected = real(full, batch, row)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(last[row, 0], expected[len(sequence) - 1], **close)
        torch.testing.assert_close(some[row], expected[[0, len(sequence) - 2]], **close)
        torch.testing.assert_close(per_row[row, 0], expected[(8, 1, 3)[row]], **close)
    assert model.run(batch, logits=None).logits is None


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2"))
@pytest.mark.parametrize("side", SIDES)
def test_captured_positions_are_slices_of_the_full_capture(family, side):
    model, batch = loaded(family), batch_of(side=side)
    full = model.run(batch, capture="resid_*.*")
    sliced = model.run(batch, capture="resid_*.*", positions=[1, -1])
    assert sliced.positions.shape == (3, 2)
    for site in full:
        for row in range(3):
            expected = real(full[site], batch, row)[[1, -1]]
            assert torch.equal(sliced[site][row], expected)
            assert torch.equal(full[site][row, sliced.positions[row]], expected)
        # A slice keeps only itself alive, not the whole activation.
        assert sliced[site].untyped_storage().nbytes() == sliced[site].numel() * 4


def test_capture_converts_and_reads_names_of_all_kinds():
    model, batch = loaded("llama"), batch_of()
    result = model.run(batch, capture=Capture("resid_post.-1", dtype=torch.float64, device="cpu"))
    plain = model.run(batch, capture=["blocks.2.hook_resid_post", Site("resid_post", 1)])
    assert result["resid_post.2"].dtype == torch.float64
    assert torch.equal(result["resid_post.-1"].float(), plain["resid_post.2"])
    assert "resid_post.1" in plain and "resid_post.0" not in plain


@pytest.mark.parametrize("family", EVERY)
def test_the_logits_site_is_the_logits(family):
    model, batch = loaded(family), batch_of()
    result = model.run(batch, capture=["logits", "final_norm"])
    assert torch.equal(result["logits"], result.logits)
    flat = result["final_norm"].flatten(0, 1)
    expected = model.unembedding.logits(flat).view_as(result.logits)
    torch.testing.assert_close(expected, result.logits, rtol=1e-5, atol=1e-5)


def test_gradients_flow_only_when_asked():
    model, batch = loaded("llama"), batch_of(0)
    result = model.run(batch, capture="resid_mid.1", gradients=True)
    (gradient,) = torch.autograd.grad(result.logits[0, -1, 5], result["resid_mid.1"])
    assert gradient.shape == result["resid_mid.1"].shape and gradient.abs().sum() > 0
    assert not model.run(batch).logits.requires_grad


def test_checked_products_are_close_recorded_and_put_back():
    model, batch = loaded("llama"), batch_of()
    before = torch.get_float32_matmul_precision()
    result = model.run(batch, products="checked")
    torch.testing.assert_close(result.logits, model.run(batch).logits, rtol=1e-4, atol=1e-4)
    assert result.products["requested"] == "checked"
    assert torch.get_float32_matmul_precision() == before
