"""Feature pathways: all edges into many targets in one sweep, and every edge replayed.

    python -m benchmarks pathways

Against the loop that a per-target program runs, on the same prompt and with the dictionaries in
memory: for each target a forward pass, a backward pass, and a projection of the gradient on whole
dictionaries ("whole"), or on active features only ("active"). The loops run with the C library's
allocator as it is found, in a process of their own, and once more as `load` sets it; all take turns
with ours, because the speed of a shared host drifts, and their ratios are medians over rounds.
Replays against one whole forward pass per edge. Attribution graphs against circuit-tracer, where it
is installed, with the same transcoders. A 12-layer Llama of random weights, d_model 768, JumpReLU
dictionaries of 16 times that width, 64 tokens, 64 targets spread over the layers.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.harness import Report, Timing, interleave, paired_ratio, set_threads
from benchmarks.models import llama_12x768
from benchmarks.peers.environments import HERE, Process
from benchmarks.peers.inputs import token_ids
from layerscope.features import DictionarySet, Matrix, SparseDictionary, open_set, write_dictionary
from layerscope.features.architectures import JumpRelu
from layerscope.features.pathways import (
    AttributionGraph,
    DiscoverOptions,
    GraphOptions,
    PromptState,
    ReplayOptions,
    Target,
    attribution_graph,
    discover,
    replay,
)
from layerscope.models import Add, LanguageModel, Site, load

TOKENS, TARGETS, EXPANSION, ACTIVE = 64, 64, 16, 50
LOOP_TARGETS = 12  # of the loops, which are the same for every target
REPLAYED = 64
GRAPH_FEATURES = 128  # nodes of an attribution graph that are expanded


def main(*, rounds: int = 3) -> Report:
    set_threads()
    report = Report("pathways")
    model = load(llama_12x768(), device="cpu")
    ids = token_ids(model.d_vocab, TOKENS).tolist()
    dictionaries = random_dictionaries(model, ids)
    targets = spread_targets(model, ids, dictionaries)
    loop = _Loop(model, ids, dictionaries, targets)
    ours = partial(_discover, model, ids, dictionaries, targets)
    mine = "layerscope, forward to edges"
    with _loop_as_found() as run_as_found:
        timings = interleave(
            {
                "loop, whole dictionaries": partial(run_as_found, True),
                "loop, active features": partial(run_as_found, False),
                "loop, whole dictionaries, freed memory kept": partial(loop.run, whole=True),
                "loop, active features, freed memory kept": partial(loop.run, whole=False),
                mine: ours,
            },
            rounds=2 * rounds + 1,
        )
    share = len(targets) / LOOP_TARGETS
    scaled = {
        name: Timing(tuple(s * (share if name.startswith("loop") else 1) for s in timing.seconds))
        for name, timing in timings.items()
    }
    report.add(f"edges into {len(targets)} targets", scaled)
    bounds = {"loop, whole dictionaries": 10.0, "loop, active features": 3.0}
    bounds |= {f"{name}, freed memory kept": bound for name, bound in bounds.items()}
    for name, bound in bounds.items():
        ratio = paired_ratio(scaled, name, mine)
        report.claim(f"discovery, {name} / layerscope", ratio, bound, at_most=False)
    state, edges = ours()
    report.claim(
        "largest relative difference of an edge from the loop's", loop.difference(edges), 1e-4
    )
    _replays(report, model, state, edges, rounds)
    _bytes(report, model, ids, dictionaries)
    del state, loop, dictionaries
    _graphs(report, model, ids, rounds)
    report.remarks.append(
        f"the loops ran {LOOP_TARGETS} of the {len(targets)} targets; their seconds are scaled"
    )
    return report


def random_dictionaries(
    model: LanguageModel,
    ids: list[list[int]],
    reads: str = "resid_post",
    writes: str = "resid_post",
) -> DictionarySet:
    """JumpReLU dictionaries of random weights with about ACTIVE features active per token."""
    sites = [f"{reads}.{layer}" for layer in range(model.n_layers)]
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
                reads=Site(reads, layer),
                writes=(Site(writes, layer),),
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


@contextmanager
def _loop_as_found() -> Generator[Callable[[bool], None]]:
    """Start the loop in another process; what is given runs it there, and waits."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_answer, args=(there,), daemon=True)
    process.start()
    there.close()

    def run(whole: bool) -> None:
        here.send(whole)
        here.recv()

    try:
        here.recv()
        yield run
    finally:
        here.close()
        process.join()


