"""Attribution graphs: complete sums, linear predictions, pruning that says what it dropped."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from planted import random_dictionary
from test_pathways_discover import IDS, model_of

from layerscope.errors import ConfigError, DictionaryError
from layerscope.features import DictionarySet, Matrix, SparseDictionary
from layerscope.features.architectures import JumpRelu
from layerscope.features.pathways import GraphOptions, attribution_graph
from layerscope.models import Site

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "gpt_neox", "phi")
WHOLE = GraphOptions(max_features=40, node_share=1.0, edge_share=1.0)


def transcoders(family: str, *, cross_layer: bool = False, n: int = 40) -> DictionarySet:
    model = model_of(family)
    made: list[SparseDictionary] = []
    for layer in range(model.n_layers):
        generator = torch.Generator().manual_seed(layer)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        last = model.n_layers if cross_layer else layer + 1
        width = model.d_model
        made.append(
            SparseDictionary(
                reads=Site("mlp_in", layer),
                writes=[Site("mlp_out", to) for to in range(layer, last)],
                encoder=Matrix.of("encoder", draw(n, width) / width**0.5),
                decoders=[
                    Matrix.of(f"decoder {to}", 0.3 * draw(n, width)) for to in range(layer, last)
                ],
                gate=JumpRelu(0.5 * draw(n).abs()),
                bias=0.1 * draw(n),
                decoder_bias=0.1 * draw(width),
            )
        )
    return DictionarySet("transcoders", made)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cross_layer", [False, True])
def test_every_expanded_node_is_the_sum_of_its_sources(family: str, cross_layer: bool) -> None:
    graph = attribution_graph(
        model_of(family), IDS, transcoders(family, cross_layer=cross_layer), WHOLE
    )
    assert graph.summary["expanded_nodes"] > 30
    assert graph.nodes.filter(kind="feature").height >= 30
    # Norms square in float32 in several families, whatever the dtype of the model.
    assert graph.summary["largest_residual"] < 1e-5


def test_a_norm_that_is_not_held_breaks_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that completeness must notice."""
    from layerscope.features.pathways.pullback import Pullback

    def live(self: Pullback, block: int, below: torch.Tensor) -> list[object]:
        return [edit for edit in frozen(self, block, below) if "attn_in" not in str(edit.site)]

    frozen = Pullback._frozen  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(Pullback, "_frozen", live)
    graph = attribution_graph(model_of("llama"), IDS, transcoders("llama"), WHOLE)
    assert graph.summary["largest_residual"] > 1e-3


def test_edges_predict_what_a_doubled_feature_does_when_all_else_is_held() -> None:
    """Add f d once more where a feature writes: the frozen model moves each target by its edge."""
    from layerscope.features.pathways.graph import _Builder  # pyright: ignore[reportPrivateUsage]

    model, dictionaries = model_of("llama"), transcoders("llama")
    graph = attribution_graph(model, IDS, dictionaries, WHOLE)
    builder = _Builder(model, IDS, dictionaries, WHOLE)
    names = {row["node"]: row for row in graph.nodes.iter_rows(named=True)}
    checked = 0
    for source, target, weight in graph.edges.iter_rows():
        a, b = names[source], names[target]
        if a["kind"] != "feature" or b["kind"] != "feature" or checked >= 25:
            continue
        dictionary = dictionaries[a["layer"]]
        change = a["activation"] * dictionary.write_directions([a["feature_id"]])[0]
        values: list[float] = []
        for doubled in (False, True):
            rows = builder.residuals[a["layer"] + 1][None].clone()
            if doubled:
                rows[0, a["position"]] += change
            with torch.no_grad():
                for block in range(a["layer"] + 1, b["layer"] + 1):
                    rows = builder.pullback.block(block, rows)
            # With the MLP held, the residual before it moves as the one behind it does.
            norm = builder.pullback.mlp_norm(b["layer"])
            read = dictionaries[b["layer"]].read_rows([b["feature_id"]])[0] * norm.gain
            moved = rows[0, b["position"]] @ read * norm.scale[b["position"]]
            values.append(float(moved.detach()))
        assert values[1] - values[0] == pytest.approx(weight, rel=1e-5, abs=1e-7)
        checked += 1
    assert checked >= 20


def test_pruning_keeps_the_share_that_was_asked_for() -> None:
    model, dictionaries = model_of("llama"), transcoders("llama")
    whole = attribution_graph(model, IDS, dictionaries, WHOLE)
    small = attribution_graph(
        model, IDS, dictionaries, GraphOptions(max_features=40, node_share=0.5, edge_share=0.9)
    )
    assert 0 < small.nodes.height < whole.nodes.height
    assert small.edges.height < whole.edges.height
    drawn = small.summary["drawn_share_of_attribution"]
    assert 0 < drawn < whole.summary["drawn_share_of_attribution"] <= 1.0 + 1e-9
    known = set(small.nodes["node"].to_list())
    assert set(small.edges["source"].to_list()) | set(small.edges["target"].to_list()) <= known
    assert set(small.nodes.filter(pl.col("kind") != "logit")["kind"].unique()) <= {
        "feature",
        "error",
        "token",
    }


def test_the_same_request_gives_the_same_graph() -> None:
    model, dictionaries = model_of("gpt2"), transcoders("gpt2")
    first, again = (attribution_graph(model, IDS, dictionaries) for _ in range(2))
    assert first.nodes.equals(again.nodes) and first.edges.equals(again.edges)


def test_what_does_not_fit_is_refused() -> None:
    model = model_of("llama")
    residual = DictionarySet("r", [random_dictionary(d=model.d_model, dtype=torch.float64)])
    with pytest.raises(DictionaryError, match="mlp_in to mlp_out"):
        attribution_graph(model, IDS, residual)
    with pytest.raises(ConfigError, match="shares"):
        GraphOptions(node_share=0.0)
