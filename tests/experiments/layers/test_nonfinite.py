"""A model that overflows on its way is reported as such, from the layer where it happens."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from layerscope.experiments.layers import Fact, LayersResult, PromptSet, analyze
from layerscope.measures.table import LayersTable
from layerscope.models import load
from layerscope.reports.files import write_run_files
from layerscope.reports.html import layers_page
from support.tiny_models import tiny, tiny_tokenizer

BROKEN_BLOCK = 1
PROMPTS = PromptSet("p", (Fact(key="a", prompt="One two three", answer="four"),))


@pytest.fixture(scope="module")
def result() -> LayersResult:
    module = tiny("llama")
    with torch.no_grad():
        module.model.layers[BROKEN_BLOCK].mlp.down_proj.weight.fill_(torch.inf)
    return analyze(load(module, tokenizer=tiny_tokenizer(), verify=False), PROMPTS)


def test_rows_before_the_overflow_are_read_and_later_ones_are_null(result: LayersResult) -> None:
    norm = result.table.last(lens="norm")
    first_bad = BROKEN_BLOCK + 1
    good, bad = norm.filter(pl.col("layer") < first_bad), norm.filter(pl.col("layer") >= first_bad)
    assert not good["nonfinite"].any() and bad["nonfinite"].all()
    assert good["entropy_bits"].null_count() == 0
    assert good["top_ids"].null_count() == 0
    for column in ("entropy_bits", "top_ids", "top_probs", "answer_rank", "p_top1"):
        assert bad[column].null_count() == bad.height, column


def test_it_is_said_and_everything_can_be_written(result: LayersResult, tmp_path: Path) -> None:
    codes = {reason["code"] for reason in result.summary["measurement_guidance"]["reasons"]}
    assert "numeric_health_caution" in codes
    json.dumps(result.summary, allow_nan=False)
    write_run_files(result.table, result.summary, result.provenance, tmp_path)
    (path,) = tmp_path.glob("*-layers.parquet")
    assert LayersTable.read_parquet(path).rows.height == result.table.rows.height
    assert "layers" in layers_page((result.table, result.summary, result.provenance))
