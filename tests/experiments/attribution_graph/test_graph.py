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
from layerscope.models import Site
from support.tiny_models import tiny, tiny_tokenizer

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
    shown = json.loads((folder / "graph.json").read_text())
    assert len(shown["nodes"]) == nodes.height
    assert len(shown["links"]) == edges.height
    names = {node["node_id"] for node in shown["nodes"]}
    assert len(names) == nodes.height
    assert {link["source"] for link in shown["links"]} <= names
    assert "attribution graph" in (folder / "report.html").read_text()


def test_dictionaries_of_the_residual_stream_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = SparseDictionary(
        reads=Site("resid_post", 0),
        writes=[Site("resid_post", 0)],
        encoder=Matrix.of("encoder", torch.randn(8, 32)),
        decoders=[Matrix.of("decoder", torch.randn(8, 32))],
        gate=JumpRelu(torch.full((8,), 0.3)),
        bias=torch.zeros(8),
        decoder_bias=torch.zeros(32),
    )
    write_dictionary(made, tmp_path / "residual")
    code = run(
        [
            "graph",
            str(place / "model"),
            "--transcoders",
            str(tmp_path / "residual"),
            "--prompt",
            PROMPT,
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 2
    assert "mlp_in to mlp_out" in capsys.readouterr().err


def test_an_incomplete_graph_says_so() -> None:
    summary = {
        "gates": {"complete": False},
        "largest_residual": 0.2,
        "drawn_share_of_attribution": 0.3,
    }
    assert [reason["severity"] for reason in reasons(summary)] == ["high", "medium", "low"]
