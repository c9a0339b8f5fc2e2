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
        if name == "tuned_lens":  # published with its audit
            found = {key: item for key, item in found.items() if key != "audit_summary"}
        assert found == value, name
    json.dumps(document, allow_nan=False)


def test_the_tuned_lens_in_the_published_shape() -> None:
    audit = {"status": "ok", "tuned_is_calibration_only": False, "variants": [{"layer": 1}]}
    table = synthetic_table(lenses=("raw", "norm", "tuned"))
    summary = summarise(table, diagnostics={"tuned_audit": audit}).to_dict()
    tuned = published_document(summary)["tuned_lens"]
    assert tuned["status"] == "loaded"
    assert tuned["summary"]["metrics"] == summary["tuned_lens"]["metrics"]
    assert tuned["audit_summary"] == {"status": "ok", "tuned_is_calibration_only": False}
    without = published_document(summarise(table).to_dict())
    assert without["tuned_lens"]["audit_summary"]["status"] == "skipped"
    assert without["position_window"]["status"] == "skipped"
    failed = {"position_window": {"status": "skipped", "reason": "one position"}}
    document = published_document(summarise(table, diagnostics=failed).to_dict())
    assert document["position_window"]["reason"] == "one position"


def test_checks_without_a_raw_lens_are_null() -> None:
    fields = published_fields(summarise(synthetic_table(lenses=("norm",))).to_dict())
    assert fields["raw_lens_full"] is None
    assert fields["raw_lens_window"] is None
