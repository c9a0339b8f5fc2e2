"""The typed table against a slow, obvious reading of the same model by hand."""

from __future__ import annotations

import math

import polars as pl
import pytest
import torch

from layerscope.experiments.layers import Fact, LayersConfig, PromptSet
from layerscope.experiments.layers.decode import BatchDecoder
from layerscope.experiments.layers.prepare import prepare, work_units
from layerscope.lenses import get_lens
from layerscope.measures.table import KEY_COLUMNS, PromptInfo
from layerscope.models import LanguageModel, load
from support.tiny_models import tiny, tiny_tokenizer

LN2 = math.log(2.0)
FACTS = (
    Fact(key="one", prompt="The capital of Germany is", answer="Berlin", foil="Paris"),
    Fact(key="two", prompt="Once upon a time there was a little", answer="girl"),
    Fact(key="three", prompt="Two and two make", answer="exactly four", ablated="Two and two"),
)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return load(tiny(request.param), tokenizer=tiny_tokenizer())


def decoded(
    model: LanguageModel, facts: tuple[Fact, ...] = FACTS, **options: object
) -> tuple[pl.DataFrame, list[PromptInfo]]:
    config = LayersConfig(**options)  # pyright: ignore[reportArgumentType]
    prepared = prepare(model, PromptSet("test", facts).passes(), LayersConfig())
    lenses = [get_lens(name, model, norm=config.norm_choice) for name in config.lenses]
    decoder = BatchDecoder(model, lenses, config)
    units = work_units(
        prepared, config, n_layers=model.n_layers, d_model=model.d_model, identity={}
    )
    frames, infos = [], []
    for unit in units:
        frame, found = decoder.decode(unit.passes)
        frames.append(frame)
        infos += found
    return pl.concat(frames).sort(KEY_COLUMNS), infos


def one(frame: pl.DataFrame, **where: object) -> dict[str, object]:
    rows = frame.filter(*(pl.col(name) == value for name, value in where.items()))
    assert rows.height == 1
    return rows.row(0, named=True)


def test_last_rows_by_hand(model: LanguageModel) -> None:
    frame, infos = decoded(model)
    info = infos[0]
    run = model.run([FACTS[0].prompt], capture=["resid_pre.0", "resid_post.*"], logits="last")
    final = run.logits[0, -1].double().log_softmax(-1)
    answer, foil = info.answer_ids[0], info.foil_id
    for layer in range(model.n_layers + 1):
        site = "resid_pre.0" if layer == 0 else f"resid_post.{layer - 1}"
        residual = run[site][0, -1:]
        _, norm = model.norm_at(model.n_layers, "final")
        hidden = {"raw": residual, "norm": norm(residual)}
        by_hand = {
            name: model.unembedding.logits(vector)[0].double().log_softmax(-1)
            for name, vector in hidden.items()
        }
        for name, log_p in by_hand.items():
            row = one(frame, prompt_index=0, lens=name, layer=layer, is_last=True)
            p = log_p.exp()
            expected = {
                "entropy_bits": -(p * log_p).sum() / LN2,
                "kl_to_final_bits": (p * (log_p - final)).sum() / LN2,
                "kl_from_final_bits": (final.exp() * (final - log_p)).sum() / LN2,
                "l1_to_final": (p - final.exp()).abs().sum(),
                "p_answer": p[answer],
                "p_foil": p[foil],
                "answer_log2p": log_p[answer] / LN2,
                "p_top1": p.max(),
                "p_top5": p.topk(5).values.sum(),
                "resid_norm": residual.norm(),
                "echo_mass_prompt": p[sorted(set(info.prompt_ids))].sum(),
            }
            for column, value in expected.items():
                assert row[column] == pytest.approx(float(value), rel=2e-4, abs=2e-5), column
            # Ranked before a softcap, which makes ties of what lies far above it.
            order = hidden[name][0].double() @ model.unembedding.weight.double().T
            assert row["answer_rank"] == 1 + int((order > order[answer]).sum())
            assert row["top_ids"][0] == int(order.argmax())
            if name == "norm":
                raw = by_hand["raw"]
                kl = float((p * (log_p - raw)).sum() / LN2)
                assert row["kl_norm_vs_raw_bits"] == pytest.approx(kl, rel=2e-4, abs=2e-5)
                mixed = ((p + raw.exp()) / 2).log()
                js = (p * (log_p - mixed)).sum() + (raw.exp() * (raw - mixed)).sum()
                assert row["js_norm_raw_bits"] == pytest.approx(float(js / 2 / LN2), abs=2e-5)


