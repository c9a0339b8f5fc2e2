"""T1 and T2: the planted induction circuit, whose effects and quadrature errors are known."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from layerscope.interventions.attribution import (
    Contrast,
    Node,
    Receiver,
    atp_star,
    attribution_patching,
    edge_attribution,
    exact_edges,
    exact_effects,
    integrated_gradients,
    saturated_heads,
    verify,
)
from layerscope.interventions.stream import Writer
from layerscope.models import Site, ZeroAblate
from support.toy_induction import InductionToy, induction_toy

PREVIOUS, INDUCTION = Node(Site("attn.z", 0), 0), Node(Site("attn.z", 1), 0)

# beta: exact effect of head 0.0, its attribution patching, integrated gradients at the places
# k / M for k = 1 to M of the way from corrupt to clean, M = 5 and 30.
TABLE = {
    3: (-4.815, -4.874, -4.992, -4.849),
    8: (-7.463, -0.141, -6.456, -7.319),
    20: (-7.481, -0.000, -3.186, -7.096),
    60: (-7.481, 0.000, -0.004, -6.166),
}
# beta, rule: relative error against exact patching with M = 5, 10, 20, 40.
ERRORS = {
    (8, "left"): (1.3e-1, 6.2e-2, 3.0e-2, 1.4e-2),
    (8, "midpoint"): (1.1e-2, 2.8e-3, 7.0e-4, 1.7e-4),
    (8, "gauss-legendre"): (1.8e-3, 4.4e-6, 1e-9, 1e-9),
    (20, "left"): (5.7e-1, 1.8e-1, 8.0e-2, 3.8e-2),
    (20, "midpoint"): (2.2e-1, 1.6e-2, 4.3e-3, 1.1e-3),
    (20, "gauss-legendre"): (1.2e-1, 1.9e-3, 5.9e-7, 1e-9),
    (60, "left"): (1.0, 9.0e-1, 3.3e-1, 1.3e-1),
    (60, "gauss-legendre"): (6.1e-1, 9.1e-2, 1.2e-3, 7.3e-8),
}
STEPS = (5, 10, 20, 40)


@cache
def planted(beta: float) -> tuple[InductionToy, Contrast]:
    toy = induction_toy(beta)
    return toy, Contrast.of(toy.model, toy.clean, toy.corrupt, toy.margin)


@pytest.mark.parametrize("beta", TABLE)
def test_the_model_copies(beta: float) -> None:
    toy, _ = planted(beta)
    logits = toy.model.run(toy.clean, logits="last").logits
    assert logits is not None
    assert torch.equal(logits[:, 0].argmax(-1), toy.targets)


@pytest.mark.parametrize("beta", TABLE)
def test_exact_patching_recovers_the_circuit(beta: float) -> None:
    toy, contrast = planted(beta)
    nodes = [Node(Site("attn.z", layer), head) for layer in (0, 1) for head in range(4)]
    effects = exact_effects(contrast, nodes)
    torch.testing.assert_close(effects[PREVIOUS], toy.exact_effect(), rtol=1e-12, atol=1e-12)
    assert round(float(effects[PREVIOUS].mean()), 3) == TABLE[beta][0]
    torch.testing.assert_close(effects[INDUCTION], contrast.total)
    for node in nodes:
        if node not in (PREVIOUS, INDUCTION):
            assert float(effects[node].abs().max()) == 0.0, node


@pytest.mark.parametrize("beta", TABLE)
def test_attribution_patching_goes_blind(beta: float) -> None:
    _, contrast = planted(beta)
    scores = attribution_patching(contrast)
    assert abs(scores.mean(PREVIOUS) - TABLE[beta][1]) <= 5.1e-4
    for node in scores.nodes():
        if node not in (PREVIOUS, INDUCTION):
            assert scores.mean(node) == 0.0


@pytest.mark.parametrize("beta", TABLE)
@pytest.mark.parametrize("path", ("inputs", "activations"))
def test_integrated_gradients_of_the_table(beta: float, path: str) -> None:
    _, contrast = planted(beta)
    for steps, expected in ((5, TABLE[beta][2]), (30, TABLE[beta][3])):
        # From the base, which is clean, the reference's places are those of the left rule.
        scores = integrated_gradients(
            contrast, "heads", path=path, rule="left", steps=steps, error=False
        )
        assert abs(scores.mean(PREVIOUS) - expected) <= 5.1e-4
        assert scores.mean(Node(Site("attn.z", 0), 2)) == 0.0


@pytest.mark.parametrize("beta", TABLE)
def test_either_head_ablated_removes_the_margin(beta: float) -> None:
    toy, _ = planted(beta)
    at = torch.arange(len(toy.targets)), toy.targets

    def over_the_best_other(head: str | None) -> torch.Tensor:
        edits = [ZeroAblate(head)] if head else []
        logits = toy.model.run(toy.clean, edits=edits, logits="last").logits
        assert logits is not None
        rest = logits[:, 0].clone()
        rest[at] = -math.inf
        return logits[:, 0][at] - rest.amax(-1)

    assert bool((over_the_best_other(None) > 1).all())
    for head in ("attn.0.head.0.z", "attn.1.head.0.z"):
        assert int((over_the_best_other(head) <= 1e-9).sum()) == 40, head
    for head in ("attn.0.head.2.z", "attn.1.head.3.z"):
        assert torch.equal(over_the_best_other(head), over_the_best_other(None))


@pytest.mark.parametrize(("beta", "rule"), ERRORS)
def test_quadrature_errors_and_their_estimates(beta: float, rule: str) -> None:
    toy, contrast = planted(beta)
    exact = toy.exact_effect()
    for steps, expected in zip(STEPS, ERRORS[beta, rule], strict=True):
        plain = integrated_gradients(contrast, "attn.0.z", rule=rule, steps=steps, error=False)
        error = abs(plain.mean(PREVIOUS) / float(exact.mean()) - 1)
        if expected > 1e-8:
            assert error == pytest.approx(expected, rel=0.06)
        else:
            assert error <= expected
        scores = integrated_gradients(contrast, "attn.0.z", rule=rule, steps=steps)
        true = (scores.of(PREVIOUS) - exact).abs()
        estimated = scores.error_of(PREVIOUS)
        gap = scores.notes["gap"]
        assert estimated is not None and isinstance(gap, torch.Tensor)
        assert bool((true <= torch.maximum(estimated, gap.abs()) * 1.01 + 1e-10).all())


def test_observed_orders() -> None:
    _, contrast = planted(8)
    exact = float(planted(8)[0].exact_effect().mean())

    def error(rule: str, steps: int) -> float:
        scores = integrated_gradients(contrast, "attn.0.z", rule=rule, steps=steps, error=False)
        return abs(scores.mean(PREVIOUS) - exact)

    for rule, order in (("left", 1), ("midpoint", 2)):
        assert math.log2(error(rule, 20) / error(rule, 40)) == pytest.approx(order, abs=0.1)
    assert error("gauss-legendre", 20) < 1e-5 * error("gauss-legendre", 10)


@pytest.mark.parametrize("beta", TABLE)
def test_the_only_live_path_is_into_the_keys(beta: float) -> None:
    """Effect through K / Q / V of head 1.0: everything, nothing, nothing."""
    _, contrast = planted(beta)
    head = Writer(0, "head", 0)
    edges = [(head, receiver) for receiver in edge_attribution(contrast).receivers[12:]]
    exact = exact_edges(contrast, edges)
    aware = edge_attribution(contrast, qk="recomputed")
    for edge in edges:
        expected = TABLE[beta][0] if edge[1] == Receiver(1, "k", 0) else 0.0
        assert abs(float(exact[edge].mean()) - expected) <= 5.1e-4, str(edge[1])
        assert abs(float(aware[edge].mean()) - expected) <= 5.1e-4, str(edge[1])
    assert aware.nodes()[head].mean().item() == pytest.approx(TABLE[beta][0], abs=5.1e-4)
    for writer, score in aware.nodes().items():
        if writer.kind == "head" and writer.head != 0:
            assert float(score.abs().max()) == 0.0


@pytest.mark.parametrize("beta", (8, 20, 60))
def test_recomputed_keys_are_seen_at_every_strength(beta: float) -> None:
    _, contrast = planted(beta)
    scores = atp_star(contrast, "keys", grad_drop=False)
    node = Node(Site("attn.k", 1), 0)
    exact = exact_effects(contrast, [node])[node]
    torch.testing.assert_close(scores.of(node), exact, rtol=1e-3, atol=1e-3)
    assert abs(attribution_patching(contrast, "keys").mean(node)) < 0.15


@pytest.mark.parametrize("beta", (8, 20, 60))
def test_the_report_warns_where_gradients_are_blind(beta: float) -> None:
    _, contrast = planted(beta)
    report = verify(attribution_patching(contrast), top=2, sample=6)
    assert PREVIOUS in report.blind
    line = report.warnings[0]
    assert line.startswith("blind: saturated attention in attn.1.head.0")
    assert "attn.0.head.0.z (exact -7." in line
    (head,) = saturated_heads(contrast)
    assert (head.layer, head.head) == (1, 0)
    assert head.whole == pytest.approx(TABLE[beta][0], abs=1e-3)


def test_the_report_is_quiet_where_gradients_see() -> None:
    _, contrast = planted(3)
    assert verify(attribution_patching(contrast), top=2, sample=6).warnings == ()
