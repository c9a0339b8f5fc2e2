"""The page of a pathways run: what is there is shown, what was not run is left out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from layerscope.experiments.pathways.results import Results
from layerscope.reports.pathways import write_pathways

EVIL = "</script><script>alert(1)</script>"


def edges() -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for source, (actual, verdict) in enumerate(
        ((-2.1, "confirmed"), (-9.0, "nonlinear"), (0.4, "refuted"))
    ):
        rows.append(
            {
                "prompt_id": "p0", "source_layer": 0, "source_id": source, "source_position": 3,
                "source_token": EVIL, "target_layer": 2, "target_id": 7, "target_position": 5,
                "attribution": 2.0 + source, "share": 0.1, "predicted": -2.0 - source,
                "actual": actual, "ratio": actual / (-2.0 - source), "null_quantile": 0.5,
                "q": 0.01, "verdict": verdict,
            }
        )  # fmt: skip
    return pl.DataFrame(rows)


def results(folder: Path) -> Results:
    agreement = {
        "n": 3, "sign_agreement": 2 / 3, "sign_agreement_interval": [0.2, 0.94], "pearson": 0.5,
        "spearman": 0.5, "slope": 1.0, "intercept": 0.0, "slope_interval": None,
    }  # fmt: skip
    nodes = [
        {
            "id": name, "layer": layer, "feature_id": number, "selected": layer == 2,
            "cohen_d": 1.0, "side": "safe", "strength_in": 1.0, "strength_out": 1.0,
            "influence": 1.0, "community": 0,
        }
        for name, layer, number in (("L0-0", 0, 0), ("L2-7", 2, 7))
    ]  # fmt: skip
    link = {
        "source": "L0-0", "target": "L2-7", "weight": 2.0, "actual": -2.1, "verdict": "confirmed",
        "nonlinear": False, "n_prompts": 1, "sign_consistency": 1.0, "single_prompt": True,
    }  # fmt: skip
    audit = {
        "validated": True, "errors": [], "inputs": {"checkpoint_L0.json": "abc"},
        "warnings": [
            {"code": "few", "message": "few trials", "count": 4, "examples": [{"file": EVIL}]}
        ],
        "checkpoints": {"records": 4, "unique_features": 4, "causal_features": 2,
                        "causal_by_layer": {"2": 2}},
        "responses": {"records": 12, "parse_rate": 1.0, "unique_share": 0.5,
                      "conditions": {"safe_baseline": 12}},
        "join": {"coverage_of_causal": 1.0},
    }  # fmt: skip
    tokens = pl.DataFrame(
        {"layer": [0], "feature_id": [0], "corpus": ["prompts"], "token": [EVIL], "n": [12],
         "mean": [1.0], "lift": [2.0], "pmi": [1.0], "logodds_z": [3.0], "p": [0.001], "q": [0.01]}
    )  # fmt: skip
    replay = {
        "edges": 3, "verdicts": {"confirmed": 1, "nonlinear": 1, "refuted": 1},
        "agreement": agreement, "agreement_by_dose": {"0": agreement},
        "agreement_by_layer_distance": {"2": agreement}, "above_random_null": 2 / 3,
    }  # fmt: skip
    return Results(
        folder=folder,
        run={"config": {"model": "models/toy"}, "stages": {"audit": {"seconds": 0.1}}},
        audit=audit,
        causal={"selected": 1, "per_layer": {"2": 1}},
        prompts={"prompts": [{"id": "p0", "text": "x"}]},
        prototype=None,
        edges=edges(),
        doses=None,
        pathways=None,
        replay=replay,
        tokens=tokens,
        token_notes=None,
        figures=None,
        graph={"nodes": nodes, "edges": [link]},
        summary=None,
    )


def test_graph_edges_scatter_and_audit_are_on_the_page(tmp_path: Path) -> None:
    page = write_pathways(results(tmp_path), tmp_path / "page.html").read_text("utf-8")
    assert "replay confirmed 1, found 1 nonlinear and refuted 1" in page
    assert "(20.0% to 94.0%)" in page
    assert "few trials (4); first: file" in page
    assert "random null, 95%" in page and "Predicted against replayed" in page
    block = re.search(
        r'<script type="application/json" id="pathway-graph">(.*?)</script>', page, re.S
    )
    assert block is not None
    data = json.loads(block[1])
    assert data["edges"][0]["verdict"] == "confirmed"
    assert data["nodes"][0]["tokens"] == [EVIL] and data["nodes"][1]["tokens"] == []
    assert "alert(1)</script>" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


def test_what_was_not_run_is_left_out(tmp_path: Path) -> None:
    whole = results(tmp_path)
    early = replace(whole, edges=None, replay=None, graph=None, tokens=None, causal=None)
    page = write_pathways(early, tmp_path / "early.html").read_text("utf-8")
    assert "No edge has been replayed yet" in page
    assert "pathway-graph" not in page and "Predicted against replayed" not in page
    assert whole.audit is not None
    failed = {**whole.audit, "validated": False, "errors": whole.audit["warnings"]}
    page = write_pathways(replace(early, audit=failed), tmp_path / "f.html").read_text("utf-8")
    assert "The audit failed with 4 errors" in page
