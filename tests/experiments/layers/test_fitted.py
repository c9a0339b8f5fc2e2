"""Fitted lenses in a run: what must hold of them, and where their temperatures come from."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
import torch

from layerscope.errors import ConfigError, LensError
from layerscope.experiments.layers import Fact, LayersConfig, LayersResult, PromptSet, execute, plan
from layerscope.lenses import NormLens
from layerscope.measures.table import IDENTITY, KEY_COLUMNS
from layerscope.models import LanguageModel
from support.lens_artifacts import KINDS, stored
from support.loaded import loaded
from support.memory_units import Units

LN2 = math.log(2.0)
PROMPTS = PromptSet(
    "fitted",
    (
        Fact(key="one", prompt="The capital of Germany is called", answer="Berlin",
             foil="Paris", control="The capital of France is called",
             ablated="The capital of Germany is"),
        Fact(key="two", prompt="Once upon a time there was a little", answer="girl"),
        Fact(key="three", prompt="Two and two make", answer="exactly four"),
    ),
)  # fmt: skip
FAMILIES = ("llama", "gemma2", "gpt2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return loaded(request.param)


@pytest.fixture
def llama() -> LanguageModel:
    return loaded("llama")


def folders(
    model: LanguageModel, where: Path, *, noise: float = 0.0, kinds: tuple[str, ...] = KINDS
) -> dict[str, str]:
    return {kind: str(stored(kind, model, where / kind, noise=noise)) for kind in kinds}


def run(
    model: LanguageModel,
    artifacts: dict[str, str],
    *,
    units: Units | None = None,
    passes_per_batch: int = 32,
    lenses: tuple[str, ...] | None = None,
) -> LayersResult:
    config = LayersConfig(
        lenses=("raw", "norm", *artifacts) if lenses is None else lenses,
        artifacts=artifacts,
        passes_per_batch=passes_per_batch,
    )
    return execute(plan(model, PROMPTS, config), units=units)


def without_identity(result: LayersResult, lens: str) -> pl.DataFrame:
    rows = result.table.rows.filter(pl.col("lens") == lens)
    return rows.drop("lens")


def test_identity_lenses_equal_the_norm_lens_bit_for_bit(
    model: LanguageModel, tmp_path: Path
) -> None:
    result = run(model, folders(model, tmp_path), lenses=("norm", *KINDS))
    own = pl.col("^.*norm_temp$")  # stand on the rows of the norm lens only
    norm = without_identity(result, "norm").drop(own)
    for kind in KINDS:
        found = without_identity(result, kind).drop(own)
        different = [name for name in norm.columns if not norm[name].equals(found[name])]
        assert different == [], kind


def test_the_last_row_of_every_lens_is_the_models_head(
    model: LanguageModel, tmp_path: Path
) -> None:
    result = run(model, folders(model, tmp_path, noise=0.3))
    last = result.table.rows.filter(pl.col("layer") == model.n_layers, pl.col("lens") != "raw")
    assert set(last["lens"]) == {"norm", *KINDS}
    assert last["kl_to_final_bits"].max() < 1e-5
    assert (last["final_top1_rank"] == 1).all()
    assert last.filter("is_last")["cos_to_final"].min() == pytest.approx(1.0, abs=1e-6)
    middle = result.table.rows.filter(pl.col("layer") == 1, pl.col("is_last"))
    kl = {lens: rows["kl_to_final_bits"] for (lens,), rows in middle.group_by("lens")}
    assert not any(kl[kind].equals(kl["norm"]) for kind in KINDS)  # the noise did something


def test_rows_of_a_fitted_lens_by_hand(llama: LanguageModel, tmp_path: Path) -> None:
    artifacts = folders(llama, tmp_path, noise=0.3, kinds=("tuned",))
    planned = plan(llama, PROMPTS, LayersConfig(lenses=("norm", "tuned"), artifacts=artifacts))
    result = execute(planned)
    lens = planned.lenses[1]
    states = llama.run([PROMPTS.facts[1].prompt], capture=["resid_post.0"], logits="last")
    hidden = lens.transform(states["resid_post.0"][0, -1:], 1)
    log_p = llama.unembedding.logits(hidden)[0].double().log_softmax(-1)
    final = states.logits[0, -1].double().log_softmax(-1)
    info = next(entry for entry in result.table.passes() if entry.fact_key == "two")
    row = result.table.rows.filter(
        pl.col("prompt_index") == info.prompt_index,
        pl.col("lens") == "tuned", pl.col("layer") == 1, pl.col("is_last"),
    ).row(0, named=True)  # fmt: skip
    answer = info.answer_ids[0]
    direction = llama.unembedding.weight[answer].detach().double()
    vector = hidden[0].double()
    assert row["kl_to_final_bits"] == pytest.approx(
        float((log_p.exp() * (log_p - final)).sum() / LN2), rel=1e-4
    )
    assert row["answer_rank"] == 1 + int((log_p > log_p[answer]).sum())
    # Geometry uses the vector that was unembedded, not the residual.
    cosine = torch.nn.functional.cosine_similarity(vector, direction, dim=0)
    assert row["cos_to_answer"] == pytest.approx(float(cosine), abs=1e-5)


def test_batch_equals_single_with_fitted_lenses(model: LanguageModel, tmp_path: Path) -> None:
    artifacts = folders(model, tmp_path, noise=0.3)
    together, apart = run(model, artifacts), run(model, artifacts, passes_per_batch=1)
    assert together.table.rows.select(KEY_COLUMNS).equals(apart.table.rows.select(KEY_COLUMNS))
    columns = ("entropy_bits", "kl_to_final_bits", "p_answer", "kl_to_final_bits_norm_temp")
    for column in columns:
        gap = (together.table.rows[column] - apart.table.rows[column]).abs().max()
        assert gap is not None and gap < 1e-3, column


@pytest.mark.parametrize("dies_after", [0, 1, 3])
def test_killed_and_resumed_equals_uninterrupted(
    llama: LanguageModel, tmp_path: Path, dies_after: int
) -> None:
    artifacts = folders(llama, tmp_path, noise=0.3, kinds=("tuned", "prism"))
    whole = run(llama, artifacts, passes_per_batch=2)
    units = Units(dies_after=dies_after)
    with pytest.raises(KeyboardInterrupt):
        run(llama, artifacts, passes_per_batch=2, units=units)
    units.dies_after = None
    resumed = run(llama, artifacts, passes_per_batch=2, units=units)
    assert resumed.summary == whole.summary
    assert resumed.table.meta == whole.table.meta
    assert resumed.table.rows.equals(whole.table.rows)


def test_units_belong_to_the_lens_not_to_its_folder(llama: LanguageModel, tmp_path: Path) -> None:
    units = Units()
    run(llama, folders(llama, tmp_path / "a", noise=0.3, kinds=("tuned",)), units=units)
    before = units.written
    run(llama, folders(llama, tmp_path / "b", noise=0.3, kinds=("tuned",)), units=units)
    assert units.written == before  # the same lens elsewhere
    run(llama, folders(llama, tmp_path / "a", noise=0.4, kinds=("tuned",)), units=units)
    assert units.written == 2 * before  # another lens in the same place


def test_in_run_temperatures_minimise_the_mean_divergence(model: LanguageModel) -> None:
    result = run(model, {})
    record = result.table.meta.norm_temperature
    assert record is not None and record["source"] == "in_run"
    chosen = [entry for entry in result.table.passes() if entry.prompt_index in record["prompts"]]
    assert [(entry.prompt_id, entry.prompt_variant) for entry in chosen] == [
        ("pos", "orig"), ("pos", "no_filler"), ("ctl", "orig")
    ]  # fmt: skip
    assert len(record["tau"]) == model.n_layers + 1 and record["tau"][-1] == 1.0
    norm, layer = NormLens(model), 1
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for entry in chosen:
        states = model.run([entry.text], capture=["resid_post.0"], logits="last")
        hidden = norm.transform(states["resid_post.0"][0, -1:], layer)
        pairs.append((hidden, states.logits[0, -1].double().log_softmax(-1)))

    def both_ways(hidden: torch.Tensor, final: torch.Tensor, tau: float) -> tuple[float, float]:
        log_p = model.unembedding.logits(hidden / tau)[0].double().log_softmax(-1)
        to = float((log_p.exp() * (log_p - final)).sum() / LN2)
        return to, float((final.exp() * (final - log_p)).sum() / LN2)

    def mean(tau: float) -> float:
        return sum(both_ways(*pair, tau)[1] for pair in pairs) / len(pairs)

    tau = record["tau"][layer]
    assert tau is not None
    assert mean(tau) <= min(mean(tau * 1.05), mean(tau / 1.05), mean(1.0)) + 1e-6
    row = result.table.rows.filter(
        pl.col("prompt_index") == chosen[0].prompt_index,
        pl.col("lens") == "norm", pl.col("layer") == layer, pl.col("is_last"),
    ).row(0, named=True)  # fmt: skip
    to, back = both_ways(*pairs[0], tau)
    assert row["kl_to_final_bits_norm_temp"] == pytest.approx(to, rel=1e-3, abs=1e-5)
    assert row["kl_from_final_bits_norm_temp"] == pytest.approx(back, rel=1e-3, abs=1e-5)


def test_a_fitted_temperature_comes_before_one_of_the_run(
    llama: LanguageModel, tmp_path: Path
) -> None:
    folder = str(stored("temperature", llama, tmp_path / "t", noise=0.2))
    config = LayersConfig(artifacts={"temperature": folder})  # not a lens of the run itself
    result = execute(plan(llama, PROMPTS, config))
    assert result.table.lenses == ["norm", "raw"]
    record = result.table.meta.norm_temperature
    assert record is not None and record["source"] == "artifact"
    beside = str(stored("tuned", llama, tmp_path / "u", noise=0.2, beside=("temperature",)))
    found = run(llama, {"tuned": beside}).table.meta.norm_temperature
    assert found is not None and found["fitted_with"] == "tuned"
    own = run(llama, {"temperature": folder})
    rows = own.table.rows.filter("is_last").sort(KEY_COLUMNS)
    tempered = rows.filter(pl.col("lens") == "norm")["kl_to_final_bits_norm_temp"]
    lens = rows.filter(pl.col("lens") == "temperature")["kl_to_final_bits"]
    assert (tempered - lens).abs().max() < 1e-5


def test_columns_that_make_no_sense_are_null(llama: LanguageModel, tmp_path: Path) -> None:
    rows = run(llama, folders(llama, tmp_path, kinds=("tuned",))).table.rows
    tuned = rows.filter(pl.col("lens") == "tuned", pl.col("is_last"))
    for column in ("kl_to_final_bits_norm_temp", "kl_norm_vs_raw_bits", "topk_jaccard_raw_norm"):
        assert tuned[column].null_count() == tuned.height, column
    full = [name for name in ("answer_rank", "cos_to_answer", "echo_mass_prompt") if name in rows]
    for column in (*IDENTITY, *full):
        if column != "fact_key" and column != "fact_index":
            assert tuned[column].null_count() == 0, column


def test_the_run_records_each_lens_and_its_hash(llama: LanguageModel, tmp_path: Path) -> None:
    result = run(llama, folders(llama, tmp_path, kinds=("tuned",)))
    meta, provenance = result.table.meta.lenses["tuned"], result.provenance["lenses"]["tuned"]
    assert len(meta["tensors_sha256"]) == 64 and meta["status"] == "ready"
    assert "folder" not in meta  # the table does not depend on where it lay
    assert provenance["folder"] == str(tmp_path / "tuned")


def test_auto_says_what_is_missing(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifacts = folders(llama, tmp_path, kinds=("tuned",))
    result = run(llama, artifacts, lenses=("auto",))
    assert result.table.lenses == ["norm", "raw", "tuned"]
    missing = result.summary["lens_comparison"]["not_run"]
    assert set(missing) == {"temperature", "bias", "prism", "jacobian"}
    assert all("layerscope fit" in entry["reason"] for entry in missing.values())
    assert result.summary["prism_summary"]["status"] == "missing"


def test_a_missing_lens_stops_the_plan(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LensError, match="layerscope fit tuned"):
        plan(llama, PROMPTS, LayersConfig(lenses=("norm", "tuned")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lenses": ("norm", "tunde")}, "did you mean 'tuned'"),
        ({"artifacts": {"norm": "x"}}, "folders belong to temperature"),
        ({"artifacts": {"tuned": "x"}}, "no lens of this run"),
        ({"diagnostics": "ful"}, "did you mean 'full'"),
    ],
)
def test_bad_configuration(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LayersConfig(**options)  # pyright: ignore[reportArgumentType]
