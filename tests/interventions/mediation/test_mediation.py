"""Mediation in circuits of known effects, and intervals that are those of the definition."""

from __future__ import annotations

import numpy as np
import pytest

from layerscope.errors import ConfigError
from layerscope.interventions.attribution import Contrast, Node
from layerscope.interventions.mediation import bootstrap, mediate
from layerscope.models import Site
from support.toy_induction import induction_toy
from support.toy_zoo import backup, cancellation, or_gate

A = "attn.0.head.0.z"


def by_name(found) -> dict[str, dict]:
    return {row["mediator"]: row for row in found.table().to_dicts()}


def test_known_effects_of_the_planted_circuit() -> None:
    toy = induction_toy(20.0, n_prompts=10)
    contrast = Contrast.of(toy.model, toy.clean, toy.corrupt, toy.margin)
    rows = by_name(mediate(contrast, "heads", together=True))
    exact = float(toy.exact_effect().mean())
    for name in (A, "attn.1.head.0.z"):
        assert rows[name]["indirect"] == pytest.approx(exact)
        assert rows[name]["direct"] == pytest.approx(0.0, abs=1e-9)
        assert rows[name]["recovery"] == pytest.approx(1.0)
        assert rows[name]["recovery_low"] == pytest.approx(1.0)
    other = rows["attn.0.head.2.z"]
    assert other["indirect"] == 0.0 and other["direct"] == other["total"] == pytest.approx(exact)
    assert rows["all together"]["indirect"] == pytest.approx(exact)


def test_methods_agree_where_the_mathematics_does() -> None:
    toy = induction_toy(3.0, n_prompts=6)
    contrast = Contrast.of(toy.model, toy.clean, toy.corrupt, toy.margin)
    exact, path = (
        mediate(contrast, "attn.0.z", method=method, steps=12) for method in ("patch", "ig")
    )
    np.testing.assert_allclose(path.indirect, exact.indirect, atol=1e-6)
    np.testing.assert_allclose(path.direct, exact.direct, atol=1e-6)
    linear = mediate(contrast, "attn.0.z", method="atp")
    assert abs(linear.indirect[0].mean() - exact.indirect[0].mean()) > 0.05


def test_direct_and_indirect_effects_of_the_zoo() -> None:
    rows = by_name(mediate(cancellation().contrast(), ["heads", "mlp_out"]))
    assert rows[A]["total"] == 0.0 and rows[A]["recovery"] is None
    assert rows["mlp_out.1"]["indirect"] == pytest.approx(1.0)
    assert rows["mlp_out.1"]["direct"] == pytest.approx(-1.0)
    # One part of an OR gate: nothing by itself, and nothing without it either.
    gate = by_name(mediate(or_gate().contrast(), "heads"))
    assert gate[A]["indirect"] == 0.0 and gate[A]["direct"] == pytest.approx(0.0)
    assert gate[A]["interaction"] == pytest.approx(-1.0)
    spare = by_name(mediate(backup().contrast(), "heads"))
    assert spare[A]["indirect"] == pytest.approx(0.0, abs=1e-9)
    assert spare[A]["total"] == pytest.approx(-1.0)


def test_every_position_of_the_stream_carries_everything() -> None:
    toy = induction_toy(8.0, n_prompts=4)
    contrast = Contrast.of(toy.model, toy.clean, toy.corrupt, toy.margin)
    whole = mediate(contrast, "residual")
    for index in range(2):
        np.testing.assert_allclose(whole.indirect[index], whole.total)
    each = mediate(contrast, "resid_pre.1", positions="each", together=True)
    assert each.mediators[0] == Node(Site("resid_pre", 1), None, 0)
    np.testing.assert_allclose(each.indirect[-1], each.total)
    last = mediate(contrast, "resid_pre.1", positions="last")
    np.testing.assert_allclose(last.indirect[0], each.indirect[6], atol=1e-12)


def test_zero_totals_are_reported() -> None:
    toy = induction_toy(8.0, n_prompts=3)
    corrupt = toy.corrupt.clone()
    corrupt[1] = toy.clean[1]
    contrast = Contrast.of(toy.model, toy.clean, corrupt, toy.margin)
    found = mediate(contrast, "attn.0.z")
    assert found.zero == (1,)
    assert found.recovery(0).value == pytest.approx(1.0)
    same = Contrast.of(toy.model, toy.clean, toy.clean, toy.margin)
    nothing = mediate(same, "attn.0.z")
    assert nothing.zero == (0, 1, 2) and nothing.recovery(0).value is None
    assert nothing.table()["recovery"].null_count() == 4


def test_intervals() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0])
    found = bootstrap(values, seed=1)
    assert found.value == 2.5 and found == bootstrap(values, seed=1)
    assert found.low is not None and found.high is not None
    assert 1.0 <= found.low < 2.5 < found.high <= 4.0
    draws = np.random.default_rng(1).integers(0, 4, (2000, 4))
    assert found.low == pytest.approx(np.quantile(values[draws].mean(1), 0.025))
    ratio = bootstrap(values, 2 * values)
    assert ratio.value == ratio.low == ratio.high == 0.5
    assert bootstrap(values[:1]).low is None
    assert bootstrap(values, np.array([1.0, -1.0, 1.0, -1.0])).value is None


def test_unknown_words_are_refused() -> None:
    contrast = cancellation().contrast()
    with pytest.raises(ConfigError, match="use 'patch', 'atp' or 'ig'"):
        mediate(contrast, "heads", method="exact")
    with pytest.raises(ConfigError, match="use all, last, each or numbers"):
        mediate(contrast, "heads", positions="first")
