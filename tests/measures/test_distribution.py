from __future__ import annotations

import pytest

from layerscope.measures.distribution import entropy_gap_fields, kl_fields
from support.hand_made import hand_made_pass


def test_entropy_gap_over_known_rows() -> None:
    part = hand_made_pass(
        entropy_bits=[10.0, 8.0, None, 3.0], teacher_entropy_bits=[3.0, 3.0, 3.0, 3.0]
    )
    fields = entropy_gap_fields(part)
    assert fields["entropy_gap_samples"] == 3
    assert fields["entropy_gap_bits_percentiles"] == {"p25": 2.5, "p50": 5.0, "p75": 6.0}


def test_divergence_by_depth_rounds_halves_to_even() -> None:
    kl = [float(layer) for layer in range(7)]  # n = 6: rows 1.5 -> 2, 3, 4.5 -> 4
    fields = kl_fields(hand_made_pass(kl_to_final_bits=kl, kl_to_final_bits_norm_temp=kl))
    assert fields["kl_bits_at_percentiles"] == {"p25": 2.0, "p50": 3.0, "p75": 4.0}
    assert fields["kl_to_final_bits_norm_temp@75%"] == {"layer": 4, "value": 4.0}


def test_tempered_divergence_only_where_it_was_measured() -> None:
    fields = kl_fields(hand_made_pass(kl_to_final_bits=[1.0, 0.0]))
    assert list(fields) == ["kl_bits_at_percentiles"]
    assert fields["kl_bits_at_percentiles"]["p75"] == pytest.approx(0.0)  # round(0.75) = 1
