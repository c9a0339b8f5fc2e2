from __future__ import annotations

from layerscope.measures.config import MeasureConfig
from layerscope.measures.surface import surface_fields, surface_milestones
from support.hand_made import hand_made_pass

CONFIG = MeasureConfig(surface_delta=0.25, geom_gamma=0.125, topk_decay_tau=0.5)


def test_thresholds_are_inclusive() -> None:
    part = hand_made_pass(
        p_answer=[0.4, 0.5, 0.75],
        echo_mass_prompt=[0.25, 0.25, 0.1],
        cos_to_answer=[0.2, 0.375, 0.1],
        cos_to_prompt_max=[0.25, 0.25, 0.25],
        topk_prompt_mass=[0.51, 0.5, 0.6],
    )
    found = surface_milestones(part, CONFIG)
    assert found["L_surface_to_meaning"].first == 1
    assert (found["L_geom"].first, found["L_geom"].lost) == (1, (2,))
    assert (found["L_topk_decay"].first, found["L_topk_decay"].stable) == (1, None)
    fields = surface_fields(part, found, CONFIG)
    assert fields["L_surface_to_meaning"] == fields["L_surface_to_meaning_norm"] == 1
    assert fields["answer_mass_at_L_surface_norm"] == 0.5
    assert fields["echo_mass_at_L_surface_norm"] == 0.25
    assert fields["cos_to_answer_at_L_geom_norm"] == 0.375
    assert fields["cos_to_prompt_max_at_L_geom_norm"] == 0.25
    assert fields["topk_prompt_mass_at_L_norm"] == 0.5
    assert fields["topk_prompt_tau_norm"] == 0.5


def test_unknown_values_never_cross() -> None:
    part = hand_made_pass("tuned", p_answer=[0.9, 0.9], echo_mass_prompt=[None, None])
    found = surface_milestones(part, CONFIG)
    assert [item.first for item in found.values()] == [None, None, None]
    fields = surface_fields(part, found, CONFIG)
    assert fields["L_geom_tuned"] is None
    assert fields["cos_to_answer_at_L_geom_tuned"] is None
