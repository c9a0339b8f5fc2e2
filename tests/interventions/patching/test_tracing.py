"""Causal tracing: a planted fact whose grid is known, and grids of random models, cell by cell."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError, PromptError
from layerscope.interventions.patching import custom_metric, naive_cells
from layerscope.interventions.patching.tracing import (
    Subject,
    embedding_noise,
    record_noisy,
    restoring,
    trace,
    trace_cells,
)
from support.loaded import loaded
from support.toys import bare_gpt2

N_LAYERS, WRITES, MOVES = 6, 2, 4
IDS, SUBJECT = (0, 1, 2, 3, 4), (1, 2)
LAST = len(IDS) - 1
# Residual slots.
FIRST, SECOND, COPIED, FACT, MOVED, OUT, AT_FIRST, AT_SECOND, AT_LAST = range(9)


def planted_fact(dtype=torch.float64):
    """Block 2 joins both subject tokens at the second and writes the fact; head 4.0 moves it.

    What is read is thresholded, so that noise on the embeddings, wherever else it lands, leaves
    every number exactly 0 or 1. Heads look at one place by position: scores are so far apart that
    the softmax is exactly one there.
    """
    toy = bare_gpt2(
        n_layers=N_LAYERS, n_heads=2, d_model=10, d_mlp=4, d_vocab=6, n_ctx=8, dtype=dtype
    )
    with torch.no_grad():
        toy.embed[1, FIRST] = toy.embed[2, SECOND] = 1.0
        for position, slot in ((1, AT_FIRST), (2, AT_SECOND), (LAST, AT_LAST)):
            toy.positions[position, slot] = 200.0
        _copy(toy, WRITES, AT_SECOND, AT_FIRST, FIRST, COPIED)
        # 1 where first and second are both there (their sum is 2), 0 beyond 0.02 of that.
        for neuron, (edge, sign) in enumerate(((1.98, 1), (1.99, -1), (2.01, -1), (2.02, 1))):
            toy.w_in(WRITES)[[COPIED, SECOND], neuron] = 100.0
            toy.b_in(WRITES)[neuron] = -100.0 * edge
            toy.w_out(WRITES)[neuron, FACT] = 100.0 * sign
        _copy(toy, MOVES, AT_LAST, AT_SECOND, FACT, MOVED)
        for neuron, (edge, sign) in enumerate(((50.0, 1), (51.0, -1))):
            toy.w_in(MOVES)[MOVED, neuron] = 1.0
            toy.b_in(MOVES)[neuron] = -edge
            toy.w_out(MOVES)[neuron, OUT] = sign
        toy.unembed[5, OUT] = 1.0
    return toy.model()


def _copy(toy, layer, query, key, source, target):
    """Let head 0 of a layer look from one marked position at another, and copy a slot."""
    toy.w_q(layer, 0)[query, 0] = 1.0
    toy.w_k(layer, 0)[key, 0] = 1.0
    toy.w_v(layer, 0)[source, 0] = 1.0
    toy.w_o(layer, 0)[0, target] = 1.0


def exact(position, layers, restore):
    """Return whether a restoration brings the fact back, in closed form."""
    if restore == "state":
        (layer,) = layers
        if position == 2:
            return float(WRITES <= layer < MOVES)
        return float(position == LAST and layer >= MOVES)
    if restore == "mlp":
        # The last MLP thresholds what was moved: its own output is an answer, too.
        return float((position == 2 and WRITES in layers) or (position == LAST and MOVES in layers))
    return float(position == LAST and MOVES in layers)


@pytest.fixture(scope="module")
def fact():
    return planted_fact()


@pytest.mark.parametrize("restore", ("state", "mlp", "attn"))
def test_the_grid_of_a_planted_fact_is_the_closed_form(fact, restore):
    logit = custom_metric("logit", [5], lambda logits: logits[:, 0])
    cells = trace_cells(fact, len(IDS), restore, window=3)
    found = trace(fact, Subject(IDS, SUBJECT, 5), cells, noise=3.0, seeds=5, seed=1, metric=logit)
    assert found.clean == 1.0
    assert torch.equal(found.noisy, torch.zeros(5, dtype=torch.float64))
    expected = [exact(cell.position, cell.layers, restore) for cell in cells]
    assert 0 < sum(expected) < len(cells)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert torch.equal(found.restored, expected[:, None].expand(-1, 5))
    assert torch.equal(found.indirect, expected)


@pytest.mark.parametrize("restore", ("state", "mlp", "attn"))
def test_the_fast_grid_is_bit_equal_to_single_passes(fact, restore):
    subject = Subject(IDS, SUBJECT, 5)
    cells = trace_cells(fact, len(IDS), restore, window=3)
    clean, noisy = record_noisy(fact, subject, cells, noise=3.0, seeds=3)
    metric = custom_metric("logit", [5], lambda logits: logits[:, 0])
    found = trace(fact, subject, cells, noise=3.0, seeds=3, metric=metric)
    for row in range(3):
        slow = single_passes(noisy, clean, cells, row)
        logits = slow @ fact.unembedding.weight.T
        assert torch.equal(found.restored[:, row], logits[:, 5])


def single_passes(noisy, clean, cells, row):
    """Run every cell alone, with this row's noise."""
    from dataclasses import replace

    from layerscope.models import Add

    (noise,) = noisy.edits
    own = Add("embed", noise.value[row : row + 1], positions=noise.positions)
    alone = replace(noisy, edits=(own,))
    return naive_cells(alone, [replace(restoring(clean, cell, row), row=row) for cell in cells])


