"""Gate R5: a pathway planted by hand is found and proved, a louder distractor is not.

Block 1 writes what it reads of coordinate 0 (feature u) into a middle one, block 2 that into the
target's. Coordinate 1 (the distractor) is three times as large and read by nothing.
"""

from __future__ import annotations

import polars as pl
import torch

from layerscope.features import DictionarySet, Matrix, SparseDictionary
from layerscope.features.architectures import JumpRelu
from layerscope.features.pathways import (
    DiscoverOptions,
    PromptState,
    ReplayOptions,
    Target,
    discover,
    judge,
    replay,
)
from layerscope.models import LanguageModel, Site
from support.toys import bare_gpt2

WIDTH, FEATURES = 16, 12
U, DISTRACTOR, MIDDLE, T = 0, 1, 2, 3
IDS = [[5, 6, 7, 8]]


def planted(strength: float) -> tuple[LanguageModel, DictionarySet]:
    toy = bare_gpt2(n_layers=3, n_heads=1, d_model=WIDTH, d_mlp=2, d_vocab=16, n_ctx=8)
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 + 0.2 * torch.rand(16, FEATURES - 4, generator=generator, dtype=torch.float64)
    toy.embed[:, 4:FEATURES] = noise
    toy.embed[:, U], toy.embed[:, DISTRACTOR] = 1.0, 3.0
    # Block 1 writes u into the middle coordinate, block 2 the middle into t: u -> middle -> t.
    toy.w_in(1)[U, 0], toy.w_out(1)[0, MIDDLE] = 1.0, strength
    toy.w_in(2)[MIDDLE, 0], toy.w_out(2)[0, T] = 1.0, strength
    toy.b_out(2)[T] = 0.5  # the target is active without a driver, too
    toy.b_out(1)[MIDDLE] = 0.5
    eye = torch.eye(FEATURES, WIDTH, dtype=torch.float64)
    made = [
        SparseDictionary(
            reads=Site("resid_post", layer),
            writes=[Site("resid_post", layer)],
            encoder=Matrix.of("encoder", eye),
            decoders=[Matrix.of("decoder", eye)],
            gate=JumpRelu(torch.full((FEATURES,), 0.05, dtype=torch.float64)),
            bias=torch.zeros(FEATURES, dtype=torch.float64),
            decoder_bias=torch.zeros(WIDTH, dtype=torch.float64),
        )
        for layer in range(3)
    ]
    return toy.model(), DictionarySet("planted", made)


def edges_of(strength: float) -> pl.DataFrame:
    model, dictionaries = planted(strength)
    target = Target(dictionaries.space.id(2, T), -1)
    state = PromptState.of(model, IDS, dictionaries, [target])
    edges = discover(state, DiscoverOptions(top_k=100))
    options = ReplayOptions()
    table, _ = judge(state, edges, replay(state, edges, options), doses=options.doses)
    return table


def test_the_planted_pathway_is_found_and_the_louder_distractor_is_not() -> None:
    table = edges_of(2.0)
    kept = table.filter(pl.col("verdict").is_in(["confirmed", "nonlinear"]))
    found = {tuple(row) for row in kept.select("source_layer", "source_id").iter_rows()}
    assert {(0, U), (1, MIDDLE), (1, U)} & found >= {(0, U), (1, MIDDLE)}
    assert all(feature in (U, MIDDLE, T) for _, feature in found)
    assert (kept["attribution"] > 0).all()
    own = kept.filter(source_layer=0, source_id=U).row(0, named=True)
    assert own["gradient"] == 4.0
    assert own["actual"] == own["predicted"] == -4.0
    distractors = table.filter(pl.col("source_id") == DISTRACTOR)
    assert (distractors["attribution"] == 0.0).all()


def test_a_planted_null_gives_no_discoveries() -> None:
    table = edges_of(0.0).filter(pl.col("source_id") != T)
    supported = table["verdict"].is_in(["confirmed", "nonlinear"])
    assert supported.sum() <= 0.05 * max(1, table.height)
