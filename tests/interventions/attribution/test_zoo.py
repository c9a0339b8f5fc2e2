"""T10: where each method is blind, it is blind here, and the report says so."""

from __future__ import annotations

import pytest

from layerscope.interventions.attribution import (
    Node,
    Receiver,
    atp_star,
    attribution_patching,
    edge_attribution,
    exact_edges,
    exact_effects,
    integrated_gradients,
    joint_effect,
    metric_linearity,
    verify,
)
from layerscope.interventions.stream import Writer
from layerscope.models import Site
from support.toy_zoo import backup, cancellation, or_gate, saturated_metric

A, B = Node(Site("attn.z", 0), 0), Node(Site("attn.z", 0), 1)
WRITER = Writer(0, "head", 0)


def effect(contrast, node: Node) -> float:
    return float(exact_effects(contrast, [node])[node].mean())


def test_cancellation_hides_a_head_from_total_effects_but_not_from_graddrop_or_edges() -> None:
    contrast = cancellation().contrast()
    assert effect(contrast, A) == pytest.approx(0.0, abs=1e-12)
    assert attribution_patching(contrast).mean(A) == pytest.approx(0.0, abs=1e-12)
    assert atp_star(contrast).mean(A) == pytest.approx(1.0)
    scores = edge_attribution(contrast)
    direct, through = (WRITER, Receiver(2, "logits")), (WRITER, Receiver(1, "mlp"))
    exact = exact_edges(contrast, [direct, through])
    for found in (scores, exact):
        assert float(found[direct].mean()) == pytest.approx(-1.0)
        assert float(found[through].mean()) == pytest.approx(1.0)
    assert WRITER in scores.cancelling()
    report = verify(attribution_patching(contrast), top=2, sample=0)
    assert "clean and corrupt prompts give the same metric" in report.warnings[0]


def test_an_or_gate_hides_its_parts_from_single_patches() -> None:
    contrast = or_gate().contrast()
    assert effect(contrast, A) == effect(contrast, B) == 0.0
    assert float(joint_effect(contrast, [A, B])) == pytest.approx(-1.0)
    scores = attribution_patching(contrast)
    assert scores.mean(A) == scores.mean(B) == 0.0
    assert atp_star(contrast).mean(A) == 0.0
    # The inputs' path leaves the flat part: each gets half.
    path = integrated_gradients(contrast, "heads", steps=10)
    assert path.mean(A) == path.mean(B) == pytest.approx(-0.5)
    report = verify(scores, top=8, sample=0)
    assert report.joint == pytest.approx(-1.0)
    assert any(
        line.startswith("redundant: the strongest do -1 together") for line in report.warnings
    )
    # Denoising sees each part alone.
    other = or_gate().contrast(direction="denoise")
    assert effect(other, A) == effect(other, B) == pytest.approx(1.0)


def test_a_backup_head_hides_the_head_it_stands_in_for() -> None:
    contrast = backup().contrast()
    assert effect(contrast, A) == pytest.approx(0.0, abs=1e-9)
    scores = attribution_patching(contrast)
    assert scores.mean(A) == pytest.approx(-1.0)
    direct = (WRITER, Receiver(2, "logits"))
    assert float(exact_edges(contrast, [direct])[direct].mean()) == pytest.approx(-1.0)
    query = (WRITER, Receiver(1, "q", 0))
    assert float(exact_edges(contrast, [query])[query].mean()) == pytest.approx(1.0)
    # Gradients do not see the backup, the recomputed softmax does.
    assert float(edge_attribution(contrast)[query].mean()) == pytest.approx(0.0, abs=1e-9)
    aware = edge_attribution(contrast, qk="recomputed")
    assert float(aware[query].mean()) == pytest.approx(1.0, abs=1e-6)
    assert WRITER in aware.cancelling()
    report = verify(scores, top=3, sample=0)
    assert report.unconfirmed == (A,)
    assert any("not confirmed: attn.0.head.0.z (predicted -1" in line for line in report.warnings)


def test_a_probability_at_one_hides_everything() -> None:
    zoo = saturated_metric()
    plain, logits = zoo.contrast("probability"), zoo.contrast("logit")
    assert effect(plain, A) == pytest.approx(1 / 6 - 1, abs=1e-6)
    assert abs(attribution_patching(plain).mean(A)) < 1e-6
    assert attribution_patching(logits).mean(A) == effect(logits, A) == pytest.approx(-20.0)
    linearity = metric_linearity(plain)
    assert linearity is not None and linearity < 1e-6
    assert metric_linearity(logits) == pytest.approx(1.0)
    report = verify(attribution_patching(plain), top=2, sample=0)
    assert report.blind == (A,)
    assert report.warnings[0].startswith("blind: saturated metric (its gradient sees 0.0%")
