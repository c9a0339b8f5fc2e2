"""Node and edge scores of many families against slow references, with padding."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import AlignmentError, CapabilityError
from layerscope.interventions.attribution import (
    Contrast,
    LogitDifference,
    Node,
    atp_star,
    attribution_patching,
    edge_attribution,
    exact_effects,
    integrated_gradients,
)
from layerscope.models import Replace, Site
from support.loaded import batch_of, hf, loaded, state_of

FAMILIES = ("llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "phi", "granite", "mixtral", "qwen3")
PLAIN = ("llama", "gpt2", "gpt_neox", "phi", "granite", "mixtral", "qwen3")


def contrast_in(family: str, *, side: str = "right") -> Contrast:
    batch = batch_of(0, 2, side=side)
    ids = batch.ids.clone()
    ids[0, batch.column(0, 3)], ids[1, batch.column(1, 2)] = 77, 200
    metric = LogitDifference(torch.tensor([5, 6]), torch.tensor([8, 9]))
    other = type(batch)(ids, batch.attention_mask, batch.lengths, batch.padding_side)
    return Contrast.of(loaded(family), batch, other, metric)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ("right", "left"))
def test_exact_effects_are_those_of_one_pass_per_node(family: str, side: str) -> None:
    contrast = contrast_in(family, side=side)
    model = contrast.model
    scores = attribution_patching(contrast, ["residual", "attn_out", "mlp_out", "heads", "keys"])
    nodes = scores.nodes()[::3] + scores.nodes(positions=True)[::17]
    before = state_of(hf(model))
    effects = exact_effects(contrast, nodes, rows=6)
    assert state_of(hf(model)) == before
    for node, effect in effects.items():
        donor = contrast.values("donor", [node.site])[node.site]
        value = contrast.values("base", [node.site])[node.site].clone()
        for row in range(2):
            length = contrast.base.lengths[row]
            places = range(length) if node.position is None else [node.position]
            for place in (place for place in places if place < length):
                column = contrast.base.column(row, place)
                where = (row, column) if node.unit is None else (row, column, node.unit)
                value[where] = donor[where]
        slow = contrast.measure(contrast.base, [Replace(node.site, value)]) - contrast.ends[0]
        torch.testing.assert_close(effect, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_slopes_of_small_patches(family: str) -> None:
    contrast = contrast_in(family)
    scores = attribution_patching(contrast, ["attn_out", "mlp_out", "heads", "queries", "values"])
    small = 1e-2
    for node in scores.ranked(limit=8):
        base = contrast.values("base", [node.site])[node.site]
        moved = small * (contrast.values("donor", [node.site])[node.site] - base)
        value = base.clone()
        at = (slice(None), slice(None)) if node.unit is None else (..., node.unit, slice(None))
        value[at] = value[at] + moved[at]
        after = contrast.measure(contrast.base, [Replace(node.site, value)])
        slope = (after - contrast.ends[0]) / small
        torch.testing.assert_close(scores.of(node), slope, rtol=0.1, atol=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_frozen_weights_change_nothing(family: str) -> None:
    contrast = contrast_in(family)
    scores = attribution_patching(contrast, "heads")
    left = attribution_patching(contrast_in(family, side="left"), "heads")
    module = hf(contrast.model)
    wanted = [parameter.requires_grad for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        frozen = attribution_patching(contrast, "heads")
    finally:
        for parameter, before in zip(module.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)
    for node in scores.nodes():
        torch.testing.assert_close(left.of(node), scores.of(node), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(frozen.of(node), scores.of(node), rtol=1e-4, atol=1e-5)
    for site, values in scores.values.items():
        assert not values[1, contrast.base.lengths[1] :].any(), site


@pytest.mark.parametrize("family", PLAIN)
def test_edges_sum_to_their_writers(family: str) -> None:
    contrast = contrast_in(family)
    edges = edge_attribution(contrast)
    assert edges.remainder is not None and float(edges.remainder.abs().max()) < 1e-5
    nodes = attribution_patching(contrast, ["heads", "mlp_out"])
    for writer, score in edges.nodes().items():
        if writer.kind in ("head", "mlp"):
            kind = "attn.z" if writer.kind == "head" else "mlp_out"
            node = Node(Site(kind, writer.layer), writer.head if kind == "attn.z" else None)
            torch.testing.assert_close(score, nodes.of(node), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrals_over_inputs_sum_to_the_whole_effect(family: str) -> None:
    contrast = contrast_in(family)
    scores = integrated_gradients(contrast, "mlp_out", rule="gauss-legendre", steps=12)
    gap = scores.notes["gap"]
    assert isinstance(gap, torch.Tensor)
    assert float(gap.abs().max()) < 0.02 * float(contrast.total.abs().max())


@pytest.mark.parametrize("family", ("llama", "gemma2", "qwen3", "phi"))
def test_single_keys_with_the_softmax_computed_again(family: str) -> None:
    """Against a pass in which one key alone is the donor's, and what follows is linear."""
    contrast = contrast_in(family)
    model, site, pattern = contrast.model, Site("attn.k", 1), Site("attn.pattern", 1)
    scores = atp_star(contrast, "attn.1.k", grad_drop=False)
    base, donor = contrast.values("base", [site, pattern]), contrast.values("donor", [site])
    gradient = contrast.gradients([pattern]).gradients[pattern]
    share = model.n_heads // model.n_kv_heads
    for head in range(model.n_kv_heads):
        for position in (0, 3, 6):
            value = base[site].clone()
            value[:, position, head] = donor[site][:, position, head]
            run = model.run(
                contrast.base,
                edits=[Replace(site, value)],
                capture=pattern,
                stop_after=1,
                logits=None,
            )
            heads = slice(head * share, (head + 1) * share)
            moved = (run[pattern] - base[pattern])[:, heads] * gradient[:, heads]
            moved = moved.masked_fill(~contrast.base.attention_mask[:, None, :, None], 0.0)
            expected = moved.sum((1, 2, 3))
            found = scores.of(Node(site, head, position))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_sinks_are_refused() -> None:
    with pytest.raises(CapabilityError, match="has sinks"):
        atp_star(contrast_in("gpt_oss"), "keys")


def test_pairs_of_different_lengths_show_both_tokenisations() -> None:
    model = loaded("llama")
    metric = LogitDifference(torch.tensor([1]))
    with pytest.raises(AlignmentError, match=r"pair 0 has \d+ clean and \d+ corrupt tokens") as e:
        Contrast.of(model, ["The capital of France"], ["The capital of the France"], metric)
    assert "capital" in str(e.value)
