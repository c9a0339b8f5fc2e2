from __future__ import annotations

import datetime
from typing import Any

import pytest

from layerscope.errors import ConfigError, PromptError
from layerscope.models import chat
from layerscope.models.chat import Message, decide_tuning, find_tuning, render_chat
from support.chat_templates import CHATML, DEAF, GEMMA, LLAMA3, STYLES, chat_tokenizer
from support.tiny_models import tiny_tokenizer

HELLO = [Message("user", "Hello")]


class TestTuning:
    @pytest.mark.parametrize(
        "name",
        [
            "Llama-3.1-8B-Instruct",
            "Mistral-7B-Instruct-v0.3",
            "gemma-2-2b-it",
            "Llama-2-7b-chat-hf",
            "Qwen2.5-0.5B-Instruct-AWQ",
            "Llama-3-Base-8B-SFT-DPO",
            "chatglm3-6b",
        ],
    )
    def test_a_word_of_the_name_says_instruct(self, name: str) -> None:
        tuning = decide_tuning(name, has_template=True)
        assert tuning.instruct and tuning.default_format == "chat"
        assert "its name says" in tuning.reason

    @pytest.mark.parametrize(
        "name", ["Qwen2.5-0.5B", "Qwen3-8B-Base", "gemma-3-1b-pt", "pythia-70m", "digit-finder"]
    )
    def test_a_template_alone_makes_no_instruct_model(self, name: str) -> None:
        tuning = decide_tuning(name, has_template=True)
        assert not tuning.instruct and tuning.default_format == "raw"

    def test_without_a_template_no_name_helps(self) -> None:
        tuning = decide_tuning("pythia-70m-instruct", has_template=False, eos_ends_turn=True)
        assert not tuning.instruct and "no chat template" in tuning.reason

    def test_an_eos_that_ends_turns_says_instruct_unless_the_name_says_base(self) -> None:
        assert decide_tuning("Qwen3-8B", has_template=True, eos_ends_turn=True).instruct
        assert not decide_tuning("Qwen3-8B-Base", has_template=True, eos_ends_turn=True).instruct

    def test_the_user_has_the_last_word(self) -> None:
        assert decide_tuning("checkpoint-500", has_template=True, instruct=True).instruct
        assert not decide_tuning("x-instruct", has_template=True, instruct=False).instruct
        with pytest.raises(ConfigError, match="has none: set"):
            decide_tuning("x", has_template=False, instruct=True)

    def test_the_tokenizer_is_asked(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        assert not find_tuning(tokenizer, "some/model").instruct
        tokenizer.eos_token = "<|im_end|>"
        assert find_tuning(tokenizer, "some/model").instruct
        assert not find_tuning(tiny_tokenizer(), "some/model-instruct").instruct

    def test_an_eos_that_also_begins_texts_proves_nothing(self) -> None:
        tokenizer = chat_tokenizer("{% for m in messages %}{{ m.content }}<bos>{% endfor %}")
        tokenizer.eos_token = "<bos>"
        assert not find_tuning(tokenizer, "gpt").instruct

    @pytest.mark.parametrize(
        ("source", "instruct"),
        [
            ("meta/Llama-3-8B-Instruct", True),
            ("/home/it/models/llama/", False),
            ("/cache/models--meta--Llama-3-8B-Instruct/snapshots/0a1b2c", True),
            ("C:\\models\\gemma-2b-it", True),
            ("", False),
        ],
    )
    def test_only_the_models_own_name_counts(self, source: str, instruct: bool) -> None:
        assert find_tuning(chat_tokenizer(LLAMA3), source).instruct is instruct

    def test_a_template_that_cannot_be_rendered_decides_nothing(self) -> None:
        tokenizer = chat_tokenizer("{{ raise_exception('no') }}")
        assert not find_tuning(tokenizer, "some/model").instruct


class TestRender:
    @pytest.mark.parametrize("style", STYLES)
    def test_renders_what_transformers_renders(self, style: str) -> None:
        tokenizer = chat_tokenizer(STYLES[style])
        turns = [("user", " Hello "), ("assistant", "Hi"), ("user", "Who are you?")]
        messages = [Message(role, content) for role, content in turns]
        for opening in (True, False):
            expected = tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in turns],
                tokenize=False,
                add_generation_prompt=opening,
            )
            assert render_chat(tokenizer, messages, add_generation_prompt=opening).text == expected

    @pytest.mark.parametrize("style", STYLES)
    def test_parts_are_where_the_contents_stand(self, style: str) -> None:
        messages = [
            Message("user", " user "),  # also the name of a role
            Message("assistant", "{{ 1 + 1 }} user\n"),
            Message("user", "user\n\nuser"),
        ]
        rendered = render_chat(chat_tokenizer(STYLES[style]), messages, answer_prefix=" As")
        assert rendered.parts is not None and rendered.text.endswith(" As")
        shown = [rendered.text[start:end] for start, end in rendered.parts]
        kept = [message.content for message in messages]
        if style != "chatml":  # the others trim
            kept = [content.strip() for content in kept]
        assert shown == [*kept, " As"]
        assert list(rendered.parts) == sorted(rendered.parts)

    def test_no_parts_where_the_template_rewrites(self) -> None:
        upper = chat_tokenizer(CHATML.replace("m.content", "m.content | upper"))
        rendered = render_chat(upper, [Message("user", "UPPER already")])
        assert rendered.parts is None and "UPPER ALREADY" in rendered.text
        twice = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"))
        assert render_chat(twice, HELLO).parts is None
        by_length = "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}"
        assert render_chat(chat_tokenizer(by_length), HELLO).parts is None

    def test_the_clock_stands_still(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokenizer = chat_tokenizer("\n" + LLAMA3)
        messages = [Message("system", "Be brief."), *HELLO]
        rendered = render_chat(tokenizer, messages)
        assert "Today: 26 Jul 2024\nBe brief." in rendered.text
        monkeypatch.setattr(chat, "TEMPLATE_DATE", datetime.date(2001, 2, 3))
        dated = tokenizer.apply_chat_template([m._asdict() for m in messages], tokenize=False)
        today = datetime.datetime.now().strftime("%d %b %Y")
        moved = render_chat(tokenizer, messages, add_generation_prompt=False)
        assert moved.text == dated.replace(today, "03 Feb 2001")

    def test_a_template_cannot_reach_out(self) -> None:
        tokenizer = chat_tokenizer("{{ messages.__class__.__mro__ }}")
        with pytest.raises(PromptError, match="the chat template refuses"):
            render_chat(tokenizer, HELLO)


class TestRefused:
    @pytest.mark.parametrize(
        ("template", "messages", "says"),
        [
            (None, HELLO, "has none: use format='raw'"),
            (GEMMA, [Message("system", "x"), *HELLO], "System role not supported; change"),
            (DEAF, [Message("system", "user"), *HELLO], "drops the system message"),
            (CHATML, [Message("user", "a <bos> b")], "spells the BOS '<bos>'"),
            ("{{ broken", HELLO, "refuses the roles"),
            ("{{ nothing.at_all }}", HELLO, "nothing"),
        ],
    )
    def test_says_the_fix_in_one_line(
        self, template: Any, messages: list[Message], says: str
    ) -> None:
        tokenizer = chat_tokenizer(template)
        with pytest.raises(PromptError, match=says) as caught:
            render_chat(tokenizer, messages)
        assert "\n" not in str(caught.value)

    def test_a_bos_in_the_prefix(self) -> None:
        with pytest.raises(PromptError, match="spells the BOS"):
            render_chat(chat_tokenizer(CHATML), HELLO, answer_prefix="<bos>")

    def test_several_templates_without_a_default(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
        with pytest.raises(PromptError, match="multiple chat templates"):
            render_chat(tokenizer, HELLO)
