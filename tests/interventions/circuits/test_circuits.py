"""Circuits: both ends are the two runs, planted circuits are found, areas follow definitions."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.interventions.attribution import (
    Contrast,
    LogitDifference,
    Receiver,
    edge_attribution,
    exact_edges,
)
from layerscope.interventions.circuits import (
    FRACTIONS,
    Faithfulness,
    circuit_metric,
    faithfulness_curve,
    keep_edges,
)
from layerscope.interventions.circuits.graph import edge_mask
from layerscope.interventions.stream import EMBED, Writer
from support.loaded import batch_of, loaded
from support.toy_induction import induction_toy

FAMILIES = ("llama", "gpt2", "gemma2", "olmo2", "gpt_neox", "phi", "granite", "mixtral", "falcon")


def contrast_in(family: str) -> Contrast:
    batch = batch_of(0, 2)
    ids = batch.ids.clone()
    ids[0, 3], ids[1, 2] = 77, 200
    metric = LogitDifference(torch.tensor([5, 6]), torch.tensor([8, 9]))
    other = type(batch)(ids, batch.attention_mask, batch.lengths)
    return Contrast.of(loaded(family), batch, other, metric)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_are_the_base_run_and_none_the_donors(family: str) -> None:
    contrast = contrast_in(family)
    scores = edge_attribution(contrast)
    base, donor = contrast.ends
    everything, nothing = scores.exists, torch.zeros_like(scores.exists)
    torch.testing.assert_close(circuit_metric(contrast, everything), base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(circuit_metric(contrast, nothing), donor, rtol=1e-5, atol=1e-5)
    assert float((base - donor).abs().max()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_one_edge_is_patching_it(family: str) -> None:
    contrast = contrast_in(family)
    scores = edge_attribution(contrast)
    edges = scores.ranked(limit=6)
    exact = exact_edges(contrast, edges)
    for edge in edges:
        mask = scores.exists.clone()
        mask[scores.writers.index(edge[0]), scores.receivers.index(edge[1])] = False
        effect = circuit_metric(contrast, mask) - contrast.ends[0]
        torch.testing.assert_close(effect, exact[edge], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("beta", (8.0, 60.0))
def test_the_planted_circuit_is_found_and_is_faithful(beta: float) -> None:
    toy = induction_toy(beta, n_prompts=8)
    contrast = Contrast.of(toy.model, toy.clean, toy.corrupt, toy.margin)
    scores = edge_attribution(contrast, qk="recomputed")
    # Only one step back sees through the saturated softmax: what feeds head 0.0 stays hidden.
    assert {
        (Writer(0, "head", 0), Receiver(1, "k", 0)),
        (Writer(1, "head", 0), Receiver(2, "logits")),
    } <= set(keep_edges(scores, 3, live=False).edges)
    needed = [
        (EMBED, Receiver(0, "v", 0)),
        (EMBED, Receiver(1, "v", 0)),
        (EMBED, Receiver(1, "q", 0)),
        (Writer(0, "head", 0), Receiver(1, "k", 0)),
        (Writer(1, "head", 0), Receiver(2, "logits")),
    ]
    found = circuit_metric(contrast, edge_mask(scores, needed))
    torch.testing.assert_close(found, contrast.ends[0])
    without = circuit_metric(contrast, edge_mask(scores, needed[:3] + needed[4:]))
    torch.testing.assert_close(without, contrast.ends[1])


def test_areas_are_trapezoids_of_their_own_ranking() -> None:
    values = (0.5, 1.5, 1.0)
    parts = ((0.0, 0.5, 1.0), (0, 5, 10), (1.0, 3.0, 2.0), values, 2.0, 0.0)
    assert Faithfulness("signed", *parts).area == pytest.approx(0.5 * 1.0 + 0.5 * 1.25)
    assert Faithfulness("magnitude", *parts).area == pytest.approx(0.5 * 0.5 + 0.5 * 0.25)
    nothing = Faithfulness("signed", (0.0, 1.0), (0, 1), (1.0, 1.0), (None, None), 1.0, 1.0)
    assert nothing.area is None


def test_curves_end_at_the_whole_model() -> None:
    contrast = contrast_in("llama")
    scores = edge_attribution(contrast, rule="midpoint", steps=3)
    for ranking in ("signed", "magnitude"):
        curve = faithfulness_curve(scores, ranking=ranking)
        assert curve.fractions == FRACTIONS
        assert curve.faithfulness[-1] == pytest.approx(1.0, abs=1e-3)
        assert curve.table().height == len(FRACTIONS)
        assert curve.counts[-1] == keep_edges(scores, 0).n_all
    signed = keep_edges(scores, 10, ranking="signed", live=False)
    towards = float(contrast.total.mean())
    assert all(score * towards >= 0 for score in signed.scores)


def test_dead_ends_are_dropped() -> None:
    contrast = contrast_in("llama")
    scores = edge_attribution(contrast)
    circuit = keep_edges(scores, 25)
    nodes = {str(writer) for writer, _ in circuit.edges}
    read = {node for _, receiver in circuit.edges for node in circuit.nodes_of(receiver)}
    for name in nodes - {"embed"}:
        assert name in read
    drawn = {node["name"] for node in circuit.to_dict()["nodes"]}
    assert nodes <= drawn and read <= drawn
    assert len(circuit.edges) <= 25 == len(keep_edges(scores, 25, live=False).edges)


def test_unusable_requests_are_refused() -> None:
    scores = edge_attribution(contrast_in("llama"))
    with pytest.raises(ConfigError, match="cannot keep"):
        keep_edges(scores, 10**6)
    with pytest.raises(ConfigError, match="use 'signed' or 'magnitude'"):
        keep_edges(scores, 1, ranking="size")
    with pytest.raises(ConfigError, match="must ascend within 0 and 1"):
        faithfulness_curve(scores, fractions=(0.5, 0.1))