@pytest.mark.parametrize(
    "family", ("llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "qwen2", "opt", "phi")
)
def test_grids_equal_single_passes(family):
    model = loaded(family)
    ids = (1, 17, 40, 5, 300, 251, 8)
    subject = Subject(ids, (2, 3), 9)
    noise = embedding_noise(model, [ids[2:4]])
    for restore in ("state", "mlp", "attn"):
        cells = trace_cells(model, len(ids), restore, window=2)
        clean, noisy = record_noisy(model, subject, cells, noise=noise, seeds=2)
        found = trace(model, subject, cells, noise=noise, seeds=2, metric="logit")
        for row in range(2):
            slow = model.unembedding.logits(single_passes(noisy, clean, cells, row))[:, 9].double()
            scale = float(slow.abs().max())
            assert float((found.restored[:, row] - slow).abs().max()) <= 1e-5 * max(scale, 1.0)
        assert float(found.indirect.abs().max()) > 1e-3


def test_before_the_subject_nothing_is_restored_and_noise_is_seeded():
    model = loaded("llama")
    subject = Subject((1, 17, 40, 5, 300), (2, 3), 9)
    cells = trace_cells(model, 5, "state")
    first = trace(model, subject, cells, noise=2.0, seeds=3, seed=1)
    again = trace(model, subject, cells, noise=2.0, seeds=3, seed=1)
    other = trace(model, subject, cells, noise=2.0, seeds=3, seed=2)
    assert torch.equal(first.restored, again.restored)
    assert not torch.equal(first.noisy, other.noisy)
    early = torch.tensor([cell.position < 2 for cell in cells])
    assert torch.equal(first.indirect[early], torch.zeros(int(early.sum()), dtype=torch.float64))


def test_the_noise_is_three_standard_deviations_of_the_subjects():
    model = loaded("gpt2")
    ids = [5, 300, 77]
    table = model.backend.structure.embedding.module.weight[ids].double()
    expected = 3 * float(table.detach().std(unbiased=False))
    assert embedding_noise(model, [[5, 300], [77]]) == pytest.approx(expected, rel=1e-6)


def test_windows_are_cut_at_the_ends():
    model = loaded("llama")  # three layers
    cells = trace_cells(model, 1, "mlp", window=2)
    assert [cell.layers for cell in cells] == [(0,), (0, 1), (1, 2)]
    cells = trace_cells(model, 1, "attn", window=10)
    assert [cell.layers for cell in cells] == [(0, 1, 2)] * 3


def test_what_cannot_be_traced_is_refused():
    model = loaded("llama")
    with pytest.raises(PromptError, match="no token in the prompt"):
        Subject((1, 2), (), 3)
    with pytest.raises(ConfigError, match="use state, mlp, attn"):
        trace_cells(model, 3, "heads")
    with pytest.raises(ConfigError, match="at least one seed"):
        trace(model, Subject((1, 2), (1,), 3), trace_cells(model, 2, "state"), noise=1.0, seeds=0)
