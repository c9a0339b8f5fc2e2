"""The mediation experiment on the embedded model."""

from __future__ import annotations

import pytest

import layerscope
from layerscope.demo import model_path
from layerscope.errors import ConfigError
from layerscope.experiments.mediation import MediationConfig, mediation
from layerscope.interventions.attribution.pairs import contrast_of
from layerscope.interventions.mediation import mediate
from layerscope.interventions.patching.pairs import PromptPair, tokenize_pairs

FACTS = (("France", "Paris"), ("Germany", "Berlin"), ("Spain", "Madrid"))
PAIRS = [
    PromptPair(
        key=country,
        clean=f"The capital of {country} is called",
        corrupt=f"The capital of {FACTS[number - 1][0]} is called",
        answers=(capital,),
        foils=(FACTS[number - 1][1],),
    )
    for number, (country, capital) in enumerate(FACTS)
]


@pytest.fixture(scope="module")
def model():
    return layerscope.load(model_path(), device="cpu", dtype="float32")


def test_units_do_not_change_the_result(model) -> None:
    options = {"sites": ("resid_pre.4",), "positions": "each"}
    one = mediation(model, PAIRS, MediationConfig(pairs_per_unit=1, **options))
    all_ = mediation(model, PAIRS, MediationConfig(pairs_per_unit=8, **options))
    for column in ("indirect", "direct", "recovery"):
        first, second = one.tables["mediation"][column], all_.tables["mediation"][column]
        assert first.to_list() == pytest.approx(second.to_list(), rel=1e-4, abs=1e-4)
    tokens, _ = tokenize_pairs(model, PAIRS)
    library = mediate(contrast_of(model, tokens), "resid_pre.4", positions="each", together=True)
    found = all_.tables["mediation"]
    assert library.table()["indirect"].to_list() == pytest.approx(
        found["indirect"].to_list(), rel=1e-4, abs=1e-4
    )
    # All positions of the stream together carry everything.
    last = found.row(-1, named=True)
    assert last["mediator"] == "all together"
    assert last["recovery"] == pytest.approx(1.0, abs=1e-4)


def test_the_fact_moves_from_the_subject_to_the_end(model) -> None:
    config = MediationConfig(sites=("residual",), positions="each", together=False)
    table = mediation(model, PAIRS, config).tables["mediation"]
    share = {(row["layer"], row["position"]): row["recovery"] for row in table.to_dicts()}
    assert share[0, 4] > 0.95 and share[7, 6] > 0.9
    assert abs(share[0, 6]) < 0.1 and abs(share[7, 4]) < 0.1


def test_predicted_effects_say_so(model) -> None:
    found = mediation(model, PAIRS, MediationConfig(sites=("heads",), method="atp"))
    assert any("predicts effects from gradients" in line for line in found.summary["warnings"])
    with pytest.raises(ConfigError, match="unknown positions 'first'"):
        MediationConfig(positions="first")  # type: ignore[arg-type]
