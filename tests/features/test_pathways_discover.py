"""Edges by gradient: against autograd pair by pair, finite differences, and sums that must hold."""

from __future__ import annotations

from functools import cache

import polars as pl
import pytest
import torch
from planted import random_dictionary
from torch import Tensor

import layerscope
from layerscope.errors import CapabilityError, ConfigError, DictionaryError, PromptError
from layerscope.features import DictionarySet, SparseDictionary
from layerscope.features.pathways import DiscoverOptions, PromptState, Pullback, Target, discover
from layerscope.features.pathways.discover import project
from layerscope.models import Add, Apply, LanguageModel
from support.tiny_models import tiny, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "gpt_neox")
IDS = [[1, 17, 40, 5, 300, 251, 8]]


@cache
def model_of(family: str) -> LanguageModel:
    model = tiny(family, dtype=torch.float64)
    return layerscope.load(model, tokenizer=tiny_tokenizer(), dtype="float64")


@cache
def dictionaries_of(family: str) -> DictionarySet:
    model = model_of(family)
    made = [
        random_dictionary(
            n=48, d=model.d_model, site=f"resid_post.{layer}", seed=layer, dtype=torch.float64
        )
        for layer in range(model.n_layers)
    ]
    return DictionarySet("random", made)


def state_of(family: str, n_targets: int = 4, *, position: int = -1) -> PromptState:
    model, dictionaries = model_of(family), dictionaries_of(family)
    top = model.n_layers - 1
    targets = [Target(dictionaries.space.id(top, 7 * i), position) for i in range(n_targets - 1)]
    targets.append(Target(dictionaries.space.id(top - 1, 3), position))
    return PromptState.of(model, IDS, dictionaries, targets, keep_reads=True)


def everything(**options: object) -> DiscoverOptions:
    return DiscoverOptions(top_k=10**6, **options)  # type: ignore[arg-type]


