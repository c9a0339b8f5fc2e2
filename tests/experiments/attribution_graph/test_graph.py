"""The graph command: files, page, resume, and what it says when something does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from layerscope.cli.app import run
from layerscope.experiments.attribution_graph.run import reasons
from layerscope.features import Matrix, SparseDictionary, write_dictionary
from layerscope.features.architectures import JumpRelu
from layerscope.files import canonical_json, sha256_text
from layerscope.models import Site
from support.tiny_models import tiny, tiny_tokenizer
from support.viewer_files import check_viewer_file

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph")
    model = tiny("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    width = model.config.hidden_size
    for layer in range(model.config.num_hidden_layers):
        generator = torch.Generator().manual_seed(layer)
        made = SparseDictionary(
            reads=Site("mlp_in", layer),
            writes=[Site("mlp_out", layer)],
            encoder=Matrix.of("encoder", torch.randn(40, width, generator=generator) / width**0.5),
            decoders=[Matrix.of("decoder", 0.3 * torch.randn(40, width, generator=generator))],
            gate=JumpRelu(torch.full((40,), 0.3)),
            bias=torch.zeros(40),
            decoder_bias=0.1 * torch.randn(width, generator=generator),
        )
        write_dictionary(made, folder / "transcoders" / f"mlp.{layer}")
    return folder


def graph(place: Path, out: Path, *more: str) -> int:
    return run(
        [
            "graph",
            str(place / "model"),
            "--transcoders",
            str(place / "transcoders"),
            "--prompt",
            PROMPT,
            "--out",
            str(out),
            *more,
        ]
    )


def test_a_graph_is_made_kept_and_shown(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graph(place, tmp_path) == 0
    said = capsys.readouterr().out
    assert "largest residual" in said
    folder = tmp_path / "run-latest"
    nodes, edges = (pl.read_parquet(folder / f"{name}.parquet") for name in ("nodes", "edges"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["gates"]["complete"]
    assert summary["largest_residual"] < 1e-4
    provenance = json.loads((folder / "provenance.json").read_text())
    ids = [summary["prompt_ids"]]
    assert provenance["tokens_sha256"] == sha256_text(canonical_json(ids))
    assert summary["products"]["requested"] == "checked"
    shown = json.loads((folder / "graph.json").read_text())
    assert shown["metadata"]["generation_settings"]["products"] == summary["products"]["precision"]
    assert len(shown["nodes"]) == nodes.height
    assert len(shown["links"]) == edges.height
    check_viewer_file(shown)
    checks = pl.read_parquet(folder / "checks.parquet")
    assert set(checks["kind"]) == {"edge", "logit"} and summary["checks"]["edge"]["n"] > 0
    page = (folder / "report.html").read_text()
    assert "attribution graph" in page and "The graph against the model" in page
    data = page.split('id="attribution-graph">')[1].split("</script>")[0]
    drawn = json.loads(data)
    assert len(drawn["nodes"]) == nodes.height and len(drawn["edges"]) == edges.height
    # What flows into the nodes is what they pass on: shares of every target sum to one.
    sums = pl.DataFrame(drawn["edges"]).group_by("target").agg(pl.col("share").sum())
    assert all(share == pytest.approx(1.0) for share in sums["share"])


@pytest.fixture(scope="module")
def residual(place: Path) -> Path:
    for layer in range(3):
        generator = torch.Generator().manual_seed(layer)
        site = Site("resid_post", layer)
        made = SparseDictionary(
            reads=site,
            writes=[site],
            encoder=Matrix.of("encoder", torch.randn(24, 32, generator=generator) / 32**0.5),
            decoders=[Matrix.of("decoder", torch.randn(24, 32, generator=generator))],
            gate=JumpRelu(torch.full((24,), 0.05)),
            bias=torch.full((24,), 0.02),
            decoder_bias=torch.zeros(32),
        )
        write_dictionary(made, place / "residual" / f"resid_post.{layer}")
    return place / "residual"


def test_dictionaries_of_the_residual_stream_make_graphs_too(
    place: Path, residual: Path, tmp_path: Path
) -> None:
    code = graph(place, tmp_path, "--dictionaries", str(residual), "--layer", "0", "--layer", "1")
    assert code == 0
    summary = json.loads((tmp_path / "run-latest" / "summary.json").read_text())
    assert summary["basis"] == "residual dictionaries" and summary["gates"]["complete"]
    nodes = pl.read_parquet(tmp_path / "run-latest" / "nodes.parquet")
    assert set(nodes.filter(kind="feature")["layer"].unique()) == {0, 1}
    check_viewer_file(json.loads((tmp_path / "run-latest" / "graph.json").read_text()))


def test_dictionaries_of_another_site_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = SparseDictionary(
        reads=Site("attn_out", 0),
        writes=[Site("attn_out", 0)],
        encoder=Matrix.of("encoder", torch.randn(8, 32)),
        decoders=[Matrix.of("decoder", torch.randn(8, 32))],
        gate=JumpRelu(torch.full((8,), 0.3)),
        bias=torch.zeros(8),
        decoder_bias=torch.zeros(32),
    )
    write_dictionary(made, tmp_path / "other")
    assert graph(place, tmp_path / "out", "--dictionaries", str(tmp_path / "other")) == 2
    assert "mlp_in to mlp_out" in capsys.readouterr().err
    assert run(["graph", str(place / "model"), "--prompt", PROMPT, "--out", str(tmp_path)]) == 2
    assert "give --dictionaries" in capsys.readouterr().err


def test_a_graph_that_should_not_be_believed_says_so() -> None:
    summary = {
        "gates": {"complete": False, "edges_agree": False},
        "largest_residual": 0.2,
        "drawn_share_of_influence": 0.3,
        "replacement_score": 0.2,
        "influence_ends": {"tokens": 0.1, "errors": 0.7, "mlp": 0.0, "features": 0.1, "biases": 0},
        "checks": {
            "edge": {"n": 9, "sign_agreement": 0.4, "slope": 0.1},
            "logit": {"n": 4, "sign_agreement": 0.5, "slope": 0.1},
        },
    }
    found = [reason["severity"] for reason in reasons(summary)]
    assert found == ["high", "high", "medium", "medium", "medium", "low"]
