from __future__ import annotations

from layerscope.measures.normalisation import layer_map, normalisation_provenance
from layerscope.measures.rows import pass_rows
from support.tables import synthetic_table


def test_which_norm_decoded_which_row() -> None:
    part = pass_rows(synthetic_table(n_layers=3))[0, "norm"]
    found = normalisation_provenance(
        part, arch="pre_norm", strategy="final", epsilon_inside_sqrt=True, gain_used=True
    )
    assert (found["arch"], found["strategy"]) == ("pre_norm", "final")
    assert [row["layer"] for row in found["per_layer"]] == [0, 1, 2, 3]
    first = found["per_layer"][0]
    assert (first["ln_source"], first["eps_inside_sqrt"]) == ("model.norm", True)
    assert (first["resid_norm_ratio"], first["raw_resid_norm"]) == (4.0, 2.0)
    raw = pass_rows(synthetic_table(n_layers=3))[0, "raw"]
    found = normalisation_provenance(raw, arch=None, strategy={"primary": "final"})
    assert found["per_layer"][1]["ln_source"] == "raw"
    assert found["strategy"] == {"primary": "final"}


def test_which_block_a_row_follows() -> None:
    part = pass_rows(synthetic_table(n_layers=2))[0, "norm"]
    assert layer_map(part) == [
        {"layer": 0, "block": "blocks[0]", "stream": "pre_block", "norm": "model.norm"},
        {"layer": 1, "block": "blocks[0]", "stream": "post_block", "norm": "model.norm"},
        {"layer": 2, "block": "blocks[1]", "stream": "unembed_head", "norm": "model.norm"},
    ]
