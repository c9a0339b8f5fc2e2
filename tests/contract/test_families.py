"""What is special about single families: their experts, second kinds of blocks, and refusals."""

from __future__ import annotations

import pytest
import torch

import layerscope
from layerscope.errors import CapabilityError, ModelError
from layerscope.models import Add, Scale, Site, ZeroAblate
from support.loaded import batch_of, hf, loaded, real, state_of
from support.tiny_configs import HYBRID
from support.tiny_models import tiny, tiny_tokenizer

# Routers whose choice is that of the largest logits, under every form in which they give it.
PLAIN_TOP_K = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "dbrx")


@pytest.mark.parametrize("family", (*PLAIN_TOP_K, "llama4", "jetmoe"))
def test_the_chosen_experts_have_the_largest_logits(family):
    model, batch = loaded(family), batch_of()
    seen = 0
    for layer in range(model.n_layers):
        if model.backend.why_not(Site("mlp.router", layer)) is not None:
            continue
        result = model.run(batch, capture=[f"mlp.{layer}.router", f"mlp.{layer}.experts"])
        logits, experts = result[f"mlp.{layer}.router"], result[f"mlp.{layer}.experts"]
        assert logits.shape == (*batch.ids.shape, 4) and experts.shape == (*batch.ids.shape, 2)
        largest = logits.topk(2, dim=-1).indices
        assert torch.equal(experts.sort(-1).values, largest.sort(-1).values)
        seen += 1
    assert seen


