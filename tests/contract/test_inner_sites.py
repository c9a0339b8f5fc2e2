"""Sites inside attention and MLP, against the model's own eager attention and plain hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import layerscope
from layerscope.models import (
    Add,
    Apply,
    MeanAblate,
    Replace,
    ResampleAblate,
    Scale,
    Site,
    ZeroAblate,
)
from support.loaded import EVERY, batch_of, hf, loaded, real, state_of
from support.tiny_models import tiny, tiny_tokenizer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def has(model, site):
    return model.backend.why_not(Site.parse(site)) is None


def eager_patterns(model, batch):
    """Return the attention probabilities that transformers' own eager attention reports."""
    module = hf(model)
    kind = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return module(
                input_ids=batch.ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=batch.position_ids(),
                output_attentions=True,
                use_cache=False,
            ).attentions
    finally:
        module.set_attn_implementation(kind)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("side", ("right", "left"))
def test_patterns_are_those_of_eager_attention(family, side):
    model, batch = loaded(family), batch_of(side=side)
    if not has(model, "attn.0.pattern"):
        pytest.skip(model.backend.why_not(Site.parse("attn.0.pattern")))
    scores = ["attn.*.scores"] if has(model, "attn.0.scores") else []
    result = model.run(batch, capture=["attn.*.pattern", "attn.*.head.1.pattern", *scores])
    for layer, expected in enumerate(eager_patterns(model, batch)):
        pattern = result[f"attn.{layer}.pattern"]
        softmax = torch.softmax(result[f"attn.{layer}.scores"], dim=-1) if scores else pattern
        for row in range(len(batch)):
            mine = real(pattern.transpose(1, 2), batch, row)
            torch.testing.assert_close(
                mine, real(expected.transpose(1, 2), batch, row), rtol=0, atol=1e-5
            )
            assert not mine[..., ~batch.attention_mask[row]].any()
            if "gpt_oss" not in family:  # a sink takes a share of its own
                torch.testing.assert_close(mine.sum(-1), torch.ones(mine.shape[:-1]))
                torch.testing.assert_close(real(softmax.transpose(1, 2), batch, row), mine)
        assert torch.equal(result[f"attn.{layer}.head.1.pattern"], pattern[:, 1])


@pytest.mark.parametrize("family", EVERY)
def test_heads_sum_to_the_attention_output(family):
    model, batch = loaded(family), batch_of(0)
    for layer in range(model.n_layers):
        if not has(model, f"attn.{layer}.out"):
            continue
        result = model.run(batch, capture=[f"attn.{layer}.head.*.out", f"attn.{layer}.out"])
        heads = sum(result[f"attn.{layer}.head.{head}.out"] for head in range(model.n_heads))
        projection = model.backend.structure.blocks[layer].inner.out.module
        bias = projection.bias if projection.bias is not None else torch.zeros(())
        torch.testing.assert_close(heads + bias, result[f"attn.{layer}.out"], rtol=1e-5, atol=1e-5)
    block = model.backend.structure.blocks[0]
    if has(model, "attn.0.out") and block.attention_out.name in block.inner.out.name:
        result = model.run(batch, capture=["attn.*.out", "attn_out.*"])
        for layer in range(model.n_layers):
            scaled = result[f"attn.{layer}.out"] * model.backend.structure.branch_scale
            torch.testing.assert_close(scaled, result[f"attn_out.{layer}"])


@pytest.mark.parametrize("family", EVERY)
def test_an_inner_edit_that_changes_nothing_is_bit_exact(family):
    model, batch = loaded(family), batch_of(side="left")
    before, plain = state_of(hf(model)), model.run(batch).logits
    sites = [site for site in model.sites() if site.layer == 1 and "." in site.kind]
    heads = [
        Site.parse(f"attn.1.head.2.{leaf}")
        for leaf in ("q", "k", "v", "scores", "pattern", "z", "out")
    ] + [Site.parse("attn.1.kv_head.1.k")]
    for site in [*sites, *(site for site in heads if model.backend.why_not(site) is None)]:
        if model.backend.why_not_edit(site) is not None:
            continue
        for edit in (Scale(site, 1.0), Apply(site, lambda x, _: x, rows=1, positions=[0, -1])):
            assert torch.equal(model.run(batch, edits=[edit]).logits, plain), (site, edit)
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", EVERY)
def test_editing_a_head_is_editing_its_part_of_the_whole(family):
    model, batch = loaded(family), batch_of(side="left")
    for leaf in ("q", "v", "scores", "pattern", "z"):
        whole = Site.parse(f"attn.1.{leaf}")
        grouped = leaf == "v" and model.n_kv_heads < model.n_heads
        part = Site.parse(f"attn.1.{'kv_head' if grouped else 'head'}.1.{leaf}")
        if model.backend.why_not(whole) or model.backend.why_not(part):
            continue
        head_axis = 1 if whole.pos_axis == 2 else 2

        def change(x, _, axis=head_axis):
            x.select(axis, 1).mul_(0.3)
            return x

        one = model.run(batch, edits=[Scale(part, 0.3)], capture=[whole, part])
        all_ = model.run(batch, edits=[Apply(whole, change)], capture=whole)
        torch.testing.assert_close(one.logits, all_.logits, **CLOSE)
        plain = model.run(batch, capture=part)
        torch.testing.assert_close(one[part], plain[part] * 0.3)
        assert torch.equal(one[whole].select(head_axis, 1), one[part])
        assert not torch.allclose(one.logits, plain.logits, atol=1e-5), leaf


