"""The attribution experiment on the embedded model: verdict, bad pairs, the same bytes again."""

from __future__ import annotations

import polars as pl
import pytest

import layerscope
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError, SiteError
from layerscope.experiments.attribution import AttributionConfig, attribution
from layerscope.experiments.mediation import MediationConfig, mediation
from layerscope.interventions.attribution import Node, exact_effects
from layerscope.interventions.attribution.pairs import contrast_of
from layerscope.interventions.circuits import FRACTIONS
from layerscope.interventions.patching.pairs import PromptPair, tokenize_pairs
from layerscope.models import Site
from layerscope.reports.attribution import write_attribution
from layerscope.reports.mediation import write_mediation

FACTS = (("France", "Paris"), ("Germany", "Berlin"), ("Spain", "Madrid"), ("Italy", "Rome"))
PROMPT = "The capital of {} is called"
QUICK = {"verify": 4, "sample": 3, "pairs_per_unit": 2}


def pair(number: int, **changes) -> PromptPair:
    (country, capital), (other, foil) = FACTS[number], FACTS[(number + 1) % len(FACTS)]
    given = {
        "key": country,
        "clean": PROMPT.format(country),
        "corrupt": PROMPT.format(other),
        "answers": (capital,),
        "foils": (foil,),
    }
    return PromptPair(**given | changes)


PAIRS = [pair(number) for number in range(4)]


@pytest.fixture(scope="module")
def model():
    return layerscope.load(model_path(), device="cpu", dtype="float32")


class Killed(Exception):
    pass


class Shelf:
    """Keeps units in memory; dies before keeping more than `most`."""

    def __init__(self, most: int | None = None) -> None:
        self.kept: dict = {}
        self.most = most

    def get_unit(self, key):
        return self.kept.get(key)

    def put_unit(self, key, frame, payload):
        if self.most is not None and len(self.kept) >= self.most:
            raise Killed
        self.kept[key] = (frame, payload)


@pytest.fixture(scope="module")
def outcome(model):
    return attribution(model, PAIRS, AttributionConfig(**QUICK))


def test_predictions_and_exact_effects_are_those_of_the_methods(model, outcome) -> None:
    tokens, _ = tokenize_pairs(model, PAIRS)
    contrast = contrast_of(model, tokens)
    assert outcome.summary["total_effect"] == pytest.approx(float(contrast.total.mean()), rel=1e-5)
    verified = outcome.tables["verified"]
    assert verified.height == 7 and verified["top"].sum() == 4
    row = verified.filter(node="attn.2.head.0.z").row(0, named=True)
    node = Node(Site("attn.z", 2), 0)
    exact = float(exact_effects(contrast, [node])[node].mean())
    assert row["exact"] == pytest.approx(exact, rel=1e-4)
    nodes = outcome.tables["nodes"]
    assert nodes.height == 8 * 6 + 8
    assert row["predicted"] == pytest.approx(
        nodes.filter(node="attn.2.head.0.z")["score"][0], rel=1e-6
    )
    assert outcome.tables["scores"].height == nodes.height * 4


def test_circuits_end_at_the_whole_model(outcome) -> None:
    curves = outcome.tables["curves"]
    assert curves.height == 2 * len(FRACTIONS)
    for ranking in ("signed", "magnitude"):
        rows = curves.filter(ranking=ranking)
        assert rows["faithfulness"][-1] == pytest.approx(1.0, abs=1e-3)
    areas = outcome.summary["areas"]
    assert areas["CPR"] > 0.5 and 0 <= areas["CMD"] < 0.3
    circuit = outcome.summary["circuit"]
    assert 0 < circuit["n_edges"] <= 50
    assert {"faithfulness", "CPR", "CMD"} == set(outcome.summary["definitions"])
    assert outcome.summary["edge_remainder"] < 1e-3


