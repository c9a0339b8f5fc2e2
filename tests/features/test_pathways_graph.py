"""Attribution graphs: complete sums, linear predictions, pruning that says what it dropped."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from planted import random_dictionary
from test_pathways_discover import IDS, model_of

import layerscope
from layerscope.errors import ConfigError, DictionaryError
from layerscope.features import DictionarySet, Matrix, SparseDictionary, open_set
from layerscope.features.architectures import JumpRelu
from layerscope.features.pathways import (
    AttributionGraph,
    GraphOptions,
    Pullback,
    agreement_of,
    attribution_graph,
    check_graph,
)
from layerscope.features.pathways.graph import TranscoderGraph
from layerscope.features.pathways.held import HeldBlocks
from layerscope.models import Site
from layerscope.products import ProductChoice
from support.toys import bare_gpt2

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "gpt_neox", "phi")
WHOLE = GraphOptions(max_features=40, node_share=1.0, edge_share=1.0)


def transcoders(
    family: str, *, cross_layer: bool = False, skip: bool = False, n: int = 40
) -> DictionarySet:
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
                skip=0.3 * draw(width, width) / width**0.5 if skip else None,
            )
        )
    return DictionarySet("transcoders", made)


def residual(family: str, *, layers: tuple[int, ...] | None = None, n: int = 40) -> DictionarySet:
    """Return random dictionaries of the stream, some features active, most of it error."""
    model = model_of(family)
    made: list[SparseDictionary] = []
    for layer in range(model.n_layers) if layers is None else layers:
        generator = torch.Generator().manual_seed(layer)
        draw = torch.randn(2, n, model.d_model, generator=generator, dtype=torch.float64)
        site = Site("resid_post", layer)
        made.append(
            SparseDictionary(
                reads=site,
                writes=[site],
                encoder=Matrix.of("encoder", draw[0] / model.d_model**0.5),
                decoders=[Matrix.of("decoder", 0.3 * draw[1])],
                gate=JumpRelu(torch.full((n,), 0.1, dtype=torch.float64)),
                bias=torch.full((n,), 0.05, dtype=torch.float64),
                decoder_bias=0.1 * draw[0, 0],
                center=0.1 * draw[0, 0],
            )
        )
    return DictionarySet("residual", made)


def sums_hold(graph: AttributionGraph) -> None:
    """Assert that expanded nodes are the sums of their sources, and that influence goes nowhere."""
    assert graph.nodes.filter(pl.col("residual").is_not_null()).height > 30
    # Norms square in float32 in several families, whatever the dtype of the model.
    assert graph.summary["largest_residual"] < 1e-5
    assert sum(graph.summary["influence_ends"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "cross_layer", "skip"])
def test_every_expanded_node_is_the_sum_of_its_sources(family: str, kind: str) -> None:
    made = transcoders(family, cross_layer=kind == "cross_layer", skip=kind == "skip")
    graph = attribution_graph(model_of(family), IDS, made, WHOLE)
    sums_hold(graph)
    assert graph.summary["expanded_nodes"] > 30
    assert graph.nodes.filter(kind="feature").height >= 30
    assert graph.summary["basis"] == "transcoders"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [None, (0,)])
def test_dictionaries_of_the_stream_give_complete_graphs_too(
    family: str, layers: tuple[int, ...] | None
) -> None:
    graph = attribution_graph(model_of(family), IDS, residual(family, layers=layers), WHOLE)
    assert graph.summary["basis"] == "residual dictionaries"
    assert graph.summary["largest_residual"] < 1e-5
    assert set(graph.nodes["kind"].unique()) == {"logit", "feature", "error", "mlp", "token"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_held_map_has_no_curvature(family: str) -> None:
    """Hessian-vector products of a block with everything held vanish; of the live one they do not.

    They are taken as second differences along random directions, exact for an affine map.
    """
    builder = TranscoderGraph(model_of(family), IDS, transcoders(family), WHOLE)
    live = Pullback(builder._state(), variant="total", n_positions=builder.n)  # pyright: ignore[reportPrivateUsage]
    rows = builder.residuals[1:2]
    step = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)).to(rows)
    with torch.no_grad():
        bent = [
            float(
                (one.block(1, rows + step) - 2 * one.block(1, rows) + one.block(1, rows - step))
                .abs().max() / step.abs().max()
            )
            for one in (builder.linear, live)
        ]  # fmt: skip
    assert bent[0] < 1e-5 < 1e-3 < bent[1]


def test_a_norm_that_is_not_held_breaks_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation that completeness must notice."""

    def live(self: HeldBlocks, *given: object) -> list[object]:
        return [edit for edit in held(self, *given) if "attn_in" not in str(edit.site)]  # type: ignore[arg-type]

    held = HeldBlocks.edits
    monkeypatch.setattr(HeldBlocks, "edits", live)
    graph = attribution_graph(model_of("llama"), IDS, transcoders("llama"), WHOLE)
    assert graph.summary["largest_residual"] > 1e-3


