from __future__ import annotations

import pytest

from layerscope.measures.health import health_caution, numeric_health
from support.hand_made import hand_made_table


def test_sound_rows() -> None:
    table = hand_made_table(
        {
            "norm": {
                "nonfinite": [False, False, False],
                "max_abs_logit": [1.0, 2.0, 3.0],
                "min_prob": [0.3, 0.2, 0.1],
            },
            "raw": {"nonfinite": [True], "max_abs_logit": [99.0], "min_prob": [0.0]},
        }
    )
    health = numeric_health(table, lens="norm")
    assert health["layers_flagged"] == []
    assert health["any_nonfinite"] is False
    assert health["checked"] is True
    assert health["max_abs_logit_p99"] == pytest.approx(2.98)
    assert health["min_prob_p01"] == pytest.approx(0.102)


def test_flagged_rows_and_values_that_are_not_numbers() -> None:
    table = hand_made_table(
        {
            "norm": {
                "nonfinite": [False, True, True],
                "max_abs_logit": [5.0, float("nan"), None],
                "min_prob": [None] * 3,
            }
        }
    )
    health = numeric_health(table, lens="norm")
    assert health["layers_flagged"] == [1, 2]
    assert health["max_abs_logit_p99"] == 5.0
    assert health["min_prob_p01"] is None


def test_a_table_without_the_columns_was_not_checked() -> None:
    table = hand_made_table({"norm": {"p_top1": [0.5]}})
    assert numeric_health(table, lens="norm")["checked"] is False


@pytest.mark.parametrize(
    ("flagged", "copy", "semantic", "caution"),
    [
        ([5], None, 5, True),
        ([6], None, 5, False),
        ([3], 4, None, True),
        ([6], 7, 5, True),
        ([31], None, None, True),
        ([], None, None, False),
        ([0], 0, None, True),
    ],
)
def test_caution_before_a_milestone(
    flagged: list[int], copy: int | None, semantic: int | None, caution: bool
) -> None:
    health = {"layers_flagged": flagged}
    assert health_caution(health, copy=copy, semantic=semantic) is caution
