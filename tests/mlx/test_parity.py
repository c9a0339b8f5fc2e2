"""One set of weights in Hugging Face and in MLX: the same numbers at every site."""

from __future__ import annotations

import pytest
import torch

from layerscope.models import Add, Apply, Replace, Start, TokenBatch, ZeroAblate
from support.loaded import SEQUENCES, batch_of
from support.mlx_models import FAMILIES, FOUR, in_hugging_face, in_mlx, mlx, native

SIDES = ("right", "left")
FUSED = ("gpt2", "gpt_neox", "gpt_neox_sequential", "phi3")  # one projection gives all three
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def both(family):
    return in_hugging_face(family), in_mlx(family)


def same(actual, expected, batch, site=None, *, bound=1e-4):
    """Compare at the real tokens, relative to the largest value."""
    axis = 1 if site is None else site.pos_axis
    a, b = (x.movedim(axis, 1)[batch.attention_mask] for x in (actual, expected))
    assert a.shape == b.shape, site
    hidden = b.isneginf()
    assert torch.equal(a.isneginf(), hidden), site
    a, b = a.masked_fill(hidden, 0.0), b.masked_fill(hidden, 0.0)
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
    assert error < bound, (site, error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", SIDES)
def test_every_site_holds_what_hugging_face_has_there(family, side):
    hf, model = both(family)
    batch = batch_of(side=side)
    bound = 2e-3 if family == "gemma" else 1e-4  # mlx-lm has another GELU there, and load says so
    sites = model.sites()
    missing = {site.kind for site in hf.sites()} - {site.kind for site in sites}
    fused = {"attn.q_pre", "attn.k_pre"} if "attn.q_pre" in missing else set()
    assert missing <= {"mlp.experts", *fused} and (not fused or family in FUSED)
    expected = hf.run(batch, capture=sites)
    found = model.run(batch, capture=sites)
    same(found.logits, expected.logits, batch, bound=bound)
    for site in sites:
        shape = [len(batch), *model.backend.trailing(site, batch.width)]
        shape.insert(site.pos_axis, batch.width)
        assert found[site].shape == tuple(shape)
        same(found[site], expected[site], batch, site, bound=bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_at_any_site_does_what_it_does_in_hugging_face(family):
    hf, model = both(family)
    batch = batch_of(side="left")
    bound = 2e-3 if family == "gemma" else 1e-4
    plain = model.run(batch).logits
    for site in model.sites():
        if site.layer not in (None, 1) or site.kind in ("attn.scores", "mlp.router"):
            continue
        if model.backend.why_not_edit(site) or hf.backend.why_not_edit(site):
            continue
        edit = Apply(site, lambda x, _: 0.7 * x + 0.02 * x.roll(1, -1), rows=[0, 2], positions=3)
        expected = hf.run(batch, edits=[edit]).logits
        found = model.run(batch, edits=[edit]).logits
        same(found, expected, batch, bound=bound)
        assert torch.equal(found[1], plain[1]), site
        assert not torch.allclose(found[0], plain[0]), site


@pytest.mark.parametrize("family", FOUR)
def test_scores_and_heads_can_be_edited_too(family):
    hf, model = both(family)
    batch = batch_of(side="left")
    group = "kv_head.1" if family != "gpt2" else "head.1"
    for name in ("attn.1.scores", "attn.1.head.2.z", "attn.1.head.3.pattern", "attn.1.head.1.q"):
        edit = Apply(name, lambda x, _: x * 0.5, rows=[0, 2])
        same(model.run(batch, edits=[edit]).logits, hf.run(batch, edits=[edit]).logits, batch)
    for name in (f"attn.1.{group}.k", f"attn.1.{group}.v", "attn.1.head.2.out"):
        edit = ZeroAblate(name, positions=[1, 2])
        same(model.run(batch, edits=[edit]).logits, hf.run(batch, edits=[edit]).logits, batch)
        found, expected = (m.run(batch, capture=name)[name] for m in (model, hf))
        same(found, expected, batch)


def test_the_router_of_experts_can_be_edited():
    model, batch = in_mlx("mixtral"), batch_of(0)
    plain = model.run(batch, capture="mlp.1.router")
    forced = Apply("mlp.1.router", lambda x, _: x + torch.tensor([50.0, 0, 0, 0]))
    edited = model.run(batch, edits=[forced], capture="mlp.1.router")
    assert torch.equal(edited["mlp.1.router"].argmax(-1), torch.zeros(1, 9, dtype=torch.long))
    assert not torch.allclose(edited.logits, plain.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_edits_the_logits_are_those_of_mlx_itself(family):
    core, model = mlx(), in_mlx(family)
    batch = batch_of(0)
    if family in ("mistral", "mixtral", "gemma2"):
        batch = TokenBatch.from_ids([SEQUENCES[0][:4]])  # mlx-lm leaves their windows out
    own = torch.tensor(native(model)(core.array(batch.ids.numpy())).tolist())
    assert torch.equal(model.run(batch).logits, own)
    assert torch.equal(model.run(batch, capture=model.sites()).logits, own)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_that_changes_nothing_is_bit_exact(family):
    model, batch = in_mlx(family), batch_of(side="left")
    plain = model.run(batch).logits
    for site in model.sites():
        if model.backend.why_not_edit(site) is None:
            edited = model.run(batch, edits=[Apply(site, lambda x, _: x)])
            assert torch.equal(edited.logits, plain), site


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batching_do_not_change_the_numbers(family):
    model = in_mlx(family)
    single = [model.run(batch_of(row), capture="attn.1.pattern") for row in range(len(SEQUENCES))]
    for side in SIDES:
        batch = batch_of(side=side)
        result = model.run(batch, capture="attn.1.pattern")
        for row, alone in enumerate(single):
            real = batch.attention_mask[row]
            torch.testing.assert_close(result.logits[row][real], alone.logits[0], **CLOSE)
            pattern = result["attn.1.pattern"][row][:, real][:, :, real]
            torch.testing.assert_close(pattern, alone["attn.1.pattern"][0], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_can_start_in_the_middle_and_stop_early(family):
    model, batch = in_mlx(family), batch_of(side="left")
    full = model.run(batch, capture=["resid_pre.*", "resid_post.*"])
    resumed = model.run(batch, start=Start(1, full["resid_pre.1"]), capture="resid_post.1")
    torch.testing.assert_close(resumed.logits, full.logits, **CLOSE)
    other = Start(1, full["resid_pre.1"] * 0.5)
    assert not torch.allclose(model.run(batch, start=other).logits, full.logits)
    stopped = model.run(batch, stop_after=1, capture="resid_post.1")
    assert stopped.logits is None
    assert torch.equal(stopped["resid_post.1"], full["resid_post.1"])
    last = model.run(batch, logits="last").logits
    columns = [batch.column(row, -1) for row in range(3)]
    torch.testing.assert_close(last[:, 0], full.logits[range(3), columns], **CLOSE)


def test_edits_and_captures_keep_their_order():
    model, batch = in_mlx("llama"), batch_of(0)
    ones = torch.ones(32)
    edits = [Replace("resid_post.1", ones), Add("resid_post.1", ones), Add("resid_mid.1", ones)]
    result = model.run(batch, edits=edits, capture=["resid_post.1", "resid_pre.2"])
    assert torch.equal(result["resid_post.1"], 2 * ones.expand(1, 9, 32))
    assert torch.equal(result["resid_pre.2"], result["resid_post.1"])


def test_an_edit_between_the_sublayers_reaches_the_skip_connection():
    model, batch = in_mlx("llama"), batch_of(0)
    plain = model.run(batch, capture=["resid_mid.1", "resid_post.1", "mlp_out.1"])
    result = model.run(
        batch,
        edits=[Add("resid_mid.1", torch.ones(32))],
        capture=["resid_mid.1", "resid_post.1", "mlp_out.1", "resid_pre.1"],
    )
    torch.testing.assert_close(result["resid_mid.1"], plain["resid_mid.1"] + 1)
    torch.testing.assert_close(
        result["resid_post.1"], result["resid_mid.1"] + result["mlp_out.1"], **CLOSE
    )
