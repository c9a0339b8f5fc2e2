"""What a head does to logits: exact transforms, and the temperature nearest to it."""

from __future__ import annotations

import numpy as np
import pytest

from layerscope.measures.head_transforms import (
    best_temperature,
    cap,
    head_mismatch,
    head_transforms,
    kl_bits,
    transforms_match,
)

Z = np.random.default_rng(3).normal(size=200) * 20


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
