"""Ablations and back-patching, and the truth tables of cancelling, redundant and backup parts."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError, EditError, PromptError
from layerscope.interventions.patching import Cell, record, run_cells
from layerscope.interventions.patching.ablations import (
    ablation_cell,
    back_patches,
    reference_of,
)
from layerscope.models import MeanAblate, Replace, Site, ZeroAblate
from support.loaded import loaded
from support.toys import bare_gpt2

IDS = ((1, 17, 40, 5, 300), (1, 99, 180, 7, 12), (1, 44, 3, 260, 77))


def read_of(model):
    return lambda final, rows: final.double() @ model.unembedding.weight.detach().double().T


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2", "gpt_neox"))
@pytest.mark.parametrize("kind", ("attn.z", "mlp_out", "attn_out"))
def test_ablations_are_what_edits_of_the_whole_run_give(family, kind):
    model = loaded(family)
    site = Site(kind, 1)
    reference = reference_of(model, IDS, [site])
    runs = record(model, torch.tensor(IDS[:1]), capture=[str(site)])
    unit = 1 if kind == "attn.z" else None
    name = str(site) if unit is None else "attn.1.head.1.z"
    batch = model.run([list(row) for row in IDS], capture=site)
    at = (slice(None), slice(None)) if unit is None else (slice(None), slice(None), unit)
    values = batch[site][at]
    edits = {
        "zero": ZeroAblate(name),
        "mean": MeanAblate(name, mean=values.flatten(0, 1).mean(0)),
        "position_mean": Replace(name, value=values.mean(0)),
        "resample": Replace(name, value=values[2]),
    }
    for how, edit in edits.items():
        cell = ablation_cell(runs, site, how, unit=unit, reference=reference, other=2)
        fast = run_cells(runs, [cell], read_of(model))[0]
        final = model.run([list(IDS[0])], edits=[edit], capture="final_norm")["final_norm"]
        slow = read_of(model)(final[:, -1], [0])[0]
        scale = float(slow.abs().max())
        assert float((fast - slow).abs().max()) <= 1e-5 * scale, how
        assert float((fast - read_of(model)(runs.final, [0])[0]).abs().max()) > 1e-3 * scale


def test_noise_is_seeded_and_in_units_of_the_spread():
    model = loaded("llama")
    site = Site("mlp_out", 0)
    reference = reference_of(model, IDS, [site])
    runs = record(model, torch.tensor(IDS[:1]), capture=[str(site)])

    def value(**options):
        cell = ablation_cell(runs, site, "noise", reference=reference, **options)
        return cell.patches[0].value

    own = runs.value(site)[0]
    assert torch.equal(value(seed=1), value(seed=1))
    assert not torch.equal(value(seed=1), value(seed=2))
    torch.testing.assert_close(value(factor=0.0), own)
    drawn = torch.stack([value(seed=seed) - own for seed in range(400)])
    spread = drawn.std(dim=0) / reference.std[site]
    assert float((spread - 1).abs().mean()) < 0.1


def test_ablations_that_lack_something_are_refused():
    model = loaded("llama")
    site = Site("mlp_out", 0)
    runs = record(model, torch.tensor(IDS[:1]), capture=[str(site)])
    with pytest.raises(ConfigError, match="needs a reference"):
        ablation_cell(runs, site, "mean")
    with pytest.raises(ConfigError, match="use zero, mean"):
        ablation_cell(runs, site, "median")
    uneven = reference_of(model, [IDS[0], IDS[1][:3]], [site])
    with pytest.raises(EditError, match="needs prompts of 5 tokens"):
        ablation_cell(runs, site, "resample", reference=uneven)
    with pytest.raises(EditError, match=r"does not hold 'mlp_out\.1'"):
        ablation_cell(runs, Site("mlp_out", 1), "mean", reference=uneven)
    with pytest.raises(PromptError, match="at least one"):
        reference_of(model, [], [site])


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2"))
def test_back_patching_equals_the_edited_run(family):
    model = loaded(family)
    runs = record(model, torch.tensor(IDS[:1]))
    triples, cells = back_patches(runs, columns=(2, 4))
    assert triples[:2] == [(1, 0, 2), (1, 0, 4)]
    assert len(triples) == model.n_layers * (model.n_layers - 1)
    fast = run_cells(runs, cells, read_of(model))
    full = model.run([list(IDS[0])], capture="resid_pre.*")
    for at, (source, target, column) in enumerate(triples):
        value = full[f"resid_pre.{source}"][0, column]
        edit = Replace(f"resid_pre.{target}", value=value, positions=column)
        final = model.run([list(IDS[0])], edits=[edit], capture="final_norm")["final_norm"]
        slow = read_of(model)(final[:, -1], [0])[0]
        assert float((fast[at] - slow).abs().max()) <= 1e-5 * float(slow.abs().max())
    with pytest.raises(ConfigError, match="a source layer above its target"):
        back_patches(runs, columns=(1,), sources=(0,))


# T10: what single ablations cannot see. Every part writes from the one token to the output slot.
FEATURE, SLOT, OUT, OTHER = range(4)


def gate(*, neurons, heads=(), layers=1):
    """Return a toy whose MLPs hold the given (layer, inputs, bias, outputs) neurons."""
    toy = bare_gpt2(n_layers=layers, n_heads=2, d_model=8, d_mlp=4, d_vocab=2, n_ctx=4)
    with torch.no_grad():
        toy.embed[1, FEATURE] = 1.0
        toy.unembed[1, OUT] = 1.0
        for layer, head, source, target, weight in heads:
            toy.w_v(layer, head)[source, 0] = 1.0
            toy.w_o(layer, head)[0, target] = weight
        used = {}
        for layer, inputs, bias, outputs in neurons:
            at = used.setdefault(layer, 0)
            used[layer] += 1
            for source, weight in inputs.items():
                toy.w_in(layer)[source, at] = weight
            toy.b_in(layer)[at] = bias
            for target, weight in outputs.items():
                toy.w_out(layer)[at, target] = weight
    return toy.model()


def ablated(model, *parts):
    """Return the output with heads zeroed together: parts are (layer, head)."""
    runs = record(model, torch.tensor([[1]]), capture=["attn.*.z"])
    if not parts:
        return float(runs.final[0, OUT])
    patches = []
    for layer, head in parts:
        patches += ablation_cell(runs, Site("attn.z", layer), "zero", unit=head).patches
    cell = Cell(tuple(patches))
    return float(run_cells(runs, [cell], lambda final, rows: final)[0, OUT])


def test_cancelling_parts_have_effects_that_only_their_sum_hides():
    model = gate(neurons=(), heads=((0, 0, FEATURE, OUT, 1.0), (0, 1, FEATURE, OUT, -1.0)))
    assert ablated(model) == 0.0
    assert ablated(model, (0, 0)) == -1.0
    assert ablated(model, (0, 1)) == 1.0
    assert ablated(model, (0, 0), (0, 1)) == 0.0


def test_either_part_of_an_or_gate_suffices():
    model = gate(
        heads=((0, 0, FEATURE, SLOT, 1.0), (0, 1, FEATURE, SLOT, 1.0)),
        # min(slot, 1): one minus what is missing.
        neurons=((0, {SLOT: 1.0}, 0.0, {OUT: 1.0}), (0, {SLOT: 1.0}, -1.0, {OUT: -1.0})),
    )
    assert ablated(model) == 1.0
    assert ablated(model, (0, 0)) == 1.0  # no single part has an effect
    assert ablated(model, (0, 1)) == 1.0
    assert ablated(model, (0, 0), (0, 1)) == 0.0  # both together have all of it


def test_a_backup_head_hides_the_head_it_stands_in_for():
    model = gate(
        layers=2,
        heads=((0, 0, FEATURE, SLOT, 1.0), (1, 1, OTHER, OUT, 1.0)),
        neurons=(
            (0, {SLOT: 1.0}, 0.0, {OUT: 1.0}),
            # OTHER = feature without slot: what the backup head of the next layer copies.
            (0, {FEATURE: 1.0, SLOT: -1.0}, 0.0, {OTHER: 1.0}),
        ),
    )
    assert ablated(model) == 1.0
    assert ablated(model, (0, 0)) == 1.0  # the backup fires
    assert ablated(model, (1, 1)) == 1.0  # which does nothing as long as the first works
    assert ablated(model, (0, 0), (1, 1)) == 0.0


def test_a_saturated_probability_hides_what_the_logits_show():
    from layerscope.interventions.patching import Reader, Targets, metric_of

    model = gate(neurons=(), heads=((0, 0, FEATURE, OUT, 60.0), (0, 1, FEATURE, OUT, 60.0)))
    runs = record(model, torch.tensor([[1]]), capture=["attn.*.z"])
    metrics = tuple(metric_of(name) for name in ("prob", "logit_diff"))
    reader = Reader(model, metrics, (Targets((1,), (0,)),))
    cell = ablation_cell(runs, Site("attn.z", 0), "zero", unit=0)
    plain = reader(runs.final, [0])[0]
    off = run_cells(runs, [cell], reader)[0]
    assert float(plain[0]) == float(off[0]) == 1.0
    assert float(plain[1]) == 120.0 and float(off[1]) == 60.0
