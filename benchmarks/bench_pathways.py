"""Feature pathways: all edges into many targets in one sweep, and every edge replayed.

    python -m benchmarks pathways

Against the loop that a per-target program runs, on the same prompt and with the dictionaries in
memory: for each target a forward pass, a backward pass, and a projection of the gradient on whole
dictionaries ("whole"), or on active features only ("active"). Replays against one whole forward
pass per edge. A 12-layer Llama of random weights, d_model 768, JumpReLU dictionaries of 16 times
that width, 64 tokens, 64 targets spread over the layers.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from benchmarks.harness import Report, Timing, interleave, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.inputs import token_ids
from layerscope.features import DictionarySet, Matrix, SparseDictionary, open_set, write_dictionary
from layerscope.features.architectures import JumpRelu
from layerscope.features.pathways import (
    DiscoverOptions,
    PromptState,
    ReplayOptions,
    Target,
    discover,
    replay,
)
from layerscope.models import Add, LanguageModel, Site, load

TOKENS, TARGETS, EXPANSION, ACTIVE = 64, 64, 16, 50
LOOP_TARGETS = 12  # of the loops, which are the same for every target
REPLAYED = 64


def main(*, rounds: int = 3) -> Report:
    set_threads()
    report = Report("pathways")
    model = load(llama_12x768())
    ids = token_ids(model.d_vocab, TOKENS).tolist()
    dictionaries = random_dictionaries(model, ids)
    targets = spread_targets(model, ids, dictionaries)
    loop = _Loop(model, ids, dictionaries, targets)
    ours = partial(_discover, model, ids, dictionaries, targets)
    timings = interleave(
        {
            "loop, whole dictionaries": partial(loop.run, whole=True),
            "loop, active features": partial(loop.run, whole=False),
            "layerscope, forward to edges": ours,
        },
        rounds=rounds,
    )
    share = len(targets) / LOOP_TARGETS
    scaled = {
        name: Timing(tuple(s * (share if name.startswith("loop") else 1) for s in timing.seconds))
        for name, timing in timings.items()
    }
    report.add(f"edges into {len(targets)} targets", scaled)
    mine = scaled["layerscope, forward to edges"].median
    for name, bound in (("loop, whole dictionaries", 10.0), ("loop, active features", 3.0)):
        report.claim(
            f"discovery, {name} / layerscope", scaled[name].median / mine, bound, at_most=False
        )
    state, edges = ours()
    report.claim(
        "largest relative difference of an edge from the loop's", loop.difference(edges), 1e-4
    )
    _replays(report, model, state, edges, rounds)
    _bytes(report, model, ids, dictionaries)
    report.remarks.append(
        f"the loops ran {LOOP_TARGETS} of the {len(targets)} targets; their seconds are scaled"
    )
    return report


def random_dictionaries(model: LanguageModel, ids: list[list[int]]) -> DictionarySet:
    """JumpReLU dictionaries of random weights with about ACTIVE features active per token."""
    sites = [f"resid_post.{layer}" for layer in range(model.n_layers)]
    run = model.run(ids, capture=sites, logits=None)
    generator = torch.Generator().manual_seed(0)
    made: list[SparseDictionary] = []
    width = model.d_model
    for layer, site in enumerate(sites):
        n = EXPANSION * width
        encoder = torch.randn(n, width, generator=generator) / width**0.5
        decoder = torch.randn(n, width, generator=generator) / width**0.5
        pre = run[site][0] @ encoder.T
        threshold = pre.flatten().kthvalue(pre.numel() - ACTIVE * pre.shape[0]).values
        made.append(
            SparseDictionary(
                reads=Site("resid_post", layer),
                writes=(Site("resid_post", layer),),
                encoder=Matrix.of("encoder", encoder),
                decoders=(Matrix.of("decoder", decoder),),
                gate=JumpRelu(torch.full((n,), float(threshold))),
                bias=torch.zeros(n),
                decoder_bias=torch.zeros(width),
            )
        )
    return DictionarySet("random", made)


def spread_targets(
    model: LanguageModel, ids: list[list[int]], dictionaries: DictionarySet
) -> list[Target]:
    """Active features of the last token, spread over the layers that have something below."""
    state = PromptState.of(model, ids, dictionaries)
    layers = [layer for layer in dictionaries.layers if layer > 0]
    found: list[Target] = []
    for number in range(TARGETS):
        layer = layers[number % len(layers)]
        active = state.layers[layer]
        here = active.ids[active.at(TOKENS - 1)].tolist()
        found.append(Target(dictionaries.space.id(layer, here[number // len(layers)])))
    return found


def _discover(
    model: LanguageModel,
    ids: list[list[int]],
    dictionaries: DictionarySet,
    targets: list[Target],
) -> tuple[PromptState, pl.DataFrame]:
    state = PromptState.of(model, ids, dictionaries, targets)
    return state, discover(state, DiscoverOptions())


class _Loop:
    """One forward, one backward and one projection for each target, as a user would write it."""

    def __init__(
        self,
        model: LanguageModel,
        ids: list[list[int]],
        dictionaries: DictionarySet,
        targets: list[Target],
    ) -> None:
        self.module: Any = model.backend.model  # pyright: ignore[reportAttributeAccessIssue]
        self.module.requires_grad_(False)
        self.embedding = self.module.get_input_embeddings()
        self.ids = torch.tensor(ids)
        self.dictionaries = dictionaries
        step = len(targets) / LOOP_TARGETS
        self.targets = [targets[int(index * step)] for index in range(LOOP_TARGETS)]
        self.found: dict[tuple[int, int], list[Tensor]] = {}
        # What is active does not depend on the target: the loops get it for nothing.
        run = model.run(ids, capture="resid_post.*", logits=None)
        self.values = [each.encode(run[each.reads][0]) for each in dictionaries]

    def run(self, *, whole: bool) -> None:
        for target in self.targets:
            layer, feature = target.feature.layer, target.feature.feature_id
            embedded = self.embedding(self.ids).detach().requires_grad_(True)
            states: list[Tensor] = []
            hooks = [
                block.register_forward_hook(partial(_keep, states))
                for block in self.module.model.layers
            ]
            try:
                self.module.model(inputs_embeds=embedded, use_cache=False)
            finally:
                for hook in hooks:
                    hook.remove()
            read = self.dictionaries[layer].encoder.tensor()[feature]
            gradients = torch.autograd.grad(states[layer][0, -1] @ read, states[:layer])
            self.found[layer, feature] = [
                self._project(below, gradient[0], whole=whole)
                for below, gradient in enumerate(gradients)
            ]

    def _project(self, layer: int, gradient: Tensor, *, whole: bool) -> Tensor:
        values = self.values[layer]
        directions = self.dictionaries[layer].decoders[0].tensor()
        if whole:
            return (gradient @ directions.T) * values
        found = torch.zeros_like(values)
        for position in range(len(gradient)):
            active = values[position].nonzero()[:, 0]
            found[position, active] = directions[active] @ gradient[position]
        return found * values

    def difference(self, edges: pl.DataFrame) -> float:
        """Return the largest difference of attributions over the largest of each target."""
        worst = 0.0
        names = ("source_layer", "source_id", "source_position", "attribution")
        for (layer, feature), found in self.found.items():
            mine = edges.filter(
                (pl.col("target_layer") == layer) & (pl.col("target_id") == feature)
            )
            size = max(float(part.abs().max()) for part in found)
            for below, source, position, value in mine.select(names).iter_rows():
                worst = max(worst, abs(value - float(found[below][position, source])) / size)
        return worst


def _keep(states: list[Tensor], _module: Any, _inputs: Any, out: Any) -> None:
    states.append(out[0] if isinstance(out, tuple) else out)


def _replays(
    report: Report, model: LanguageModel, state: PromptState, edges: pl.DataFrame, rounds: int
) -> None:
    """Every kept edge at one dose, beside one whole forward pass for each of a few."""
    some = edges.sample(REPLAYED, seed=0)
    at = {
        (layer.layer, int(f)): layer.directions[i]
        for layer in state.layers.values()
        for i, f in enumerate(layer.unique)
    }

    def one_by_one() -> None:
        for edge in some.iter_rows(named=True):
            direction = at[edge["source_layer"], edge["source_id"]]
            edit = Add(
                f"resid_post.{edge['source_layer']}",
                -edge["source_activation"] * direction,
                positions=edge["source_position"],
            )
            model.run(
                state.batch, capture=f"resid_post.{edge['target_layer']}", edits=[edit], logits=None
            )

    timings = interleave(
        {
            "one forward per edge": one_by_one,
            "layerscope": lambda: replay(state, edges, ReplayOptions(doses=(0.0,), nulls=0)),
        },
        rounds=rounds,
    )
    share = edges.height / REPLAYED
    scaled = {
        "one forward per edge": Timing(
            tuple(s * share for s in timings["one forward per edge"].seconds)
        ),
        "layerscope": timings["layerscope"],
    }
    report.add(f"replay of {edges.height} edges", scaled)
    ratio = scaled["one forward per edge"].median / scaled["layerscope"].median
    report.claim("replay, one forward per edge / layerscope", ratio, 8.0, at_most=False)


def _bytes(
    report: Report, model: LanguageModel, ids: list[list[int]], dictionaries: DictionarySet
) -> None:
    """With dictionaries on the disk, bytes read are those of one pass."""
    with tempfile.TemporaryDirectory() as place:
        for dictionary in dictionaries:
            write_dictionary(dictionary, Path(place) / f"resid_post.{dictionary.layer}")
        stored = open_set(place)
        size = sum(matrix.nbytes for each in stored for matrix in (each.encoder, *each.decoders))
        start = time.perf_counter()
        state = PromptState.of(model, ids, stored)
        seconds = time.perf_counter() - start
        report.add("dictionaries from disk, one pass", {"layerscope": Timing((seconds,))})
        report.claim("bytes read / bytes of the dictionaries", state.bytes_read / size, 1.0)