def test_edges_predict_what_a_doubled_feature_does_when_all_else_is_held() -> None:
    """Add f d once more where a feature writes: the frozen model moves each target by its edge."""
    model, dictionaries = model_of("llama"), transcoders("llama")
    graph = attribution_graph(model, IDS, dictionaries, WHOLE)
    builder = TranscoderGraph(model, IDS, dictionaries, WHOLE)
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
                    rows = builder.linear.block(block, rows)
            # With the MLP held, the residual before it moves as the one behind it does.
            norm = builder.norm(b["layer"])
            read = dictionaries[b["layer"]].read_rows([b["feature_id"]])[0] * norm.gain
            moved = rows[0, b["position"]] @ read * norm.scale[b["position"]]
            values.append(float(moved.detach()))
        assert values[1] - values[0] == pytest.approx(weight, rel=1e-5, abs=1e-7)
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("kind", ["transcoders", "residual"])
def test_checks_predict_the_model_where_it_is_as_the_graph_holds_it(kind: str) -> None:
    """In a model without attention and norms an edge is exactly what taking its source away does.

    Block 0 adds 2 to coordinate 0, block 1 writes three times it into 1; token 3 reads both, so
    that block 0 reaches it directly and through block 1.
    """
    toy = bare_gpt2(n_layers=2, n_heads=1, d_model=8, d_mlp=2, d_vocab=8, n_ctx=4)
    toy.embed[:, 0] = 1.0
    toy.w_in(0)[0, 0], toy.w_out(0)[0, 0] = 1.0, 2.0
    toy.w_in(1)[0, 0], toy.w_out(1)[0, 1] = 1.0, 3.0
    toy.unembed[3, 0] = toy.unembed[3, 1] = 1.0
    eye = torch.eye(8, dtype=torch.float64)
    given: list[SparseDictionary] = []
    for layer in range(2):
        residual_kind = kind == "residual"
        reads = Site("resid_post" if residual_kind else "mlp_in", layer)
        # The MLP as a transcoder: what it reads of coordinate 0, times what it writes.
        write = eye if residual_kind else eye.roll(layer, 1) * (2.0 if layer == 0 else 3.0)
        given.append(
            SparseDictionary(
                reads=reads,
                writes=[reads if residual_kind else Site("mlp_out", layer)],
                encoder=Matrix.of("encoder", eye if residual_kind else eye[:1]),
                decoders=[Matrix.of("decoder", write if residual_kind else write[:1])],
                gate=JumpRelu(torch.full((8 if residual_kind else 1,), 0.1, dtype=torch.float64)),
                bias=torch.zeros(8 if residual_kind else 1, dtype=torch.float64),
                decoder_bias=torch.zeros(8, dtype=torch.float64),
            )
        )
    model, dictionaries = toy.model(), DictionarySet("toy", given)
    graph = attribution_graph(model, [[1, 2]], dictionaries, WHOLE)
    assert graph.nodes.filter(kind="logit")["feature_id"][0] == 3
    checks = check_graph(model, [[1, 2]], dictionaries, graph)
    assert checks.height > 3
    assert checks["measured"].to_list() == pytest.approx(checks["predicted"].to_list(), abs=1e-12)
    found = agreement_of(checks)
    assert found["edge"]["slope"] == pytest.approx(1.0)
    assert found["logit"]["slope"] == pytest.approx(1.0)
    assert found["logit"]["sign_agreement"] == 1.0
    if kind == "transcoders":  # by hand: 9 = 3 (1 + 2) from block 1, 8 = 2 + 3 x 2 from block 0
        effects = sorted(checks.filter(kind="logit")["measured"].to_list())
        assert effects == pytest.approx([-9.0 * (1 - 1 / 8), -8.0 * (1 - 1 / 8)])
        direct = checks.filter(kind="edge", target=0)["measured"].to_list()
        assert sorted(direct) == pytest.approx([-9.0 * (1 - 1 / 8), -2.0 * (1 - 1 / 8)])
        assert graph.summary["replacement_score"] == pytest.approx(1.0)


