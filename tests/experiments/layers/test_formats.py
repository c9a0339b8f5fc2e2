"""Which text the layers experiment gives to a model, and that it says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import layerscope
from layerscope.errors import ConfigError, PromptError
from layerscope.experiments.layers import Fact, LayersConfig, PromptSet, execute, plan
from layerscope.measures.table import LayersTable, PromptInfo
from layerscope.models import LanguageModel, Prompt
from layerscope.models.prompt import prompt_sha256, render
from support.chat_templates import CHATML, GEMMA, STYLES, chat_tokenizer
from support.tiny_models import tiny, tiny_tokenizer

FACT = Fact(key="a", prompt="The capital of Japan", answer="Tokyo", foil="Rome")
PROMPTS = PromptSet("one", (FACT,))


def load(template: str | None, **options: Any) -> LanguageModel:
    return layerscope.load(tiny("llama"), tokenizer=chat_tokenizer(template), **options)


def info_of(model: LanguageModel, **options: Any) -> PromptInfo:
    return execute(plan(model, PROMPTS, LayersConfig(**options))).table.meta.prompts[0]


@pytest.mark.parametrize("style", STYLES)
def test_an_instruct_model_reads_its_own_chat(style: str) -> None:
    model = load(STYLES[style], instruct=True)
    result = execute(plan(model, PROMPTS))
    info = result.table.meta.prompts[0]
    asked = Prompt(FACT.prompt, format="chat", template="completion/1")
    ids = model.tokenize(asked).row_ids(0)
    strings = model.token_strings()
    assert (info.format, info.template, info.text) == ("chat", "completion/1", FACT.prompt)
    assert info.tokens == tuple(strings[id_] for id_ in ids)
    assert info.tokens.count("<bos>") == 1
    assert model.tokenizer.decode(info.prompt_ids) == FACT.prompt
    assert info.prompt_sha256 == prompt_sha256(ids, render(model.tokenizer, asked))
    # The answer begins the assistant's turn, whose opening ends in a line break.
    assert model.tokenizer.decode(info.answer_ids) == "Tokyo" and info.answer_variant == "no_space"
    # A run of the same prompt, without the experiment, predicts the same.
    logits = model.run(asked, logits="last").logits
    assert logits is not None and info.head is not None
    assert info.head.top_ids[0] == int(logits[0, -1].argmax())
    assert info.head.p_answer == pytest.approx(
        float(logits[0, -1].double().softmax(-1)[info.answer_ids[0]]), rel=1e-5
    )
    last = result.table.last(lens="norm").filter(layer=model.n_layers)
    assert last["kl_to_final_bits"][0] < 1e-4
    assert result.provenance["prompts"]["format"] == "chat"
    assert result.provenance["prompts"]["format_reason"] == "instruct=True was given"
    assert result.summary["passes"][0]["prompt_sha256"] == info.prompt_sha256


def test_a_base_model_reads_raw_text_whatever_its_tokenizer_brings() -> None:
    with_template, without = info_of(load(CHATML)), info_of(load(None))
    assert with_template == without
    assert with_template.format == "raw" and with_template.tokens[0] == "<bos>"
    assert "nothing says that it was tuned" in load(CHATML).provenance()["instruct_reason"]


def test_a_chat_for_a_base_model_is_refused_before_any_work() -> None:
    message = "prompt 'a' .orig.: a chat prompt for a base model .*: use format='raw'"
    for template in (None, CHATML):
        with pytest.raises(PromptError, match=message):
            plan(load(template), PROMPTS, LayersConfig(format="chat"))


def test_raw_text_for_an_instruct_model_warns_once() -> None:
    model = load(CHATML, instruct=True)
    prompts = PromptSet("two", (FACT, Fact(key="b", prompt="One two", answer="three")))
    with pytest.warns(UserWarning, match="raw text for an instruct model") as caught:
        planned = plan(model, prompts, LayersConfig(format="raw"))
        execute(planned)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        execute(plan(load(CHATML, instruct=True), prompts))


def test_raw_text_is_what_the_model_was_given_as_a_string() -> None:
    model = load(None)
    info = info_of(model)
    plain = tuple(tiny_tokenizer()(FACT.prompt, add_special_tokens=False)["input_ids"])
    assert info.prompt_ids == plain
    assert len(info.tokens) == len(plain) + 1
    assert info.prompt_sha256 == prompt_sha256(
        model.tokenize(FACT.prompt).row_ids(0),
        render(model.tokenizer, Prompt(FACT.prompt, template="completion/1")),
    )


def test_formats_systems_and_tasks_have_hashes_and_units_of_their_own() -> None:
    model = load(CHATML, instruct=True)
    options: list[dict[str, Any]] = [
        {},
        {"system": "Be brief."},
        {"task": "qa"},
        {"format": "chat", "task": "qa", "system": "Be brief."},
    ]
    plans = [plan(model, PROMPTS, LayersConfig(**option)) for option in options]
    prepared = [planned.units[0].passes[0] for planned in plans]
    assert len({item.prompt_sha256 for item in prepared}) == len(options)
    assert len({planned.units[0].key for planned in plans}) == len(options)
    assert prepared[2].rendered.template == "qa/1"
    decoded = model.tokenizer.decode(prepared[1].prompt_ids)
    assert decoded == "Be brief." + FACT.prompt  # what was written, not what the template adds


def test_the_same_passes_under_another_chat_template_are_other_units() -> None:
    keys = {
        plan(load(template, instruct=True), PROMPTS).units[0].key for template in (CHATML, GEMMA)
    }
    assert len(keys) == 2


def test_a_template_that_rewrites_leaves_all_but_special_tokens_as_the_prompt() -> None:
    model = load(GEMMA.replace("| trim", "| upper"), instruct=True)
    info = info_of(model)
    text = model.tokenizer.decode(info.prompt_ids)
    assert "THE CAPITAL OF JAPAN" in text and "<bos>" not in text


def test_the_table_keeps_the_format_on_disk(tmp_path: Path) -> None:
    result = execute(plan(load(GEMMA, instruct=True), PROMPTS))
    result.table.write_parquet(tmp_path / "t.parquet")
    assert LayersTable.read_parquet(tmp_path / "t.parquet").meta.prompts == (
        result.table.meta.prompts
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"system": "Be brief."}, "prompt 'a' .orig.: system belongs to a chat"),
        ({"task": "icl"}, "prompt 'a' .orig.: template icl/1 needs shots"),
        ({"task": "chat"}, "has no raw form"),
    ],
)
def test_what_a_base_model_cannot_be_asked(options: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        plan(load(None), PROMPTS, LayersConfig(**options))
    with pytest.raises(ConfigError, match="unknown task"):
        plan(load(None), PROMPTS, LayersConfig(task="qaa"))


def test_edits_and_baseline_read_the_same_ids() -> None:
    model = load(GEMMA, instruct=True)
    asked = Prompt("One two", answer_prefix="three")
    plain = model.run(asked, capture="resid_post.0", logits="last")
    edited = model.run(asked, edits=[layerscope.models.Scale("resid_post.0", 1.0)], logits="last")
    assert torch.equal(plain.batch.ids, edited.batch.ids)
    assert torch.equal(plain.logits, edited.logits)  # type: ignore[arg-type]
