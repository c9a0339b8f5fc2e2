"""Every sweep equals one full forward pass per cell, on families of every build."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import layerscope
from layerscope.errors import EditError, LayerscopeError, SiteError
from layerscope.interventions.patching import Cell, Patch, record, run_cells, site_of
from layerscope.interventions.patching.cells import Step
from layerscope.interventions.patching.tiles import Shape, evenly, loads_of, packed_tokens, shape_of
from layerscope.models import Apply, Site
from support.loaded import hf, loaded, state_of
from support.tiny_models import tiny, tiny_tokenizer

# GQA, post-norms, parallel blocks, windows, experts, learned positions, fused projections.
FAMILIES = (
    "llama",
    "gpt2",
    "gemma2",
    "gemma3",
    "olmo2",
    "gpt_neox",
    "phi",
    "mistral",
    "qwen2",
    "qwen3_moe",
    "falcon",
    "opt",
)
CLEAN = (1, 17, 40, 5, 300, 251, 8, 90, 33)
CORRUPT = (1, 17, 180, 7, 12, 44, 3, 260, 77)
KINDS = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_in",
    "attn_out",
    "mlp_in",
    "mlp_out",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.pattern",
    "attn.z",
    "mlp.post",
)


def all_logits(model):
    def read(final, rows):
        return model.unembedding.logits(final).double()

    return read


def naive_cells(runs, cells):
    """Return the last position's logits of every cell, each by the model's own full pass."""
    rows = []
    for cell in cells:
        edits = [Apply(patch.site, putting(patch)) for patch in cell.patches]
        ids = runs.batch.ids[cell.row : cell.row + 1]
        rows.append(runs.model.run(ids, edits=edits).logits[0, -1])
    return torch.stack(rows)


def putting(patch):
    def put(values, _context):
        table = values.movedim(patch.site.pos_axis, 1)
        for at, column in enumerate(patch.columns):
            where = (0, column) if patch.unit is None else (0, column, patch.unit)
            table[where] = patch.value[at]
        return values

    return put


def sites_of(model):
    found = []
    for kind in KINDS:
        for layer in range(model.n_layers):
            try:
                found.append(site_of(model, Site(kind, layer)))
            except LayerscopeError:
                continue  # parallel blocks have no resid_mid, mixtures of experts no neurons
    return found


def recorded(family, sites=()):
    model = loaded(family)
    ids = torch.tensor([CLEAN, CORRUPT])
    return model, record(model, ids, capture=[str(site) for site in sites])


def donor_cell(runs, site, columns, unit=None):
    value = runs.value(site)[0, list(columns)]
    return Cell((Patch(site, tuple(columns), value if unit is None else value[:, unit], unit),), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_cell_equals_its_own_forward_pass(family):
    sites = sites_of(loaded(family))
    model, runs = recorded(family, sites)
    before = state_of(hf(model))
    cells = [donor_cell(runs, site, (place,)) for site in sites for place in (0, 3, 7, 8)]
    for site in sites:
        if site.kind in ("attn.z", "attn.k", "attn.q", "attn.v", "mlp.post"):
            units = model.backend.trailing(site, 9)[0]
            cells += [donor_cell(runs, site, (5,), unit) for unit in (0, units - 1)]
            cells.append(donor_cell(runs, site, range(9), 1))
    # Several at once: windows of layers, of positions, and both.
    for kind in ("attn_out", "mlp_out", "resid_pre"):
        window = [site for site in sites if site.kind == kind]
        for columns in ((2,), (2, 3), (4, 8)):
            parts = [donor_cell(runs, site, columns).patches[0] for site in window]
            cells += [Cell(tuple(parts), 1), Cell(tuple(parts[1:]), 1)]
    fast = run_cells(runs, cells, all_logits(model))
    slow = naive_cells(runs, cells).double()
    scale = slow.abs().max()
    assert float((slow - slow[0]).abs().max()) > 0.1 * scale  # the cells do something
    assert float((fast - slow).abs().max()) <= 1e-5 * scale
    assert state_of(hf(model)) == before


@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2"))
def test_the_size_of_batches_does_not_change_the_numbers(family):
    sites = [Site("resid_pre", layer) for layer in range(3)]
    model, runs = recorded(family)
    cells = [donor_cell(runs, site, (place,)) for site in sites for place in range(9)]
    whole = run_cells(runs, cells, all_logits(model))
    done = []
    tight = run_cells(runs, cells, all_logits(model), budget=1, progress=done.append)
    torch.testing.assert_close(tight, whole, rtol=1e-5, atol=1e-5)
    assert sum(done) == len(cells)
    assert len(done) > 9  # many small batches


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_a_batch_on_a_cpu_holds_no_tensor_that_is_mapped_afresh(family):
    model = loaded(family)
    width = max(model.d_model, model.backend.trailing(Site("mlp.post", 0), 1)[-1])
    tokens = shape_of(model, 9, 2**50).most_tokens
    # glibc maps tensors of 32 MiB and more for one use only.
    loaded_bytes = shape_of(model, 9, 2**50).most_loaded * model.d_model * model.dtype.itemsize
    assert 0.9 * 30 * 2**20 < loaded_bytes < 32 * 2**20
    assert 0.9 * 30 * 2**20 < tokens * width * model.dtype.itemsize < 32 * 2**20
    assert shape_of(model, 9, 2**20).most_tokens < tokens
    assert shape_of(model, 2 * tokens, 2**50).most_tokens == 2 * tokens  # one cell always fits


def test_progress_is_told_block_by_block_and_adds_up():
    sites = [Site("resid_pre", layer) for layer in range(3)]
    model, runs = recorded("llama")
    cells = [donor_cell(runs, site, (place,)) for site in sites for place in range(9)]
    done = []
    run_cells(runs, cells, all_logits(model), progress=done.append)
    assert sum(done) == len(cells)
    assert len(done) >= 3 and done[-1] > done[-2] > done[-3]  # more cells climb the later blocks


def test_parts_are_few_and_even():
    widths = [9, 4, 4, 4, 2, 2, 2, 2, 1]
    parts = evenly(widths, 12)
    assert [sum(widths[part]) for part in parts] == [9, 12, 9]
    assert [sum(widths[part]) for part in evenly(widths, 17)] == [17, 13]
    assert evenly(widths, 1) == [slice(at, at + 1) for at in range(9)]
    assert evenly([], 5) == []
    assert evenly(widths, 100) == [slice(0, 9)]


def test_a_block_is_run_in_as_few_passes_as_hold_all_cells():
    shape = Shape(
        n_layers=3, n_columns=4, overhead=0.0, most_tokens=7, most_loaded=100, most_held=100
    )
    steps = [
        Step(at, 0, (), entry=entry, first=entry, column=column, last=column)
        for at, (entry, column) in enumerate((e, c) for e in range(3) for c in range(4))
    ]
    ((load,),) = loads_of(steps, shape)
    assert sorted(step.index for step in load) == list(range(12))
    passes = packed_tokens(load, shape)
    assert all(tokens <= 7 for _, tokens in passes)
    assert sum(blocks * tokens for blocks, tokens in passes) == 10 + 20 + 30
    assert len(passes) == 2 + 4 + 6  # rows of 4, 3, 2, 1 tokens are not cut
    several = loads_of(steps, replace(shape, most_loaded=10, most_held=15))
    assert [[sum(4 - step.column for step in one) for one in some] for some in several] == [
        [8, 7],
        [8, 7],
    ]


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_cells_of_both_rows_in_any_order_keep_their_numbers(family):
    # Later rows and earlier positions join after others, some with a first block run for itself.
    sites = [Site(kind, layer) for layer in (2, 0, 1) for kind in ("attn_out", "resid_pre")]
    model, runs = recorded(family, sites)
    cells = []
    for place in (7, 2, 8, 0, 5):
        for site in sites:
            for row in (1, 0):
                value = runs.value(site)[1 - row, place : place + 1]
                cells.append(Cell((Patch(site, (place,), value),), row))
    fast = run_cells(runs, cells, all_logits(model))
    slow = naive_cells(runs, cells).double()
    assert float((fast - slow).abs().max()) <= 1e-5 * float(slow.abs().max())


def test_cells_that_cannot_reach_the_end_are_the_recording_itself():
    model, runs = recorded("llama", [Site("mlp_out", 2), Site("attn_out", 2)])
    cells = [donor_cell(runs, Site(kind, 2), (4,)) for kind in ("mlp_out", "attn_out")]
    plain = all_logits(model)(runs.final, range(2))
    fast = run_cells(runs, cells, all_logits(model))
    assert torch.equal(fast[0], plain[1])
    assert torch.equal(fast[1], plain[1])
    slow = naive_cells(runs, cells).double()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ("kimi_linear", "deepseek_v32"))
def test_a_model_that_cannot_be_resumed_at_a_position_still_gives_exact_cells(family):
    model = layerscope.load(tiny(family), tokenizer=tiny_tokenizer())
    runs = record(model, torch.tensor([CLEAN, CORRUPT]), capture="mlp_out.1")
    assert runs.cache is None
    assert "run the whole sequence instead" in runs.no_cache
    sites = [*(Site("resid_pre", layer) for layer in range(model.n_layers)), Site("mlp_out", 1)]
    cells = [donor_cell(runs, site, (place,)) for site in sites for place in (0, 5, 8)]
    fast = run_cells(runs, cells, all_logits(model))
    slow = naive_cells(runs, cells).double()
    assert float((fast - slow).abs().max()) <= 1e-5 * float(slow.abs().max())


def test_cells_that_do_not_fit_are_refused():
    model, runs = recorded("llama")
    width = model.d_model

    def refused(error, match, *, site="resid_pre.1", columns=(2,), value=None, row=0, unit=None):
        value = torch.zeros(len(columns), width) if value is None else value
        cell = Cell((Patch(Site.parse(site), columns, value, unit),), row)
        with pytest.raises(error, match=match):
            run_cells(runs, [cell], all_logits(model))

    refused(EditError, "names position 9; the prompt has 9 tokens", columns=(9,))
    refused(EditError, "ascending", columns=(3, 2))
    refused(EditError, "names row 2", row=2)
    refused(EditError, r"shape \[1, 3\]; it needs \[1, 32\]", value=torch.zeros(1, 3))
    refused(SiteError, "has no units", unit=0)
    refused(SiteError, "has units 0 to 3, not 4", site="attn.1.z", unit=4)
    with pytest.raises(SiteError, match=r"is one head; patch 'attn\.1\.z'"):
        site_of(model, "attn.1.head.0.z")
    with pytest.raises(SiteError, match="cannot be patched in a sweep"):
        site_of(model, "final_norm")
    with pytest.raises(EditError, match="a cell has no patch"):
        run_cells(runs, [Cell(())], all_logits(model))
