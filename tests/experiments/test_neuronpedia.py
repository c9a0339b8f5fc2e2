"""The viewers' JSON, field by field, as their own models and schema declare it."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from layerscope.errors import OutputError
from layerscope.experiments.neuronpedia import ViewerNode, paired, slug, viewer_file
from layerscope.experiments.pathways.neuronpedia import viewer_graph
from support.viewer_files import check_viewer_file


def nodes() -> list[ViewerNode]:
    return [
        ViewerNode(kind="logit", layer=4, position=2, index=9, label=" a", probability=0.75),
        ViewerNode(kind="feature", layer=0, position=2, index=1, activation=2.0, influence=0.4),
        ViewerNode(kind="feature", layer=3, position=1, index=70, activation=1.0, influence=0.8),
        ViewerNode(kind="error", layer=1, position=1, influence=0.9),
        ViewerNode(kind="mlp", layer=1, position=1, influence=0.95),
        ViewerNode(kind="token", layer=-1, position=0, index=5, influence=1.0),
        ViewerNode(kind="token", layer=-1, position=1, index=5, influence=1.0),
    ]


def made(given: list[ViewerNode], **more: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "name": "A b: c!", "scan": "demo", "n_layers": 4, "prompt": "x y", "node_share": 0.8,
        "tokens": ["<s>", "x", " y"],
    }  # fmt: skip
    return viewer_file(given, [(1, 0, 1.5), (5, 1, -0.25)], **{**arguments, **more})


def test_every_field_is_what_the_viewers_declare() -> None:
    graph = made(nodes())
    check_viewer_file(graph)
    assert graph["metadata"]["slug"] == "demo-a-b-c"
    assert [node["node_id"] for node in graph["nodes"]] == [
        "5_9_2", "0_1_2", "3_70_1", "1_-1_1", "1_-2_1", "E_5_0", "E_5_1",
    ]  # fmt: skip
    assert [node["is_target_logit"] for node in graph["nodes"]] == [True, *[False] * 6]
    assert graph["nodes"][0]["clerp"] == 'Output " a" (p=0.750)'
    assert graph["links"][1] == {"source": "E_5_0", "target": "0_1_2", "weight": -0.25}
    # A threshold that is null would be no number.
    assert "node_threshold" not in made(nodes(), node_share=None)["metadata"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("feature", None), ("clerp", '" a"'), ("node_id", "0_1_1"), ("ctx_idx", 3), ("layer", 5)],
)
def test_the_check_can_fail(name: str, value: Any) -> None:
    graph = made(nodes())
    graph["nodes"][0][name] = value
    with pytest.raises((AssertionError, IndexError, KeyError, AttributeError, ValueError)):
        check_viewer_file(graph)


def test_what_no_viewer_could_show_is_refused() -> None:
    with pytest.raises(OutputError, match="called 0_1_2"):
        made([*nodes(), nodes()[1]])
    with pytest.raises(OutputError, match="position 7"):
        made([*nodes(), ViewerNode(kind="error", layer=0, position=7)])
    assert slug("x" * 80) == "x" * 60 and slug("--A--") == "a"
    assert [paired(0, 0), paired(0, 1), paired(1, 0), paired(2, 3)] == [0, 2, 1, 18]


def test_pathways_use_the_same_writer() -> None:
    edges = pl.DataFrame(
        {
            "prompt_id": ["p", "p", "q"], "verdict": ["confirmed", "refuted", "confirmed"],
            "source_layer": [0, 0, 0], "source_id": [3, 4, 3], "source_position": [1, 1, 1],
            "source_activation": [2.0, 1.0, 2.0], "target_layer": [2, 2, 2],
            "target_id": [7, 7, 7], "target_position": [2, 2, 2],
            "target_activation": [1.0, 1.0, 1.0], "attribution": [0.5, 9.0, 0.5],
            "variant": ["total"] * 3, "error_mode": ["passthrough"] * 3,
        }
    )  # fmt: skip
    graph = viewer_graph(
        edges, prompt_id="p", prompt="x y", tokens=["<s>", "x", " y"], scan="demo",
        labels={(0, 3): "nice"},
    )  # fmt: skip
    check_viewer_file(graph)
    assert [node["node_id"] for node in graph["nodes"]] == ["0_3_1", "2_7_2"]
    assert [node["clerp"] for node in graph["nodes"]] == ["nice", ""]
    assert graph["links"] == [{"source": "0_3_1", "target": "2_7_2", "weight": 0.5}]