def by_autograd(state: PromptState, edges: pl.DataFrame) -> Tensor:
    """J of every edge from the whole model's graph, one pair at a time."""
    model = state.model
    sites = [f"resid_post.{layer}" for layer in range(model.n_layers)]
    run = model.run(state.batch, capture=sites, logits=None, gradients=True)
    targets = {(t.target.feature.layer, t.target.feature.feature_id): t for t in state.targets}
    found: list[float] = []
    for edge in edges.iter_rows(named=True):
        target = targets[edge["target_layer"], edge["target_id"]]
        above = run[sites[edge["target_layer"]]][0, edge["target_position"]] @ target.read
        below = run[sites[edge["source_layer"]]]
        gradient = torch.autograd.grad(above, below, retain_graph=True)[0]
        layer = state.layers[edge["source_layer"]]
        direction = layer.directions[(layer.unique == edge["source_id"]).nonzero()[0, 0]]
        found.append(float(gradient[0, edge["source_position"]] @ direction))
    return torch.tensor(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_equals_autograd_pair_by_pair(family: str) -> None:
    state = state_of(family)
    edges = discover(state, everything())
    assert edges.height > 100
    sample = edges.sample(60, seed=0)
    expected = by_autograd(state, sample)
    torch.testing.assert_close(
        torch.tensor(sample["gradient"].to_list()), expected, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("family", (*FAMILIES, "gemma3", "gpt_neox_sequential", "gptj"))
def test_one_row_alone_is_pulled_back_as_it_is_among_zeros(family: str) -> None:
    """A target's first block in pieces against its whole backward pass, several per position."""
    state = state_of(family)
    pullback = Pullback(state, n_positions=state.n_positions, chunk=2)
    ways = _remembered(pullback)
    block = state.model.n_layers - 1
    positions = [6, 2, 6, 0, 4, 6, 6, 5, 1]  # more of them than the prompt has tokens
    generator = torch.Generator().manual_seed(3)
    reads = torch.randn(9, state.model.d_model, generator=generator, dtype=torch.float64)
    above = torch.randn(3, 7, state.model.d_model, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(9, 7, state.model.d_model, dtype=torch.float64)
    zeros[torch.arange(9), positions] = reads
    expected = pullback.through(block, torch.cat([above, zeros]))
    assert ways == []
    found = pullback.through(block, above, reads, positions)
    assert ways == [True]
    # Norms of transformers compute in float32, whatever the model does.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_that_see_each_other_are_not_taken_alone() -> None:
    model = tiny("llama", dtype=torch.float64)
    for block in model.model.layers:
        block.mlp.register_forward_hook(_mix_positions)
    made = layerscope.load(model, tokenizer=tiny_tokenizer(), dtype="float64")
    dictionaries = dictionaries_of("llama")
    targets = [Target(dictionaries.space.id(made.n_layers - 1, feature)) for feature in (3, 11)]
    state = PromptState.of(made, IDS, dictionaries, targets)
    pullback = Pullback(state, n_positions=state.n_positions)
    ways = _remembered(pullback)
    reads = torch.stack([target.read for target in state.targets])
    pullback.through(made.n_layers - 1, reads.new_zeros(0, 7, made.d_model), reads, [6, 6])
    assert ways == [False]
    edges = discover(state, everything())
    sample = edges.sample(30, seed=0)
    torch.testing.assert_close(
        torch.tensor(sample["gradient"].to_list()), by_autograd(state, sample), rtol=1e-5, atol=1e-9
    )


def _mix_positions(_module: object, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + given[0].cumsum(1)


def _remembered(pullback: Pullback) -> list[bool]:
    """Return a list that gets, for every attempt to take rows alone, whether it was made."""
    ways: list[bool] = []
    alone = pullback._alone  # pyright: ignore[reportPrivateUsage]

    def attempt(*given: object) -> object:
        found = alone(*given)  # type: ignore[arg-type]
        ways.append(found is not None)
        return found

    pullback._alone = attempt  # type: ignore[method-assign] # pyright: ignore
    return ways


def test_every_active_feature_up_to_the_target_is_a_candidate() -> None:
    state = state_of("llama", position=4)
    edges = discover(state, everything())
    target = edges["target_layer"].max()
    mine = edges.filter((pl.col("target_layer") == target) & (pl.col("target_id") == 0))
    expected = sum(
        int((layer.positions <= 4).sum())
        for layer in state.layers.values()
        if layer.layer < target  # type: ignore[operator]
    )
    assert mine.height == expected
    assert mine["source_position"].max() == 4
    assert mine["share"].sum() == pytest.approx(1.0)
    assert mine["rank"].to_list() == list(range(1, expected + 1))
    assert mine["attribution"].abs().is_sorted(descending=True)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_size_of_a_backward_pass_changes_nothing(chunk: int) -> None:
    state = state_of("llama")
    expected = discover(state, DiscoverOptions(chunk=3))
    found = discover(state, DiscoverOptions(chunk=chunk))
    assert found.drop("gradient", "attribution", "share").equals(
        expected.drop("gradient", "attribution", "share")
    )
    for column in ("gradient", "attribution"):
        torch.testing.assert_close(
            torch.tensor(found[column]), torch.tensor(expected[column]), rtol=1e-9, atol=1e-12
        )


def test_one_target_alone_has_the_edges_that_it_has_among_others() -> None:
    together = discover(state_of("llama"))
    model, dictionaries = model_of("llama"), dictionaries_of("llama")
    target = Target(dictionaries.space.id(model.n_layers - 1, 7))
    alone = discover(PromptState.of(model, IDS, dictionaries, [target]))
    mine = together.filter(
        (pl.col("target_id") == 7) & (pl.col("target_layer") == model.n_layers - 1)
    )
    assert alone.select("source_layer", "source_id", "source_position").equals(
        mine.select("source_layer", "source_id", "source_position")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_variant_adds_up_to_the_pre_activation(family: str) -> None:
    """z - b = g h at any row, plus what constant parts write above it."""
    model = model_of(family)
    state = state_of(family, 2)
    target = state.targets[0]
    pullback = Pullback(state, variant="linear", n_positions=state.n_positions)
    gradient = torch.zeros(1, *state.residuals.shape[1:], dtype=torch.float64)
    gradient[0, target.target.position] = target.read
    constant = torch.zeros((), dtype=torch.float64)
    for block in range(target.row - 1, 0, -1):
        written = _constant(state, pullback, block)
        constant += (gradient[0] * written.detach()).sum()
        gradient = pullback.through(block, gradient)
        total = (gradient[0] * state.residuals[block]).sum() + constant + target.bias
        assert float(total) == pytest.approx(target.pre_activation, rel=1e-6, abs=1e-8)
    layer = state.layers[0]
    parts = project(layer, gradient)[0] @ layer.values
    rest = state.residuals[layer.row] - _reconstruction(family, state, 0)
    total = parts + (gradient[0] * (layer.written_bias + rest)).sum() + constant + target.bias
    assert float(total) == pytest.approx(target.pre_activation, rel=1e-6, abs=1e-8)
    assert model.n_layers > 1


def _constant(state: PromptState, pullback: Pullback, block: int) -> Tensor:
    """What a block writes whatever it reads: the biases of its attention, and its MLP, held."""
    with torch.no_grad():
        return pullback.block(block, torch.zeros_like(state.residuals[block : block + 1]))[0]


def _reconstruction(family: str, state: PromptState, layer: int) -> Tensor:
    dictionary: SparseDictionary = dictionaries_of(family)[layer]
    return dictionary.reconstruct(state.residuals[state.layers[layer].row])


def test_gradients_through_features_alone_equal_a_splice_with_errors_held() -> None:
    state = state_of("llama")
    dictionaries = dictionaries_of("llama")
    edges = discover(state, everything(error="frozen")).filter(pl.col("source_layer") == 0)
    target = state.targets[0]
    seen: dict[int, Tensor] = {}

    def splice(layer: int):
        def act(values: Tensor, _context: object) -> Tensor:
            if layer == 0:
                seen[0] = values.detach().clone().requires_grad_(True)
                return seen[0]
            made = dictionaries[layer].reconstruct(values)
            return made + (values - made).detach()

        return act

    sites = [f"resid_post.{layer}" for layer in range(state.model.n_layers)]
    run = state.model.run(
        state.batch,
        capture=sites[-1],
        edits=[Apply(site, splice(layer)) for layer, site in enumerate(sites[:-1])],
        logits=None,
        gradients=True,
    )
    above = run[sites[-1]][0, target.target.position] @ target.read
    gradient = torch.autograd.grad(above, seen[0])[0]
    mine = edges.filter((pl.col("target_id") == 0) & (pl.col("target_layer") == len(sites) - 1))
    layer = state.layers[0]
    for edge in mine.iter_rows(named=True):
        direction = layer.directions[(layer.unique == edge["source_id"]).nonzero()[0, 0]]
        expected = float(gradient[0, edge["source_position"]] @ direction)
        assert edge["gradient"] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_and_total_differ_and_frozen_norms_stay_frozen(family: str) -> None:
    state = state_of(family)
    total, frozen = (
        discover(state, everything(variant=variant)).sort(
            "target_layer", "target_id", "source_layer", "source_id", "source_position"
        )
        for variant in ("total", "frozen")
    )
    difference = (total["gradient"] - frozen["gradient"]).abs().max()
    assert difference > 1e-3 * total["gradient"].abs().max()  # type: ignore[operator]


def test_a_norm_behind_the_mlp_is_not_said_to_be_held() -> None:
    state = state_of("gemma2")
    with pytest.raises(CapabilityError, match="norm behind the MLP"):
        discover(state, DiscoverOptions(variant="frozen"))
    assert discover(state, DiscoverOptions(variant="linear")).height


def test_central_differences_agree_with_the_gradient() -> None:
    state = state_of("llama")
    edges = discover(state, DiscoverOptions(top_k=8))
    ratios: list[float] = []
    for edge in edges.head(8).iter_rows(named=True):
        layer = state.layers[edge["source_layer"]]
        direction = layer.directions[(layer.unique == edge["source_id"]).nonzero()[0, 0]]
        step = 0.01 * edge["source_activation"]
        values = []
        for sign in (1.0, -1.0):
            site = f"resid_post.{edge['source_layer']}"
            edit = Add(site, sign * step * direction, positions=edge["source_position"])
            at = f"resid_post.{edge['target_layer']}"
            run = state.model.run(state.batch, capture=at, edits=[edit], logits=None)
            read = next(
                t.read
                for t in state.targets
                if t.target.feature.feature_id == edge["target_id"]
                and t.target.feature.layer == edge["target_layer"]
            )
            values.append(float(run[at][0, edge["target_position"]] @ read))
        ratios.append((values[0] - values[1]) / (2 * step) / edge["gradient"])
    errors = torch.tensor(ratios).sub(1).abs()
    assert float(errors.median()) < 1e-3
    assert float(errors.max()) < 1e-2


def test_sources_at_the_targets_own_position_only() -> None:
    edges = discover(state_of("llama", position=3), everything(positions="last"))
    assert edges["source_position"].unique().to_list() == [3]


def test_a_baseline_prompt_is_what_attributions_start_from() -> None:
    state = state_of("llama")
    same = discover(state, everything(), baseline=state)
    assert same["attribution"].abs().max() == 0.0
    assert same["gradient"].abs().max() > 0.0  # type: ignore[operator]


def test_what_is_not_asked_right_is_refused() -> None:
    model, dictionaries = model_of("llama"), dictionaries_of("llama")
    empty = PromptState.of(model, IDS, dictionaries)
    with pytest.raises(ConfigError, match="no target"):
        discover(empty)
    target = Target(dictionaries.space.id(1, 0))
    without = PromptState.of(model, IDS, dictionaries, [target])
    with pytest.raises(ConfigError, match="keep_reads"):
        discover(without, DiscoverOptions(error="frozen"))
    with pytest.raises(PromptError, match="position 7"):
        PromptState.of(model, IDS, dictionaries, [Target(dictionaries.space.id(1, 0), 7)])
    with pytest.raises(PromptError, match="one prompt"):
        PromptState.of(model, [*IDS, *IDS], dictionaries)
    mlp = DictionarySet("mlp", [random_dictionary(d=model.d_model, site="mlp_out.1")])
    with pytest.raises(DictionaryError, match="residual stream"):
        PromptState.of(model, IDS, mlp)


def test_a_graph_that_is_cut_is_an_error_and_not_a_zero() -> None:
    state = state_of("llama")
    block = state.model.backend.model.model.layers[1]  # type: ignore[attr-defined]
    forward = block.forward
    block.forward = torch.no_grad()(forward)
    try:
        with pytest.raises(CapabilityError, match="no gradient"):
            discover(state)
    finally:
        block.forward = forward
