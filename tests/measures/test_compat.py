from __future__ import annotations

import json

from layerscope.measures.compat import published_document, published_fields
from layerscope.measures.summary import summarise
from support.tables import synthetic_table


def test_baseline_stands_at_the_top_in_published_shapes() -> None:
    summary = summarise(synthetic_table()).to_dict()
    document = published_document(summary)
    base = summary["passes"][summary["baseline"]]
    for name in ("L_copy", "L_semantic", "first_kl_below_0.5", "semantic_gate", "L_geom_norm"):
        assert document[name] == base[name]
    assert document["raw_lens_full"] == summary["raw_lens_full"]["Germany→Berlin"]
    assert document["ablation_summary"] == summary["ablation_summary"]["Germany→Berlin"]
    assert document["last_layer_consistency"] == summary["last_layer_consistency"][0]
    assert document["gold_alignment_rate"] == 1.0


def test_nothing_is_lost() -> None:
    summary = summarise(synthetic_table()).to_dict()
    document = published_document(summary)
    for name, value in summary.items():
        found = document["per_fact"].get(name, document["per_prompt"].get(name, document[name]))
        assert found == value, name
    json.dumps(document, allow_nan=False)


def test_checks_without_a_raw_lens_are_null() -> None:
    fields = published_fields(summarise(synthetic_table(lenses=("norm",))).to_dict())
    assert fields["raw_lens_full"] is None
    assert fields["raw_lens_window"] is None