def test_pruning_keeps_the_share_that_was_asked_for() -> None:
    model, dictionaries = model_of("llama"), transcoders("llama")
    whole = attribution_graph(model, IDS, dictionaries, WHOLE)
    small = attribution_graph(
        model, IDS, dictionaries, GraphOptions(max_features=40, node_share=0.5, edge_share=0.9)
    )
    assert 0 < small.nodes.height < whole.nodes.height
    assert small.edges.height < whole.edges.height
    drawn = small.summary["drawn_share_of_influence"]
    assert 0 < drawn < whole.summary["drawn_share_of_influence"] <= 1.0 + 1e-9
    known = set(small.nodes["node"].to_list())
    assert set(small.edges["source"].to_list()) | set(small.edges["target"].to_list()) <= known
    assert set(small.nodes["kind"].unique()) <= {"logit", "feature", "error", "token"}
    few = attribution_graph(
        model, IDS, dictionaries, GraphOptions(max_features=40, node_share=0.9, edge_share=0.3)
    )
    for graph in (small, few):  # whatever is left leads to a logit
        sources = set(graph.edges["source"].to_list())
        assert set(graph.nodes.filter(pl.col("kind") != "logit")["node"].to_list()) == sources
    ranked = small.nodes.filter(pl.col("kind") != "logit").sort("influence", descending=True)
    assert ranked["cumulative"].is_sorted() and 0 < ranked["cumulative"][0] < 0.5


def test_the_same_request_gives_the_same_graph() -> None:
    model, dictionaries = model_of("gpt2"), transcoders("gpt2")
    first, again = (attribution_graph(model, IDS, dictionaries) for _ in range(2))
    assert first.nodes.equals(again.nodes) and first.edges.equals(again.edges)


@pytest.mark.parametrize("basis", ["transcoders", "dictionaries"])
def test_checked_products_give_the_edges_of_torch_as_found(basis: str) -> None:
    from layerscope.demo import dictionaries_path, model_path, transcoders_path

    model = layerscope.load(model_path(), device="cpu", dtype="float32")
    made = open_set(transcoders_path() if basis == "transcoders" else dictionaries_path())
    found, checked = (
        attribution_graph(
            model,
            "The capital of France is",
            made,
            GraphOptions(max_features=24, logits=1, node_share=1.0, edge_share=1.0, products=name),
        )
        for name in ("default", "checked")
    )
    assert checked.summary["products"]["requested"] == "checked"
    assert found.summary["products"]["precision"] == "unchanged"
    both = [each.edges.sort("source", "target") for each in (found, checked)]
    assert both[0].select("source", "target").equals(both[1].select("source", "target"))
    weights, others = (edges["weight"].to_numpy() for edges in both)
    assert len(weights) > 100
    # Of the largest edge: those that all but cancel have no digits of their own.
    assert abs(weights - others).max() < 1e-4 * abs(weights).max()


def test_the_sweep_runs_with_the_products_that_the_summary_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    through = TranscoderGraph.through

    def told(self: TranscoderGraph, layer: int, cotangents: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return through(self, layer, cotangents)

    def chosen(requested: str, *, device: torch.device) -> ProductChoice:
        return ProductChoice(requested, "medium", 0.0, 0.0, f"on {device}")  # pyright: ignore[reportArgumentType]  # a name

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(TranscoderGraph, "through", told)
    monkeypatch.setattr("layerscope.features.pathways.graph_base.choose", chosen)
    graph = attribution_graph(model_of("llama"), IDS, transcoders("llama"))
    assert before != "medium" and set(seen) == {"medium"}
    assert torch.get_float32_matmul_precision() == before
    assert graph.summary["products"] == {
        "requested": "checked",
        "precision": "medium",
        "max_error": 0.0,
        "reference_error": 0.0,
        "reason": "on cpu",
    }


def test_what_does_not_fit_is_refused() -> None:
    model = model_of("llama")
    wrong = random_dictionary(d=model.d_model, dtype=torch.float64, site="attn_out.1")
    with pytest.raises(DictionaryError, match=r"reads attn_out\.1"):
        attribution_graph(model, IDS, DictionarySet("r", [wrong]))
    with pytest.raises(ConfigError, match="shares"):
        GraphOptions(node_share=0.0)
    with pytest.raises(ConfigError, match="products 'fast'; use default or checked"):
        GraphOptions(products="fast")  # pyright: ignore[reportArgumentType]
