"""The experiment end to end on a tiny model: order, resume, exclusions, and a slow reference."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import polars as pl
import pytest

import layerscope
from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.battery import Battery, BatteryConfig, Item, Wordings, execute, plan
from layerscope.experiments.layers import LayersConfig
from layerscope.experiments.units import Outcome
from layerscope.measures.pass_summary import PassSummary
from layerscope.measures.raw_norm import RawNorm
from layerscope.measures.rows import pass_rows
from layerscope.measures.semantics import confirmed_semantics
from layerscope.measures.summary import summarise
from layerscope.models import LanguageModel
from support.memory_units import Units
from support.planted_battery import battery
from support.tiny_models import tiny, tiny_tokenizer

CONFIG = BatteryConfig(prompts_per_batch=5, resamples=50, measures=LayersConfig().measures)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return layerscope.load(tiny("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def outcome(model: LanguageModel) -> Outcome:
    return execute(plan(model, battery(), CONFIG))


def written(outcome: Outcome) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, table in outcome.tables.items():
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        found[name] = buffer.getvalue()
    return found


def test_order_of_items_changes_nothing(model: LanguageModel, outcome: Outcome) -> None:
    items = list(battery().items)
    random.Random(2).shuffle(items)
    other = execute(plan(model, replace(battery(), items=tuple(items)), CONFIG))
    assert other.summary == outcome.summary
    assert written(other) == written(outcome)


@pytest.mark.parametrize("dies_after", [0, 1, 4])
def test_killed_and_resumed_gives_the_same_bytes(
    model: LanguageModel, outcome: Outcome, dies_after: int
) -> None:
    planned = plan(model, battery(), CONFIG)
    units = Units(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        execute(planned, units=units)
    units.dies_after = None
    resumed = execute(plan(model, battery(), CONFIG), units=units)
    assert units.written == -(-len(planned.prepared.asked) // 5)
    assert resumed.summary == outcome.summary
    assert written(resumed) == written(outcome)


def test_rows_and_milestones_equal_those_of_the_layers_experiment(
    model: LanguageModel, outcome: Outcome
) -> None:
    """The layers experiment reads the same prompts by another path: every position, all sums."""
    prompts = outcome.tables["prompts"].filter(pl.col("lens") == "norm")
    records = [
        {"key": str(row["prompt_index"]), "prompt": row["prompt"], "answer": row["answer"]}
        for row in prompts.iter_rows(named=True)
    ]
    result = layerscope.analyze(model, records)
    parts = {
        (int(part.prompt.fact_key or -1), lens): part
        for (_, lens), part in pass_rows(result.table).items()
    }
    table = result.table.rows.filter(pl.col("is_last")).with_columns(
        prompt_index=pl.col("fact_key").cast(pl.Int32)
    )
    both = outcome.tables["rows"].join(
        table, on=["prompt_index", "lens", "layer"], suffix="_slow", validate="1:1"
    )
    assert both.height == outcome.tables["rows"].height > 0
    for name in ("answer_log2p", "p_answer", "p_top1", "entropy_bits", "kl_to_final_bits"):
        difference = (both[name] - both[f"{name}_slow"]).abs().max()
        assert isinstance(difference, float) and difference < 2e-4, name
    assert both["answer_rank"].equals(both["answer_rank_slow"].alias("answer_rank"))
    summaries: dict[tuple[int, str], PassSummary] = {
        (int(entry.part.prompt.fact_key or -1), entry.part.lens): entry
        for entry in summarise(result.table).passes
    }
    for row in outcome.tables["prompts"].iter_rows(named=True):
        key = (row["prompt_index"], row["lens"])
        fields = summaries[key].milestones
        for name in ("L_semantic", "L_semantic_run2", "L_semantic_margin_ok", "L_copy"):
            assert row[name] == fields[name].first, name
        for name in ("first_rank_le_1", "first_rank_le_5", "first_rank_le_10"):
            assert row[name] == fields[name].first, name
        if row["lens"] == "norm":
            raw = parts[row["prompt_index"], "raw"]
            score = RawNorm(parts[key], raw).full(CONFIG.measures)["score"]
            assert row["artifact_score"] == pytest.approx(score["lens_artifact_score"], abs=1e-4)
            confirmed = confirmed_semantics(parts[key], {"raw": raw}, CONFIG.measures)
            assert row["confirmed_source"] == confirmed["confirmed_source"]


def test_foil_ranks_are_those_of_the_permuted_answer(
    model: LanguageModel, outcome: Outcome
) -> None:
    base = outcome.tables["prompts"].filter(
        (pl.col("lens") == "norm") & (pl.col("variant") == "orig") & pl.col("foil").is_not_null()
    )
    row = base.row(0, named=True)
    result = layerscope.analyze(
        model, [{"key": "x", "prompt": row["prompt"], "answer": row["foil"]}]
    )
    expected = result.table.last(lens="norm")["answer_rank"].to_list()
    own = outcome.tables["rows"].filter(lens="norm", prompt_index=row["prompt_index"])
    assert own["foil_rank"].to_list() == expected
    others = outcome.tables["rows"].filter(pl.col("variant") != "orig")
    assert others["foil_rank"].is_null().all()


def test_what_cannot_be_aligned_is_listed_counted_and_left_out(model: LanguageModel) -> None:
    inside = Item(
        relation="word", subject="a", answer="ital", language="zh", prompts={"orig": "Give the cap"}
    )
    echo = Item(
        relation="word", subject="b", answer="Berlin", prompts={"orig": "The capital Berlin is"}
    )
    long = Item(relation="word", subject="c", answer="Rome", prompts={"orig": "ten " * 3000 + "is"})
    whole = Battery("b", (*battery(3).items, inside, echo, long), Wordings.builtin())
    found = execute(plan(model, whole, CONFIG))
    excluded = found.tables["excluded"]
    plain = {
        row["item"]: row["stage"] for row in excluded.filter(variant="orig").iter_rows(named=True)
    }
    assert plain["word/en/b"] == "in_prompt"
    assert plain["word/en/c"] == "prompt"
    assert plain["word/zh/a"] == "alignment"
    assert not set(plain) & set(found.tables["items"]["item"])
    english, chinese = found.summary["languages"]
    assert english["tried"] == 5 and english["asked"] == 3
    assert english["aligned"] == 4 and english["excluded_in_prompt"] == 1
    assert chinese["alignment_rate"] == 0.0 and chinese["asked"] == 0
    assert found.summary["counts"]["excluded"]["prompt"] == 1
    assert excluded["reason"].str.len_chars().min() > 10


def test_a_battery_without_a_single_item_left_is_refused(model: LanguageModel) -> None:
    lost = Item(relation="w", subject="a", answer="Berlin", prompts={"orig": "The word Berlin is"})
    with pytest.raises(PromptError, match=r"no item of 'b' can be asked .* copying"):
        plan(model, Battery("b", (lost,), Wordings.builtin()), CONFIG)


def test_shifted_prompts_are_longer_by_exactly_the_shift(outcome: Outcome) -> None:
    prompts = outcome.tables["prompts"].filter(pl.col("lens") == "norm")
    lengths = {(row["item"], row["variant"]): row["tokens"] for row in prompts.to_dicts()}
    moved = [key for key in lengths if key[1].startswith("shift_")]
    assert moved
    for item, variant in moved:
        shift = int(variant.removeprefix("shift_"))
        assert lengths[item, variant] - lengths[item, "orig"] == shift


def test_control_margins_come_from_the_question_about_france(model: LanguageModel) -> None:
    items = tuple(
        Item(relation="capital", subject=name, answer=answer, entity=name)
        for name, answer in (("Germany", "Berlin"), ("Japan", "Tokyo"))
    )
    config = replace(CONFIG, parts=("control",))
    found = execute(plan(model, Battery("b", items, Wordings.builtin()), config))
    text = "Give the city name only, plain text. The capital of France is called simply"
    paris, berlin = (
        layerscope.analyze(model, [{"key": "x", "prompt": text, "answer": answer}])
        .table.last(lens="norm")["p_answer"]
        .to_numpy()
        for answer in ("Paris", "Berlin")
    )
    own = found.tables["rows"].filter(item="capital/en/Germany", lens="norm", variant="orig")
    assert own["control_margin"].to_numpy() == pytest.approx(paris - berlin, abs=1e-5)


def test_progress_counts_every_prompt(model: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    planned = plan(model, battery(3), CONFIG)
    execute(planned, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(planned.prepared.asked),) * 2


def test_batches_respect_memory(model: LanguageModel) -> None:
    from layerscope.experiments.battery.prepare import batches

    asked = plan(model, battery(), CONFIG).prepared.asked
    small = batches(asked, model, replace(CONFIG, batch_bytes=1), n_lenses=2)
    assert {len(group) for group in small} == {1}
    lengths = [entry.prepared.length for group in small for entry in group]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parts": ("paraphrase",)}, "did you mean 'paraphrases'"),
        ({"parts": ("roles", "roles")}, "twice"),
        ({"lenses": ("nrom",)}, "did you mean 'norm'"),
        ({"resamples": 0}, "resamples must be at least 1"),
        ({"batch_bytes": 0}, "batch_bytes must be at least 1"),
    ],
)
def test_bad_configuration(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BatteryConfig(**options)  # type: ignore[arg-type]
