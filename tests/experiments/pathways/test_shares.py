"""How work is cut: an edit is carried out once, and gradients stay within their bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
from polars.testing import assert_frame_equal

from layerscope.experiments.pathways.discover import ORDER
from layerscope.experiments.pathways.replay import shares
from layerscope.experiments.pathways.targets import group_size
from layerscope.experiments.pathways.workspace import SampledPrompt

PROMPTS = [SampledPrompt(name, "", (1, 2, 3), "", "") for name in ("b", "a", "none")]


def edges(n: int = 400) -> pl.DataFrame:
    random = np.random.default_rng(0)
    columns = {
        "source_layer": 4,
        "source_id": 9,
        "source_position": 5,
        "target_layer": 6,
        "target_id": 7,
        "target_position": 2,
        "rank": 20,
    }
    drawn = {name: random.integers(top, size=n) for name, top in columns.items()}
    return pl.DataFrame({"prompt_id": random.choice(["a", "b"], size=n), **drawn}).unique(
        maintain_order=True
    )


def test_every_edge_is_in_one_share_and_no_place_is_cut() -> None:
    found = edges()
    cut = shares(found, PROMPTS, 30)
    whole = pl.concat([share.edges for share in cut])
    assert_frame_equal(whole.sort(whole.columns), found.sort(whole.columns))
    assert len({share.name for share in cut}) == len(cut) > 8
    assert all(share.edges["prompt_id"].unique().to_list() == [share.prompt.id] for share in cut)
    places = pl.concat(
        [
            share.edges.select("prompt_id", "source_layer", "source_position")
            .unique()
            .with_columns(share=pl.lit(share.name))
            for share in cut
        ]
    )
    assert not places.select("prompt_id", "source_layer", "source_position").is_duplicated().any()
    largest = found.group_by("prompt_id", "source_layer", "source_position").len()["len"].max()
    assert isinstance(largest, int)
    assert max(share.edges.height for share in cut) <= 30 + largest
    assert all(share.edges.equals(share.edges.sort(ORDER)) for share in cut)
    again = shares(found.sample(fraction=1.0, shuffle=True, seed=3), PROMPTS, 30)
    assert [share.name for share in again] == [share.name for share in cut]


def sized(width: int, tokens: int, batch: int | None = None) -> int:
    work: Any = SimpleNamespace(
        config=SimpleNamespace(batch_size=batch), dictionaries=[SimpleNamespace(d_in=width)]
    )
    return group_size(work, tokens)


def test_targets_of_a_chunk_are_chosen_by_memory() -> None:
    assert sized(256, 60) == 512
    eight_billion = sized(4096, 120)
    assert 2 * 4 * eight_billion * 120 * 4096 <= 2**30 < 2 * 4 * (eight_billion + 1) * 120 * 4096
    assert sized(16_384, 100_000) == 1
    assert sized(4096, 120, batch=5) == 5
