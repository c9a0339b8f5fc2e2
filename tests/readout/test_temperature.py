"""The temperature grid of the last-row check."""

from __future__ import annotations

import pytest
import torch

from layerscope.errors import ConfigError
from layerscope.readout.temperature import GRID, fit_temperature
from readout.reference import slow_divergences

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * 3


def test_the_grid_is_25_log_spaced_values_with_one_in_the_middle() -> None:
    assert len(GRID) == 25
    assert GRID[12] == 1.0
    assert (GRID[0], GRID[-1]) == pytest.approx((0.1, 10.0))
    assert GRID[13] / GRID[12] == pytest.approx(GRID[1] / GRID[0])


def test_equal_rows_need_no_temperature() -> None:
    fit = fit_temperature(LOGITS, LOGITS)
    assert fit.temp_est.tolist() == [1.0] * 3
    assert fit.kl_bits.max() < 1e-12
    assert fit.kl_after_temp_bits.max() < 1e-12


@pytest.mark.parametrize("step", [0, 5, 17, 24])
def test_a_planted_temperature_is_found(step: int) -> None:
    fit = fit_temperature(LOGITS * GRID[step], LOGITS)
    assert fit.temp_est.tolist() == pytest.approx([GRID[step]] * 3)
    assert fit.kl_after_temp_bits.max() < 1e-9
    before = [
        slow_divergences(z, q)["kl_to_bits"]
        for z, q in zip(LOGITS.double() * GRID[step], LOGITS.double(), strict=True)
    ]
    assert fit.kl_bits.tolist() == pytest.approx(before, rel=1e-5)


def test_a_nonfinite_row_gives_nan_and_leaves_the_others() -> None:
    broken = LOGITS.clone()
    broken[1, 4] = torch.nan
    fit = fit_temperature(broken, LOGITS)
    assert fit.temp_est.isnan().tolist() == [False, True, False]


def test_shapes_must_agree() -> None:
    with pytest.raises(ConfigError, match="must both be"):
        fit_temperature(LOGITS, LOGITS[:2])