def test_last_row_of_the_norm_lens_is_the_models_own_prediction(model: LanguageModel) -> None:
    frame, infos = decoded(model)
    last = frame.filter(pl.col("layer") == model.n_layers, pl.col("lens") == "norm")
    assert last["kl_to_final_bits"].max() < 1e-5
    assert (last["final_top1_rank"] == 1).all()
    ends = last.filter("is_last")
    assert ends["cos_to_final"].min() == pytest.approx(1.0, abs=1e-6)
    for info in infos:
        fit = next(row for row in info.last_rows if row.lens == "norm")
        assert fit.top1_agree and fit.kl_to_final_bits < 1e-5
        assert fit.temp_est == pytest.approx(1.0)


def test_whole_answer_is_scored_token_by_token(model: LanguageModel) -> None:
    frame, infos = decoded(model)
    info = next(entry for entry in infos if entry.fact_key == "three")
    assert len(info.answer_ids) > 1
    total = 0.0
    ids = model.tokenize([info.text]).ids[0].tolist()
    for token in info.answer_ids:
        logits = model.run([ids], logits="last").logits[0, -1].double().log_softmax(-1)
        total += float(logits[token]) / LN2
        ids.append(token)
    where = {"prompt_index": info.prompt_index, "is_last": True, "lens": "norm"}
    row = one(frame, layer=model.n_layers, **where)
    assert row["answer_full_log2p"] == pytest.approx(total, rel=1e-4)
    assert row["answer_full_log2p"] < row["answer_log2p"]


def test_batch_equals_single_and_no_answer_token_leaks(model: LanguageModel) -> None:
    together, _ = decoded(model)
    apart, _ = decoded(model, passes_per_batch=1)
    assert together.select(KEY_COLUMNS).equals(apart.select(KEY_COLUMNS))
    for column in ("entropy_bits", "kl_to_final_bits", "p_answer", "resid_norm", "cos_to_final"):
        gap = (together[column] - apart[column]).abs().max()
        assert gap is not None and gap < 1e-4, column
    # Positions of the answer are run but are no rows of the table.
    lengths = {entry.prompt_index: len(entry.tokens) for entry in decoded(model)[1]}
    for index, length in lengths.items():
        assert together.filter(pl.col("prompt_index") == index)["pos"].max() == length - 1


def test_products_and_tiles_change_only_rounding(model: LanguageModel) -> None:
    usual, _ = decoded(model)
    other, _ = decoded(model, products="default", readout_bytes=64 * 1024)
    for column in ("entropy_bits", "kl_to_final_bits", "kl_norm_vs_raw_bits", "p_answer"):
        gap = (usual[column] - other[column]).abs().max()
        assert gap is not None and gap < 1e-3, column


def test_norm_choice_is_recorded_and_changes_the_middle_rows(model: LanguageModel) -> None:
    final, _ = decoded(model)
    following, _ = decoded(model, norm_choice="next_norm")
    where = (pl.col("lens") == "norm") & (pl.col("layer") == 1)
    assert (final.filter(where)["norm_choice"] == "final").all()
    assert (following.filter(where)["norm_choice"] == "next_norm").all()
    modules = (
        following.filter(pl.col("lens") == "norm")
        .group_by("layer")
        .agg(pl.col("norm_module").unique())
    )
    assert all(len(entry) == 1 for entry in modules["norm_module"])
    assert len({entry[0] for entry in modules["norm_module"]}) == model.n_layers + 1
    assert not final.filter(where)["entropy_bits"].equals(following.filter(where)["entropy_bits"])
    last = following.filter(pl.col("layer") == model.n_layers, pl.col("lens") == "norm")
    assert last["kl_to_final_bits"].max() < 1e-5


def test_without_gradients_or_leftover_hooks(model: LanguageModel) -> None:
    decoded(model)
    module = model._loaded.model
    assert all(not part._forward_hooks for part in module.modules())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.get_float32_matmul_precision() == "highest"