def test_a_killed_run_resumes_to_the_same_bytes(model, outcome) -> None:
    shelf = Shelf(most=3)
    with pytest.raises(Killed):
        attribution(model, PAIRS, AttributionConfig(**QUICK), units=shelf)
    done = dict(shelf.kept)
    shelf.most = None
    ticks: list[tuple[int, int]] = []
    again = attribution(
        model,
        PAIRS,
        AttributionConfig(**QUICK),
        units=shelf,
        progress=lambda *tick: ticks.append(tick),
    )
    assert len(done) == 3 and all(shelf.kept[key] is value for key, value in done.items())
    assert again.summary == outcome.summary
    for name, table in outcome.tables.items():
        assert again.tables[name].equals(table), name
    assert ticks == sorted(ticks) and ticks[-1] == (16, 16)


def test_bad_pairs_are_counted_and_left_out(model) -> None:
    bad = [
        pair(0, key="wrong", answers=("Berlin",), foils=("Paris",)),
        pair(0, key="longer", corrupt="The capital city of Spain is called"),
        pair(0, key="alike", corrupt=PROMPT.format("France")),
    ]
    config = AttributionConfig(edges=False, **QUICK)
    found = attribution(model, [*PAIRS, *bad], config)
    assert found.summary["pairs"]["given"] == 7 and found.summary["pairs"]["used"] == 4
    reasons = dict(found.tables["pairs"].select("pair", "reason").iter_rows())
    assert reasons["wrong"] == "the model does not answer the clean prompt"
    assert "' city'" in reasons["longer"] and "the same tokens" in reasons["alike"]
    assert sum("left out" in line for line in found.summary["warnings"]) == 3
    assert found.summary["circuit"]["status"] == "skipped"
    kept = attribution(
        model, [*PAIRS, bad[0]], AttributionConfig(edges=False, keep_wrong=True, **QUICK)
    )
    assert kept.summary["pairs"]["used"] == 5
    with pytest.raises(PromptError, match="none of 1 pairs can be used"):
        attribution(model, bad[:1], config)
    with pytest.raises(ConfigError, match="needs a"):
        attribution(model, [pair(0, foils=())], config)


def test_unusable_settings_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gauss-legendre'"):
        AttributionConfig(rule="gauss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no prediction goes unchecked"):
        AttributionConfig(verify=0, sample=0)
    with pytest.raises(SiteError, match="unknown site"):
        attribution(model, PAIRS, AttributionConfig(sites=("hedas",)))
    with pytest.raises(ConfigError, match="cannot be scored"):
        attribution(model, PAIRS, AttributionConfig(sites=("attn.0.pattern",)))


@pytest.mark.parametrize("method", ("ig", "ig-activations", "atp-star"))
def test_every_method_runs(model, method: str) -> None:
    config = AttributionConfig(method=method, edges=False, steps=2, **QUICK)
    found = attribution(model, PAIRS[:2], config)
    assert found.tables["verified"]["predicted"].abs().max() > 0.1
    assert (found.tables["nodes"]["error"].null_count() == 0) == method.startswith("ig")


def test_single_positions(model) -> None:
    config = AttributionConfig(sites=("residual",), positions=True, edges=False, **QUICK)
    found = attribution(model, PAIRS[:2], config)
    nodes = found.tables["nodes"]
    assert nodes.height == 8 * 7 and set(nodes["position"]) == set(range(7))
    # What comes before the country is the same in both prompts.
    assert nodes.filter(pl.col("position") < 4)["score"].abs().max() == 0.0


def test_pages_hold_warnings_and_the_circuit(model, outcome, tmp_path) -> None:
    page = write_attribution(outcome, tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<svg" in page and "attn.2.head.0.z" in page and "CPR" in page
    odd = pair(0, key="<script>alert(1)</script>")
    found = mediation(model, [odd], MediationConfig(sites=("mlp_out",)))
    page = write_mediation(found, tmp_path / "m.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "say little" in page
