"""Function vectors of the embedded model, and runs that are killed and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import layerscope
from layerscope.demo import model_path
from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.function_vectors import (
    FunctionVectorConfig,
    execute,
    function_vectors,
    plan,
)
from layerscope.experiments.function_vectors.builtin import demo_layout, demo_task
from layerscope.files import canonical_json
from layerscope.interventions.function_vectors.tasks import Task
from layerscope.reports.function_vectors import write_function_vectors
from support.loaded import loaded

VERBS = ("antonym", "past", "spanish")


@cache
def demo():
    return layerscope.load(model_path(), device="cpu", dtype="float32", verify=False)


@cache
def outcome(name):
    config = FunctionVectorConfig(layout=demo_layout(), means=48, heads=(1, 2, 5), random_sets=3)
    return function_vectors(demo(), demo_task(name), config)


def test_vectors_tell_the_embedded_model_which_task_is_meant():
    """Three tasks ask for the same verbs, so that only a vector can say which answer is wanted."""
    gains = [outcome(name).summary["gain_zero_shot"] for name in VERBS]
    assert sum(gain["over_none"] for gain in gains) / 3 >= 0.5
    assert sum(gain["over_random"] for gain in gains) / 3 >= 0.5
    queries = [set(outcome(name).tables["queries"].filter(part="test")["query"]) for name in VERBS]
    assert queries[0] == queries[1] == queries[2]
    for name in VERBS:
        test = outcome(name).summary["test_top1"]
        assert test["zero_shot"]["vector"] >= 0.9 and test["zero_shot"]["in_place"] >= 0.85


def test_a_model_that_needs_no_pairing_is_told_so():
    summary = outcome("spanish").summary
    assert summary["corruption"] == "zero_shot"
    assert any("shuffling the examples' answers hardly hurts" in w for w in summary["warnings"])
    control = outcome("spanish").tables["heads"].sort("rank").row(0, named=True)
    assert control["control"] == pytest.approx(control["aie"], abs=0.05)
    assert control["low"] < control["aie"] < control["high"]


def test_transfer_is_claimed_over_its_rivals_and_only_inside_the_band():
    for name in ("antonym", "spanish"):
        summary = outcome(name).summary
        transfer, zero = summary["transfer"], summary["test_top1"]["zero_shot"]
        assert transfer["verdict"] == "supported" and transfer["zero_shot"] == zero["none"] <= 0.5
        rival = max(zero["none"], zero["random_best"])
        assert transfer["over_rivals"] == pytest.approx(zero["vector"] - rival)
    # Most past tenses are guessed without a vector: its perfect score claims nothing.
    summary = outcome("past").summary
    assert summary["test_top1"]["zero_shot"]["none"] > 0.5
    assert summary["test_top1"]["zero_shot"]["vector"] == 1.0
    assert summary["transfer"]["verdict"] == "refused"
    assert summary["transfer"]["over_rivals"] is None
    assert any("no claim of transfer: without examples" in line for line in summary["warnings"])
    for wrong in ((0.5, 0.5), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(ConfigError, match="transfer_band is two accuracies"):
            FunctionVectorConfig(transfer_band=wrong)


def test_the_page_says_what_was_found(tmp_path):
    page = write_function_vectors(outcome("spanish"), tmp_path / "page.html").read_text("utf-8")
    assert "Function vector: spanish" in page and "Average indirect effect" in page
    assert "hardly hurts" in page and "Transfer supported" in page


class Units:
    """A store in memory that is killed after so many units."""

    def __init__(self, limit=None):
        self.kept, self.limit = {}, limit

    def get_unit(self, key):
        if key not in self.kept:
            return None
        frame, payload = self.kept[key]
        return frame, json.loads(payload)

    def put_unit(self, key, frame, payload):
        if self.limit is not None and len(self.kept) >= self.limit:
            raise KeyboardInterrupt
        self.kept[key] = (frame.clone(), json.dumps(payload))


WORDS = "one two three four five six seven eight nine ten girl park city text plain only"
SMALL = FunctionVectorConfig(
    shots=3, means=6, prompts=4, trials=4, heads=(1, 2), random_sets=2, corruption="shuffled"
)


def small_task():
    return Task("next", tuple(pairwise(WORDS.split())))


def test_a_killed_run_resumes_to_the_same_tables(monkeypatch):
    model = loaded("llama")
    # A random model answers nothing, so let its own favourites be the answers.
    from layerscope.interventions.function_vectors import effects

    real = effects.mean_heads
    monkeypatch.setattr(
        "layerscope.experiments.function_vectors.run.mean_heads",
        lambda *args, **named: real(*args, **{**named, "only_answered": False}),
    )
    planned = plan(model, small_task(), SMALL)
    whole = execute(planned)
    units = Units(limit=4)
    with pytest.raises(KeyboardInterrupt):
        execute(planned, units=units)
    assert len(units.kept) == 4
    units.limit = None
    seen = []
    resumed = execute(planned, units=units, progress=lambda done, total: seen.append((done, total)))
    for name, table in whole.tables.items():
        assert_frame_equal(resumed.tables[name], table)
    assert canonical_json(resumed.summary) == canonical_json(whole.summary)
    assert seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(d for d, _ in seen)


def test_a_text_of_the_layout_gives_what_the_query_alone_gives(monkeypatch):
    from layerscope.experiments.function_vectors.run import mean_heads as real

    monkeypatch.setattr(
        "layerscope.experiments.function_vectors.run.mean_heads",
        lambda *args, **named: real(*args, **{**named, "only_answered": False}),
    )
    layout = SMALL.layout.text((), "{input}")
    config = replace(SMALL, texts=(layout, "Once upon a time {input}"))
    found = function_vectors(loaded("llama"), small_task(), config)
    same, other = found.summary["texts"]
    alone = found.summary["test_top1"]["zero_shot"]
    assert (same["text"], other["text"]) == config.texts
    assert all(same[key] == alone[key] for key in ("none", "vector", "random_mean"))
    queries = found.tables["queries"]
    size, layer = len(found.summary["chosen"]["heads"]), found.summary["chosen"]["layer"]
    chosen = queries.filter(kind="vector", heads=size, layer=layer)
    values = [
        part["probability"].to_list()
        for part in (chosen.filter(part="test", setting="zero_shot"), chosen.filter(setting=layout))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert chosen.filter(setting=config.texts[1])["probability"].to_list() != values[0]
    with pytest.raises(ConfigError, match=r"needs \{input\} once"):
        FunctionVectorConfig(texts=("nothing",))


def test_a_model_that_answers_nothing_is_said_so():
    with pytest.raises(PromptError, match="answers none of the 6 prompts"):
        function_vectors(loaded("llama"), small_task(), SMALL)


def test_what_cannot_be_done_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="did you mean 'shuffled'"):
        FunctionVectorConfig(corruption="shufled")
    with pytest.raises(ConfigError, match="examples beside"):
        plan(loaded("llama"), Task("few", (("one", "two"), ("two", "three"), ("six", "ten"))))
    with pytest.raises(PromptError, match="the input 'one' twice"):
        Task("twice", (("one", "two"), ("one", "three")))
    with pytest.raises(ConfigError, match="use antonym, plural"):
        demo_task("latin")


def test_rows_are_one_per_query_and_condition():
    queries = outcome("antonym").tables["queries"]
    keys = ["part", "setting", "kind", "heads", "draw", "layer", "query"]
    assert queries.select(keys).is_duplicated().sum() == 0
    right = queries.filter(pl.col("correct"))
    assert (right["rank"] == 1).all()
    assert (queries.filter(~pl.col("correct"))["rank"] >= 1).all()
