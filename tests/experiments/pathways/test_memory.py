"""The plan of memory follows what a run will hold; `benchmarks pathways_memory` measures it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerscope import demo
from layerscope.experiments.pathways import Workspace, plan, read_config
from layerscope.features import open_set
from support.pathways_data import checkpoint, result

SHORT = "Balance: $40. Decision:"
LONG = " ".join([SHORT] * 4)


def planned(folder: Path, layers: tuple[int, ...], prompt: str = LONG, **options: Any) -> Any:
    """Return the plan of a run whose causal features are of some layers, strongest first."""
    folder.mkdir()
    if layers:
        records = [result(layer, n, 9.0 - n) for n, layer in enumerate(layers)]
        checkpoint(folder, records, space=open_set(demo.dictionaries_path()).space.name)
    prompts = {"prompts": [{"id": "p", "text": prompt, "origin": "test"}]}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    config = read_config(
        None,
        data=str(folder),
        model=str(demo.model_path()),
        dictionaries=str(demo.dictionaries_path()),
        top_n_per_layer=2,
        **options,
    )
    return plan(Workspace(config, folder / "run"))


def test_tracing_counts_the_blocks_below_the_features_that_are_traced(tmp_path: Path) -> None:
    top = max(open_set(demo.dictionaries_path()).layers)
    low = planned(tmp_path / "low", (3, top), drivers=1)["phase_bytes"]["tokens"]
    high = planned(tmp_path / "high", (top, 3), drivers=1)["phase_bytes"]["tokens"]
    both = planned(tmp_path / "both", (3, top), drivers=2)["phase_bytes"]["tokens"]
    assert high == both == pytest.approx(low * (top + 1) / 4)
    unknown = planned(tmp_path / "unknown", (), drivers=1)["phase_bytes"]["tokens"]
    assert unknown == high  # nobody can say yet which features these will be
    none = planned(tmp_path / "none", (top,), drivers=0)["phase_bytes"]["tokens"]
    assert 0 < none < low


def test_files_of_dictionaries_are_mapped_whole_where_many_rows_are_read(tmp_path: Path) -> None:
    files = [path for path in demo.dictionaries_path().rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    short, long = (
        planned(tmp_path / str(len(text)), (1,), text)["held_bytes"]["mapped"]
        for text in (SHORT, LONG)
    )
    assert size / 2 <= short <= long <= size
    assert long > 0.9 * size  # hardly a stretch of 64 KiB without a row of an active feature
