"""What a head does to logits: transforms, temperatures, a cap proved from probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from layerscope.errors import TableError
from layerscope.measures.head_transforms import (
    best_temperature,
    cap,
    head_mismatch,
    head_transforms,
    kl_bits,
    softcap_offset,
    transforms_match,
)

Z = np.random.default_rng(3).normal(size=200) * 20


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max())
    return p / p.sum()


def test_divergence_without_a_floor() -> None:
    assert kl_bits(Z, Z + 5.0) < 1e-30
    assert kl_bits(np.array([0.0, -400.0]), np.array([-400.0, 0.0])) == pytest.approx(
        400 / np.log(2)
    )


@pytest.mark.parametrize(
    ("scale", "softcap", "key"),
    [(0.25, None, "scale"), (None, 30.0, "softcap"), (0.25, 30.0, "scale_then_softcap")],
)
def test_the_right_transform_explains_the_head(
    scale: float | None, softcap: float | None, key: str
) -> None:
    head = cap(Z * (scale or 1.0), softcap)
    found = head_transforms(Z, head, scale=scale, softcap=softcap)
    assert found["kl_untransformed_bits"] > 0.05
    assert found["kl_after_transform_bits"][key] < 1e-12
    assert transforms_match(found, exact_bits=0.01) is True
    # Capping first is another head.
    wrong = head_transforms(Z, cap(Z, 30.0) * 0.25, scale=0.25, softcap=30.0)
    assert transforms_match(wrong, exact_bits=0.01) is False
    plain = head_transforms(Z, Z, scale=None, softcap=None)
    assert set(plain["kl_after_transform_bits"].values()) == {None}
    assert transforms_match(plain, exact_bits=0.01) is None


def test_the_best_temperature() -> None:
    tau, after = best_temperature(lambda t: kl_bits(Z / t, Z / 2.3))
    assert tau == pytest.approx(2.3, rel=0.02)
    assert after < 0.01
    assert best_temperature(lambda t: kl_bits(Z / t, Z)) == (1.0, 0.0)
    assert best_temperature(lambda _: 0.5) == (1.0, 0.5)
    found = head_mismatch(Z, cap(Z, 30.0))
    assert found["kl_bits_tuned_final"] > found["kl_bits_tuned_final_after_tau_star"] > 0.0
    assert found["tau_star_modelcal"] > 1.0


@pytest.mark.parametrize("shift", [0.0, 12.0, -40.0])
def test_a_cap_leaves_its_trace_in_probabilities(shift: float) -> None:
    z = Z + shift
    top = np.argsort(-z)[:20]
    p, q = softmax(z)[top], softmax(cap(z, 30.0))[top]
    offset, error = softcap_offset(p.tolist(), q.tolist(), softcap=30.0)
    assert offset == pytest.approx(z.max(), abs=1e-6)
    assert error < 1e-8
    # Another cap, or a cap before a scale, does not fit.
    assert softcap_offset(p.tolist(), q.tolist(), softcap=50.0)[1] > 0.1
    assert softcap_offset(p.tolist(), softmax(z)[top].tolist(), softcap=30.0)[1] > 0.1


def test_probabilities_that_prove_nothing() -> None:
    for bad in ([0.5, 0.5], [0.5, 0.5, 0.0]):
        with pytest.raises(TableError, match="same three tokens"):
            softcap_offset(bad, bad, softcap=30.0)
