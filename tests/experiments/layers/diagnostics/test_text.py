"""Checks on held-out text: which text, what the last blocks are worth, what a tuned lens is."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerscope
from layerscope.errors import ConfigError
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.experiments.layers.diagnostics.heldout import held_out
from layerscope.experiments.layers.diagnostics.scoring import score
from layerscope.experiments.layers.diagnostics.skip_layers import skip_layers_sanity
from layerscope.experiments.layers.diagnostics.tuned_audit import tuned_audit
from layerscope.lenses.fitted import TemperatureLens, TunedLens
from layerscope.models import LanguageModel
from support.diagnosed import FACTS, FEW, Changed, demo, material, tuned_tensors
from support.tiny_models import tiny, tiny_tokenizer

COUNTING = (Fact(key="count", prompt="one two three four five six seven", answer="eight"),)


def test_text_that_says_nothing_to_the_model_is_replaced_by_its_own() -> None:
    text = held_out(material(demo()))
    assert text.source == "samples" and "bits on a token" in text.notes[0]
    assert text.tokens >= FEW.sample_tokens
    again = held_out(material(demo()))
    assert again == text  # the draws are seeded


def test_a_given_file_is_taken_with_a_warning_where_it_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    letters = random.Random(0).choices("qzxvkjw ", k=1500)
    file.write_text("".join(letters))
    text = held_out(material(demo(), text=str(file)))
    assert text.source == str(file) and "means little" in text.notes[0]


def test_text_of_the_embedded_models_own_kind_is_read_without_a_warning() -> None:
    text = held_out(material(demo(), text="layerscope-demo"))
    assert text.source == "layerscope-demo" and text.notes == ()
    assert text.tokens >= FEW.text_tokens


def test_a_file_that_a_lens_was_fitted_on_is_no_held_out_text(tmp_path: Path) -> None:
    file, other = tmp_path / "text.txt", tmp_path / "other.txt"
    for place in (file, other):
        place.write_text("Q: What is the capital of Italy?\nA: Rome\n" * 30)
    run = material(demo(), text=str(file))
    fitted = {"tuned": {"corpus": {"location": str(file)}}}
    run.table = replace(run.table, meta=replace(run.table.meta, lenses=fitted))
    assert ["what tuned was fitted on" in line for line in held_out(run).notes] == [True]
    run.text = str(other)
    assert held_out(run).notes == ()


def test_a_run_hands_its_text_to_the_checks(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Q: What is the capital of Italy?\nA: Rome\n" * 30)
    prompts = PromptSet("one", FACTS[:1])
    config = LayersConfig(diagnostics="standard", text=str(file))
    found = execute(plan(demo(), prompts, config)).summary["diagnostics"]
    assert found["skip_layers_sanity"]["text"]["source"] == str(file)
    file.write_text("  ")
    with pytest.raises(ConfigError, match="holds no text"):
        plan(demo(), prompts, config)
    with pytest.raises(ConfigError, match=r"missing\.txt. is n"):
        plan(demo(), prompts, replace(config, text=str(tmp_path / "missing.txt")))
    with pytest.raises(ConfigError, match="diagnostics"):
        replace(config, diagnostics="none")


def test_scores_are_the_models_own_cross_entropy() -> None:
    run = material(demo())
    scores = score(run)
    nats: list[Tensor] = []
    for batch in scores.text.batches:
        for row in batch:
            logits = demo().run([list(row)]).logits
            assert logits is not None
            log_p = logits[0, :-1].double().log_softmax(-1)
            nats.append(-log_p.gather(-1, torch.tensor(row)[1:, None])[:, 0])
    torch.testing.assert_close(torch.from_numpy(scores.full), torch.cat(nats), rtol=1e-4, atol=1e-4)


def test_batches_do_not_change_scores() -> None:
    run = material(demo())
    small = material(demo(), config=replace(run.config, batch_bytes=400_000))
    whole, parts = score(run), score(small)
    assert len(parts.text.batches) > len(whole.text.batches)
    assert small.passes[0].source == run.passes[0].source


def test_a_lens_that_is_worse_than_norm_fails_and_an_equal_one_does_not() -> None:
    worse = Changed(demo(), lambda hidden, _: hidden.roll(1, dims=-1), name="prism")
    equal = Changed(demo(), lambda hidden, _: hidden)
    section = skip_layers_sanity(material(demo(), lenses=[worse, equal]))
    assert section["gates"] == {
        "no_worse_than_norm.prism": False,
        "no_worse_than_norm.tuned": True,
    }
    assert section["lens"] == "tuned"
    assert section["m=2"] < section["m=4"]  # without more blocks, worse
    assert section["by_lens"]["tuned"]["against_norm"]["m=2"]["bits_more"] == 0.0
    assert section["tuned_lens_regression"] is True


def tuned(model: LanguageModel, **tensors: Tensor) -> TunedLens:
    return TunedLens(model, tuned_tensors(model) | tensors)


def test_a_lens_that_changes_nothing_gains_nothing() -> None:
    section = tuned_audit(material(demo(), lenses=[tuned(demo())]))
    assert section["gates"]["tuned_gains_on_text"] is False
    assert section["gates"]["tuned_gains_on_prompts"] is False
    assert section["gates"]["tuned_last_row_is_head"] is True
    gains = {row["delta_kl_bits_tuned"] for row in section["variants"]}
    assert gains == {0.0}


def overconfident() -> LanguageModel:
    """Return a model whose rows all hold the last one, and whose inner norms are five times louder.

    Under `next_norm` its logits are five times those of the head: one temperature explains it all.
    """
    module = tiny("llama")
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
            block.input_layernorm.weight.copy_(5.0 * module.model.norm.weight)
    return layerscope.load(module, tokenizer=tiny_tokenizer())


def audited(model: LanguageModel, *lenses: Any) -> dict[str, Any]:
    config = LayersConfig(norm_choice="next_norm")
    return tuned_audit(material(model, COUNTING, lenses=lenses, config=config))


def test_a_lens_that_only_calibrates_is_called_so() -> None:
    model = overconfident()
    inverse = torch.full((model.n_layers,), 0.2)
    tensors = tuned_tensors(model) | {"inverse_temperature": inverse}
    section = audited(model, TunedLens(model, tensors, norm="next_norm"))
    assert section["gates"]["tuned_gains_on_text"] is True
    assert section["gates"]["tuned_is_more_than_calibration"] is False
    gains = section["on_text"]["rotation_vs_temperature"]
    assert gains["delta_kl_rot_p50"] == 0.0
    assert gains["delta_kl_temp_p50"] == pytest.approx(gains["delta_kl_tuned_p50"])
    assert section["on_text"]["variants"][0]["kl_bits_tuned"] < 1e-5


@pytest.mark.parametrize(("inverse", "gains"), [(0.2, True), (2.0, False)])
def test_gains_on_the_runs_own_prompts_are_those_of_its_passes(inverse: float, gains: bool) -> None:
    """The norm lens is five times too sure: a fifth of that is the model, twice that is farther."""
    model = overconfident()
    tensors = tuned_tensors(model)
    tensors["inverse_temperature"] = torch.full((model.n_layers,), inverse)
    section = audited(model, TunedLens(model, tensors, norm="next_norm"))
    assert section["gates"]["tuned_gains_on_prompts"] is gains
    assert (section["gain_on_prompts_p50"] > 0.1) is gains
    told = [line for line in section["warnings"] if "on the run's own prompts" in line]
    assert bool(told) is not gains
    if gains:
        baseline = [row["kl_bits_baseline"] for row in section["variants"]]
        found = [row["delta_kl_bits_tuned"] for row in section["variants"]]
        assert found == pytest.approx(baseline, abs=1e-5)  # nothing is left to gain


def test_a_temperature_that_was_fitted_apart_and_does_better_is_told() -> None:
    model = overconfident()
    tensors = tuned_tensors(model)
    half = tensors | {"inverse_temperature": torch.full((model.n_layers,), 0.4)}
    best = {"inverse_temperature": torch.full((model.n_layers,), 0.2)}
    section = audited(
        model,
        TunedLens(model, half, norm="next_norm"),
        TemperatureLens(model, best, norm="next_norm"),
    )
    assert section["gates"]["tuned_gains_on_text"] is True
    assert section["on_text"]["beyond_temperature_p50"] < 0
    assert section["gates"]["tuned_is_more_than_calibration"] is False


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    n, d = demo().n_layers, demo().d_model
    lens = tuned(
        demo(),
        weight=0.05 * torch.randn(n, d, d, generator=generator),
        bias=torch.randn(n, d, generator=generator),
        inverse_temperature=torch.full((n,), 0.5),
    )
    section = tuned_audit(material(demo(), lenses=[lens]))
    for row in section["variants"]:
        delta = {key.removeprefix("delta_kl_bits_"): row[key] for key in row if "delta" in key}
        whole = delta["rot_only"] + delta["temp_only"] + delta["interaction"]
        assert whole == pytest.approx(delta["tuned"], abs=1e-4)
        parts = delta["matrix_only"] + delta["own_bias_only"] + delta["matrix_bias_interaction"]
        assert parts == pytest.approx(delta["rot_only"], abs=1e-4)
    assert {row["prompt_index"] for row in section["positions"]} == {0, 1, 2}
    assert all(row["answer_rank_baseline"] >= 1 for row in section["positions"])


@pytest.mark.parametrize("shifts", [True, False])
def test_a_lens_that_shifts_with_position_is_found(shifts: bool) -> None:
    """One coordinate of the stream is nothing but a mark of late positions; the lens reads it."""
    module = tiny("gpt2")
    late, mark = int(0.9 * (FEW.sample_length - 2)), 0
    with torch.no_grad():
        module.transformer.wte.weight[:, mark] = 0.0
        module.transformer.wpe.weight[:, mark] = 0.0
        module.transformer.wpe.weight[late:, mark] = 50.0
        for block in module.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight[:, mark] = 0.0
                projection.bias[mark] = 0.0
            block.ln_1.weight[mark] = block.ln_2.weight[mark] = 0.0
    model = layerscope.load(module, tokenizer=tiny_tokenizer())
    weight = tuned_tensors(model)["weight"]
    if shifts:
        generator = torch.Generator().manual_seed(0)
        weight[:, :, mark] = 20.0 * torch.randn(model.d_model, generator=generator)
    weight[:, mark, mark] = -1.0  # the mark itself is hidden from the norm
    settings = replace(FEW, sample_tokens=800)
    run = material(model, COUNTING, lenses=[tuned(model, weight=weight)], settings=settings)
    section = tuned_audit(run)
    assert section["gates"]["tuned_holds_at_later_positions"] is not shifts
    assert any("later positions" in line for line in section["warnings"]) is shifts


class WrongAtTheEnd(TunedLens):
    def transform(self, residual: Tensor, layer: int) -> Tensor:
        hidden = super().transform(residual, layer)
        return hidden * 2.5 if layer == self._model.n_layers else hidden


def test_a_last_row_that_is_not_the_head_is_found() -> None:
    section = tuned_audit(material(demo(), lenses=[WrongAtTheEnd(demo(), tuned_tensors(demo()))]))
    assert section["gates"]["tuned_last_row_is_head"] is False
    assert section["head_mismatch"]["tau_star_modelcal"] == pytest.approx(2.5, rel=1e-3)


def test_without_a_tuned_lens_there_is_a_reason() -> None:
    section = tuned_audit(material(demo(), FACTS[:1]))
    assert section["status"] == "skipped" and "layerscope fit tuned" in section["reason"]