def test_the_experts_are_those_that_are_used():
    """The block's output, recomputed from the chosen experts and their logits alone."""
    model, batch = loaded("mixtral"), batch_of(0)
    wanted = ["mlp_in.1", "mlp.1.router", "mlp.1.experts", "mlp_out.1"]
    result = model.run(batch, capture=wanted)
    experts = hf(model).model.layers[1].mlp.experts
    logits, chosen = result["mlp.1.router"][0], result["mlp.1.experts"][0]
    weights = torch.softmax(logits.gather(-1, chosen), dim=-1)
    for column, token in enumerate(result["mlp_in.1"][0]):
        total = torch.zeros_like(token)
        for weight, expert in zip(weights[column], chosen[column], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            neurons = torch.nn.functional.silu(gate) * up
            total += weight * (experts.down_proj[expert] @ neurons)
        torch.testing.assert_close(total, result["mlp_out.1"][0, column], rtol=1e-4, atol=1e-5)


def test_routers_that_choose_later_can_be_edited_and_others_not():
    model, batch = loaded("dbrx"), batch_of(0)
    edit = Add("mlp.1.router", torch.tensor([0.0, 0.0, 50.0, 40.0]))
    result = model.run(batch, edits=[edit], capture="mlp.1.experts")
    assert (result["mlp.1.experts"] == torch.tensor([2, 3])).all()
    with pytest.raises(CapabilityError, match="chooses experts before"):
        loaded("llama4").run(batch, edits=[ZeroAblate("mlp.1.router")])


@pytest.mark.parametrize("family", HYBRID)
def test_hybrids_keep_the_contract(family):
    model = loaded(family)
    sides = ("right",) if family in ("recurrent_gemma", "llama4") else ("right", "left")
    alone = [model.run(batch_of(row)).logits[0] for row in range(3)]
    before = state_of(hf(model))
    for side in sides:
        batch = batch_of(side=side)
        result = model.run(batch, capture=model.sites())
        assert torch.equal(result.logits, model.run(batch).logits)
        assert set(result.activations) == set(model.sites())
        for row, expected in enumerate(alone):
            torch.testing.assert_close(
                real(result.logits, batch, row), expected, rtol=1e-4, atol=1e-4
            )
        for site in model.sites():
            if model.backend.why_not_edit(site) is None:
                assert torch.equal(model.run(batch, edits=[Scale(site, 1.0)]).logits, result.logits)
    assert state_of(hf(model)) == before
    assert model.check().passed


def test_blocks_without_attention_say_so():
    model = loaded("jamba")
    assert "no attention but a JambaMambaMixer" in model.backend.why_not(Site("attn.z", 0))
    assert model.backend.why_not(Site("attn.pattern", 1)) is None
    result = model.run(batch_of(0), capture=["attn.*.z", "attn_out.*"])
    assert "attn.1.z" in result and "attn.0.z" not in result and "attn_out.0" in result


def test_what_cannot_continue_or_be_padded_is_refused():
    for family in ("recurrent_gemma", "llama4"):
        with pytest.raises(CapabilityError, match=r"pad on the right"):
            loaded(family).run(batch_of(side="left"))
        loaded(family).run(batch_of(0, side="left"))
    with pytest.raises(CapabilityError, match="a pass in pieces"):
        loaded("llama4").run(batch_of(0), keep_cache=True)


@pytest.mark.parametrize(
    ("family", "site"),
    (
        ("falcon", "mlp_out.1"),
        ("ctrl", "embed"),
        ("olmo", "attn.1.q_pre"),
        ("olmo", "attn.1.k_pre"),
    ),
)
def test_what_the_model_overwrites_is_kept_as_it_was(family, site):
    model, batch = loaded(family), batch_of(0)
    plain = model.run(batch)
    captured = model.run(batch, capture=site)
    sliced = model.run(batch, capture=site, positions=list(range(9)))
    assert torch.equal(captured[site], sliced[site]) and torch.equal(captured.logits, plain.logits)
    traced = model.run(batch, capture=site, gradients=True)
    (gradient,) = torch.autograd.grad(traced.logits[0, -1, 5], traced[site])
    assert gradient.any() and torch.equal(traced.logits, plain.logits)


@pytest.mark.parametrize("family", ("opt", "granitemoeshared", "bloom", "nanochat"))
@pytest.mark.parametrize("site", ("resid_mid.1", "mlp_out.1", "final_norm"))
def test_gradients_predict_what_small_edits_do(family, site):
    model, batch = loaded(family), batch_of(0)
    result = model.run(batch, capture=site, gradients=True)
    (gradient,) = torch.autograd.grad(result.logits[0, -1, 5], result[site])
    step = 1e-2 * gradient / gradient.norm()
    up, down = (
        model.run(batch, edits=[Add(site, sign * step)]).logits[0, -1, 5] for sign in (1, -1)
    )
    assert float(up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_the_first_use_of_a_shared_norm_is_not_the_last():
    """Nanochat norms the embedding with its final norm; an edit there must act once."""
    model, batch = loaded("nanochat"), batch_of(0)
    doubled = model.run(batch, edits=[Scale("final_norm", 0.5)], capture="resid_pre.0")
    plain = model.run(batch, capture=["resid_pre.0", "final_norm"])
    assert torch.equal(doubled["resid_pre.0"], plain["resid_pre.0"])
    cap = hf(model).config.final_logit_softcapping
    inside = hf(model).lm_head(plain["final_norm"] * 0.5)
    torch.testing.assert_close(doubled.logits, torch.tanh(inside / cap) * cap)


REFUSED = (
    ("gemma3n", r"four residual streams side by side.* is off by [\d.]+ at block"),
    ("deepseek_v4", r"several residual streams.* is off by [\d.]+"),
    ("gemma4", "multiplies the whole stream by a learned number"),
    ("gemma4_moe", r"multiplies the whole stream.* is off by [\d.]+ at block"),
    ("beam", r"shrinks the stream.* is off by [\d.]+"),
    ("minimax", r"normed stream.* is off by [\d.]+"),
    ("doge", r"learned vectors.* is off by [\d.]+"),
    ("bloom_post_norm_residual", r"normed stream.* is off by [\d.]+"),
    ("opt_post_norm", "norms the stream itself"),
    ("mamba", "has no attention"),
    ("rwkv", "has no attention"),
    ("nemotron_h", "blocks of one sublayer"),
)


@pytest.mark.parametrize(("family", "reason"), REFUSED)
@pytest.mark.parametrize("verify", (True, False))
def test_refusals_say_why_and_by_how_much(family, reason, verify):
    with pytest.raises(ModelError, match=reason):
        layerscope.load(tiny(family), tokenizer=tiny_tokenizer(), verify=verify)