def _answer(connection: Connection) -> None:
    """Run the loop whenever it is asked for, with the allocator as it is found."""
    set_threads()
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "a choice"  # `load` reads it; glibc did at the start
    model = load(llama_12x768(), device="cpu")
    ids = token_ids(model.d_vocab, TOKENS).tolist()
    dictionaries = random_dictionaries(model, ids)
    loop = _Loop(model, ids, dictionaries, spread_targets(model, ids, dictionaries))
    connection.send(None)
    while True:
        try:
            whole: bool = connection.recv()
        except EOFError:
            return
        loop.run(whole=whole)
        connection.send(None)


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


def _graphs(report: Report, model: LanguageModel, ids: list[list[int]], rounds: int) -> None:
    """One prompt's attribution graph beside circuit-tracer's, in a process of its own."""
    transcoders = random_dictionaries(model, ids, "mlp_in", "mlp_out")
    options = GraphOptions(max_features=GRAPH_FEATURES, node_share=1.0, edge_share=1.0)
    with tempfile.TemporaryDirectory() as place:
        file, edges = f"{place}/transcoders.safetensors", f"{place}/edges.safetensors"
        save_file({name: tensor for each in transcoders for name, tensor in _named(each)}, file)
        program = [str(HERE / "circuit_tracer_worker.py"), str(llama_12x768()), file]
        program += ["--features", str(GRAPH_FEATURES), "--logits", str(options.logits)]
        try:
            peer = Process("circuit-tracer", [*program, "--tokens", str(TOKENS)])
        except FileNotFoundError:
            report.remarks.append("circuit-tracer is not installed: its graphs were not compared")
            return
        try:
            peer.wait()
            timings = interleave(
                {
                    "circuit-tracer": lambda: peer.ask("run"),
                    "layerscope": lambda: attribution_graph(model, ids, transcoders, options),
                },
                rounds=rounds,
            )
            peer.ask(f"edges {edges}")
        finally:
            peer.stop()
        theirs = load_file(edges)
    report.add(f"attribution graph of {GRAPH_FEATURES} features", timings)
    ratio = timings["circuit-tracer"].median / timings["layerscope"].median
    report.claim("attribution graph, circuit-tracer / layerscope", ratio, 1.0, at_most=False)
    found = _graph_difference(attribution_graph(model, ids, transcoders, options), theirs)
    report.claim(
        f"largest relative difference from circuit-tracer's, {found[0]} edges of both",
        found[1],
        1e-3,
    )


def _named(dictionary: SparseDictionary) -> list[tuple[str, Tensor]]:
    return [
        (f"{dictionary.layer}.encoder", dictionary.encoder.tensor()),
        (f"{dictionary.layer}.decoder", dictionary.decoders[0].tensor()),
        (f"{dictionary.layer}.threshold", dictionary.gate.tensors()["threshold"]),
    ]


def _graph_difference(graph: AttributionGraph, theirs: dict[str, Tensor]) -> tuple[int, float]:
    """Return how many edges between features both have, and how far they are apart at most.

    In units of the largest edge into the same feature. They expand features in another order, so
    not all are the same; and they leave out the first token's.
    """
    keys = [tuple(row) for row in theirs["features"].tolist()]
    place = {(layer, feature, at): row for row, (layer, at, feature) in enumerate(keys)}
    features = graph.nodes.filter(pl.col("kind") == "feature")
    columns = ("node", "layer", "feature_id", "position")
    node = {number: tuple(rest) for number, *rest in features.select(columns).iter_rows()}
    pairs: dict[int, list[tuple[float, float]]] = {}
    for source, target, weight in graph.edges.iter_rows():
        row, column = place.get(node.get(target, ())), place.get(node.get(source, ()))
        if row is not None and column is not None:
            pairs.setdefault(row, []).append((weight, float(theirs["adjacency"][row, column])))
    differences = [
        abs(mine - other) / max(abs(each) for _, each in found)
        for found in pairs.values()
        for mine, other in found
        if any(each for _, each in found)
    ]
    return len(differences), max(differences, default=float("inf"))
