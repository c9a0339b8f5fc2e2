"""Real trained models: what their makers measured must come out of the table."""

from __future__ import annotations

import json
import math

import polars as pl
import pytest

from layerscope.experiments.layers import Fact, LayersResult, PromptSet, analyze
from layerscope.models import load
from support.shared import shared_path

pytestmark = pytest.mark.real_model
TEMPLATE = "Once upon a time, there was a little {k} named {n}. "
MODELS = ("stories260K", "babyllama-tok105")


def gender(kind: str, names: list[str]) -> list[Fact]:
    return [
        Fact(
            key=f"{kind} {name} {answer}",
            prompt=TEMPLATE.format(k=kind, n=name).strip(),
            answer=answer,
        )
        for name in names
        for answer in ("She", "He")
    ]


@pytest.fixture(scope="module", params=MODELS)
def result(request: pytest.FixtureRequest) -> tuple[LayersResult, dict[str, float]]:
    model = load(shared_path("models", request.param))
    task = json.loads(shared_path("models", "gender_task.json").read_text())
    facts = gender("girl", task["girl_names"]) + gender("boy", task["boy_names"])
    return analyze(model, PromptSet("gender", tuple(facts))), task["measured"][request.param][
        TEMPLATE
    ]


def test_pronouns_as_their_maker_measured_them(
    result: tuple[LayersResult, dict[str, float]],
) -> None:
    found, measured = result
    last = found.table.last(lens="norm").filter(pl.col("layer") == found.table.meta.n_layers)
    nats = {row["fact_key"]: row["answer_full_log2p"] * math.log(2) for row in last.to_dicts()}
    for kind, expected in (
        ("girl", measured["girl_mean_logprob_diff_she_minus_he"]),
        ("boy", measured["boy"]),
    ):
        names = {key.split()[1] for key in nats if key.startswith(kind)}
        gaps = [nats[f"{kind} {name} She"] - nats[f"{kind} {name} He"] for name in names]
        assert sum(gaps) / len(gaps) == pytest.approx(expected, abs=0.02)


def test_last_row_is_the_model(result: tuple[LayersResult, dict[str, float]]) -> None:
    found, _ = result
    norm = found.table.rows.filter(
        pl.col("lens") == "norm", pl.col("layer") == found.table.meta.n_layers
    )
    assert norm["kl_to_final_bits"].max() < 1e-5
    assert norm["entropy_bits"].is_finite().all()