@pytest.mark.parametrize("family", EVERY)
def test_pattern_edits_mix_the_values(family):
    """A pattern that looks at the first token alone gives z = the first token's values."""
    model, batch = loaded(family), batch_of(0)
    if not has(model, "attn.1.pattern"):
        pytest.skip("no patterns here")
    width = batch.width
    first = torch.zeros(width)
    first[0] = 1.0
    result = model.run(
        batch,
        edits=[Replace("attn.1.head.2.pattern", first, positions=[4, -1])],
        capture=["attn.1.z", "attn.1.v", "attn.1.pattern"],
    )
    plain = model.run(batch, capture=["attn.1.z", "attn.1.v", "attn.1.pattern"])
    values = plain["attn.1.v"].transpose(1, 2)
    values = values.repeat_interleave(model.n_heads // values.shape[1], dim=1)
    mixed = (plain["attn.1.pattern"] @ values).transpose(1, 2)
    if not torch.allclose(mixed, plain["attn.1.z"], atol=1e-5):
        pytest.skip("a gate or a norm lies between the heads and their projection")
    group = 2 * result["attn.1.v"].shape[2] // model.n_heads
    value = plain["attn.1.v"][0, 0, group]
    torch.testing.assert_close(result["attn.1.z"][0, 4, 2], value, **CLOSE)
    torch.testing.assert_close(result["attn.1.z"][0, -1, 2], value, **CLOSE)
    untouched = torch.ones(width, dtype=torch.bool)
    untouched[[4, width - 1]] = False
    assert torch.equal(result["attn.1.z"][0, untouched], plain["attn.1.z"][0, untouched])
    others = [head for head in range(model.n_heads) if head != 2]
    assert torch.equal(result["attn.1.z"][:, :, others], plain["attn.1.z"][:, :, others])


@pytest.mark.parametrize("family", EVERY)
def test_the_output_of_a_head_is_its_share(family):
    model, batch = loaded(family), batch_of(0)
    if not has(model, "attn.1.out"):
        pytest.skip("no output projection")
    delta = torch.randn(model.d_model, generator=torch.Generator().manual_seed(3))
    by_head = model.run(batch, edits=[Add("attn.1.head.3.out", delta)], capture="attn.1.out")
    whole = model.run(batch, edits=[Add("attn.1.out", delta)], capture="attn.1.out")
    torch.testing.assert_close(by_head.logits, whole.logits, **CLOSE)
    off = model.run(batch, edits=[ZeroAblate("attn.1.head.3.out")])
    without_z = model.run(batch, edits=[ZeroAblate("attn.1.head.3.z")])
    torch.testing.assert_close(off.logits, without_z.logits, **CLOSE)


HAND = {
    "llama": {
        "attn.1.z": ("model.layers.1.self_attn.o_proj", "input"),
        "attn.1.q_pre": ("model.layers.1.self_attn.q_proj", "output"),
        "mlp.1.pre": ("model.layers.1.mlp.gate_proj", "output"),
        "mlp.1.up": ("model.layers.1.mlp.up_proj", "output"),
        "mlp.1.post": ("model.layers.1.mlp.down_proj", "input"),
    },
    "gpt2": {
        "attn.1.z": ("transformer.h.1.attn.c_proj", "input"),
        "mlp.1.pre": ("transformer.h.1.mlp.c_fc", "output"),
        "mlp.1.post": ("transformer.h.1.mlp.c_proj", "input"),
    },
    "gemma2": {"mlp.1.post": ("model.layers.1.mlp.down_proj", "input")},
    "gpt_neox": {"attn.1.z": ("gpt_neox.layers.1.attention.dense", "input")},
}
PLACES = [(family, site) for family, sites in HAND.items() for site in sites]


@pytest.mark.parametrize(("family", "site"), PLACES)
def test_inner_edits_are_what_a_plain_hook_does(family, site):
    model, batch = loaded(family), batch_of(0)
    name, side = HAND[family][site]
    module: nn.Module = hf(model).get_submodule(name)
    seen = []

    def on_input(_, args):
        seen.append(args[0])
        return (args[0] * -0.5,)

    def on_output(_, args, output):
        seen.append(output)
        return output * -0.5

    handle = (
        module.register_forward_pre_hook(on_input)
        if side == "input"
        else module.register_forward_hook(on_output)
    )
    try:
        with torch.no_grad():
            expected = hf(model)(input_ids=batch.ids, use_cache=False).logits
    finally:
        handle.remove()
    plain = model.run(batch, capture=site)[site]
    assert torch.equal(plain.reshape(seen[0].shape), seen[0])
    torch.testing.assert_close(model.run(batch, edits=[Scale(site, -0.5)]).logits, expected)


def test_the_halves_of_a_fused_projection_are_named_apart():
    model, batch = loaded("phi3"), batch_of(0)
    result = model.run(batch, capture=["mlp.1.*", "mlp_in.1"])
    mlp = hf(model).model.layers[1].mlp
    gate, up = mlp.gate_up_proj(result["mlp_in.1"]).chunk(2, dim=-1)
    assert torch.equal(result["mlp.1.pre"], gate) and torch.equal(result["mlp.1.up"], up)
    torch.testing.assert_close(result["mlp.1.post"], mlp.activation_fn(gate) * up)
    edited = model.run(batch, edits=[ZeroAblate("mlp.1.up")], capture=["mlp.1.pre", "mlp_out.1"])
    assert torch.equal(edited["mlp.1.pre"], gate)
    assert not edited["mlp_out.1"].any()


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2"))
def test_means_and_resampling_work_inside_attention(family):
    model, batch = loaded(family), batch_of(0, 0)
    rows = torch.tensor([[*batch.ids[0]], [*batch.ids[0].flip(0)]])
    plain = model.run(rows, capture=["attn.1.z", "attn.1.pattern"])
    mean = model.run(rows, edits=[MeanAblate("attn.1.z")], capture="attn.1.z")["attn.1.z"]
    torch.testing.assert_close(mean, plain["attn.1.z"].mean((0, 1)).expand_as(mean))
    average = model.run(rows, edits=[MeanAblate("attn.1.pattern")], capture="attn.1.pattern")
    expected = plain["attn.1.pattern"].mean((0, 2))[None, :, None].expand(2, -1, rows.shape[1], -1)
    torch.testing.assert_close(average["attn.1.pattern"], expected)
    swapped = model.run(
        rows, edits=[ResampleAblate("attn.1.pattern", from_rows=(1, 0))], capture="attn.1.pattern"
    )
    assert torch.equal(swapped["attn.1.pattern"], plain["attn.1.pattern"].flip(0))


def test_edits_of_parts_and_wholes_keep_their_order():
    model, batch = loaded("llama"), batch_of(0)
    plain = model.run(batch, capture="attn.1.z")["attn.1.z"]
    edits = [
        Add("attn.1.z", torch.ones(8)),
        Scale("attn.1.head.2.z", 2.0),
        Add("attn.1.z", torch.ones(8), positions=0),
    ]
    result = model.run(batch, edits=edits, capture=["attn.1.z", "attn.1.head.2.z"])
    expected = plain + 1
    expected[:, :, 2] *= 2
    expected[:, 0] += 1
    torch.testing.assert_close(result["attn.1.z"], expected)
    assert torch.equal(result["attn.1.head.2.z"], result["attn.1.z"][:, :, 2])


INNER = ("attn.1.q", "attn.1.v", "attn.1.scores", "attn.1.pattern", "attn.1.z", "mlp.1.post")


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
@pytest.mark.parametrize("site", (*INNER, "attn.1.head.2.pattern", "attn.1.head.2.out"))
def test_gradients_reach_what_was_captured(family, site):
    """The gradient predicts what a small edit does, and capturing changes no logits."""
    model, batch = loaded(family), batch_of(side="left")
    result = model.run(batch, capture=site, gradients=True)
    assert torch.equal(result.logits, model.run(batch).logits)
    (gradient,) = torch.autograd.grad(real(result.logits, batch, 1)[-1, 5], result[site])
    assert gradient.isfinite().all() and gradient.any()
    finite = result[site].isfinite()
    step = 1e-2 * torch.where(finite, gradient, 0.0) / gradient.norm()
    logits = [
        real(model.run(batch, edits=[Add(site, sign * step)]).logits, batch, 1)[-1, 5]
        for sign in (1, -1)
    ]
    assert float(logits[0] - logits[1]) / 2e-2 == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_an_eager_model_gives_the_same_patterns():
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    model = layerscope.load(eager, tokenizer=tiny_tokenizer())
    batch = batch_of(side="left")
    ours = loaded("llama").run(batch, capture="attn.*.pattern")
    theirs = model.run(batch, capture="attn.*.pattern")
    for row in range(len(batch)):
        for layer in range(model.n_layers):
            name = f"attn.{layer}.pattern"
            torch.testing.assert_close(
                real(ours[name].transpose(1, 2), batch, row),
                real(theirs[name].transpose(1, 2), batch, row),
                rtol=0,
                atol=1e-6,
            )


def test_a_pattern_that_is_no_distribution_warns(recwarn):
    model, batch = loaded("llama"), batch_of(0)
    model.run(batch, edits=[Scale("attn.1.scores", 0.5)])
    model.run(batch, edits=[Replace("attn.1.head.0.pattern", torch.eye(9))])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="4 rows that are no distribution"):
        model.run(batch, edits=[Scale("attn.1.head.0.pattern", 0.5, positions=[0, 1, 2, 3])])
