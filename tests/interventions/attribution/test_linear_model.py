"""T4: in a linear model every method is exact, and edges sum to their nodes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from layerscope.interventions.attribution import (
    Contrast,
    LogitDifference,
    atp_star,
    attribution_patching,
    edge_attribution,
    exact_edges,
    exact_effects,
    integrated_gradients,
    verify,
)
from layerscope.models import Site
from support.toy_zoo import linear_model

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
SITES = ["residual", "attn_out", "mlp_out", "heads", "values", "neurons"]


@cache
def linear(dtype: torch.dtype) -> Contrast:
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(0, 20, (2, 3, 7), generator=generator)
    metric = LogitDifference(torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    return Contrast.of(linear_model(dtype=dtype), clean, corrupt, metric)


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_node_method_is_exact(dtype: torch.dtype) -> None:
    contrast = linear(dtype)
    plain = attribution_patching(contrast, SITES)
    nodes = plain.nodes() + plain.nodes(positions=True)
    exact = torch.stack(list(exact_effects(contrast, nodes).values()))
    assert float(exact.abs().max()) > 0.1
    methods = [
        plain,
        integrated_gradients(contrast, SITES, rule="left", steps=1),
        integrated_gradients(contrast, SITES, rule="midpoint", steps=3, error=False),
        integrated_gradients(contrast, SITES, rule="gauss-legendre", steps=2),
        atp_star(contrast, SITES, grad_drop=False),
    ]
    methods += [
        integrated_gradients(contrast, SITES, path="activations", steps=2, error=False),
    ]
    for scores in methods:
        found = torch.stack([scores.of(node) for node in nodes])
        assert worst(found, exact) <= BOUNDS[dtype], scores.method


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rule", (None, "left", "gauss-legendre"))
def test_every_edge_is_exact_and_sums_to_its_ends(dtype: torch.dtype, rule: str | None) -> None:
    contrast = linear(dtype)
    scores = edge_attribution(contrast, rule=rule, steps=2)
    edges = scores.edges()
    exact = exact_edges(contrast, edges)
    found = torch.stack([scores[edge] for edge in edges])
    assert worst(found, torch.stack(list(exact.values()))) <= BOUNDS[dtype]
    assert scores.remainder is not None
    assert float(scores.remainder.abs().max()) <= BOUNDS[dtype] * float(found.abs().max())
    # What leaves a writer is the effect of the writer.
    nodes = scores.nodes()
    heads = exact_effects(contrast, attribution_patching(contrast, "heads").nodes())
    for node, effect in heads.items():
        writer = next(
            w
            for w in nodes
            if w.kind == "head" and (w.layer, w.head) == (node.site.layer, node.unit)
        )
        assert worst(nodes[writer], effect) <= 10 * BOUNDS[dtype]
    # What arrives at the logits is the whole effect.
    logits = scores.values[:, scores.receivers.index(scores.receivers[-1])].sum(0)
    assert worst(logits, contrast.total) <= BOUNDS[dtype]


def test_queries_and_keys_do_nothing() -> None:
    contrast = linear(torch.float64)
    scores = edge_attribution(contrast, qk="recomputed")
    for edge in scores.edges():
        if edge[1].kind in ("q", "k"):
            assert not scores[edge].any()
    for node in atp_star(contrast, ["queries", "keys"]).nodes():
        assert Site(node.site.kind, 0).kind in ("attn.q", "attn.k")
        assert not atp_star(contrast, ["queries", "keys"]).of(node).any()


def test_verification_has_nothing_to_say() -> None:
    report = verify(attribution_patching(linear(torch.float64), SITES), top=20, sample=30)
    assert report.spearman == pytest.approx(1.0, abs=1e-3)
    assert not (report.blind or report.wrong_signs or report.missed or report.unconfirmed)
    assert not [line for line in report.warnings if not line.startswith("redundant")]
