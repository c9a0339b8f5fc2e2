from __future__ import annotations

import warnings
from typing import Any

import pytest

from layerscope.errors import PromptError
from layerscope.models.chat import Message, Tuning
from layerscope.models.prompt import Prompt, prompt_sha256, render
from layerscope.models.prompts import tokenize
from support.chat_templates import CHATML, GEMMA, LLAMA3, chat_tokenizer
from support.tiny_models import tiny_tokenizer

INSTRUCT, BASE = Tuning(True, "tested"), Tuning(False, "tested")


class TestFormat:
    def test_a_string_is_raw_and_a_prompt_takes_the_models_default(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        raw = tokenize(tokenizer, "Paris").row_ids(0)
        chat = tokenize(tokenizer, Prompt("Paris", format="chat")).row_ids(0)
        assert raw != chat
        with pytest.warns(UserWarning, match="raw text for an instruct model"):
            assert tokenize(tokenizer, "Paris", tuning=INSTRUCT).row_ids(0) == raw
        assert tokenize(tokenizer, Prompt("Paris"), tuning=INSTRUCT).row_ids(0) == chat
        assert tokenize(tokenizer, Prompt("Paris"), tuning=BASE).row_ids(0) == raw
        assert tokenize(tokenizer, Prompt("Paris")).row_ids(0) == raw
        explicit = Prompt("Paris", format="raw")
        assert tokenize(tokenizer, explicit, tuning=INSTRUCT).row_ids(0) == raw

    def test_raw_text_for_an_instruct_model_warns_once(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenize(tokenizer, Prompt("Paris"), tuning=INSTRUCT)
            tokenize(tokenizer, Prompt(ids=(5, 6)), tuning=INSTRUCT)
            tokenize(tokenizer, "Paris", tuning=BASE)
            tokenize(tokenizer, " and on", tuning=INSTRUCT, prepend_bos=False)
        with pytest.warns(UserWarning) as caught:
            for _ in range(3):
                tokenize(tokenizer, ["Paris", "Rome"], tuning=INSTRUCT)
        assert len(caught) == 1
        with pytest.warns(UserWarning):  # another model is another matter
            tokenize(chat_tokenizer(CHATML), Prompt("Paris", format="raw"), tuning=INSTRUCT)

    def test_a_chat_for_a_base_model_is_refused(self) -> None:
        chat = Prompt("Paris", format="chat", key="p")
        message = r"prompt 1 \('p'\): a chat prompt for a base model \(tested\): use format='raw'"
        with pytest.raises(PromptError, match=message) as caught:
            tokenize(chat_tokenizer(CHATML), ["Rome", chat], tuning=BASE)
        assert "\n" not in str(caught.value)
        with pytest.raises(PromptError, match="has none: use format='raw'"):
            tokenize(tiny_tokenizer(), chat)

    def test_a_chat_batch_holds_what_each_chat_is_alone(self) -> None:
        tokenizer = chat_tokenizer(LLAMA3)
        chats = [Prompt("Paris", format="chat"), Prompt("Paris", system="One", format="chat")]
        both = tokenize(tokenizer, [*chats, "Paris"], padding_side="left")
        for row, prompt in enumerate([*chats, "Paris"]):
            assert both.row_ids(row) == tokenize(tokenizer, prompt).row_ids(0)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"text": "a", "messages": [("user", "b")]}, "exactly one"),
            ({"ids": (1,), "format": "chat"}, "ids are taken as they are"),
            ({"ids": (1,), "system": "x"}, "ids are taken as they are"),
            ({"text": "a", "format": "caht"}, "did you mean 'chat'"),
            ({"text": "a", "format": "raw", "system": "x"}, "system belongs to a chat"),
            ({"messages": [("user", "b")], "format": "raw"}, "messages belongs to a chat"),
            ({"text": "a", "format": "raw", "answer_prefix": "x"}, "answer_prefix belongs"),
            ({"messages": []}, "at least one"),
            ({"messages": "hello"}, "a list of turns"),
            ({"messages": ["hi"]}, "message 0 must be"),
            ({"messages": [("user", "a"), {"role": "user"}]}, "message 1 must be"),
            ({"messages": [{"role": "user", "content": 3}]}, "message 0 must be"),
            ({"messages": [3]}, "message 0 must be"),
            ({"messages": [("user", "")]}, "the user message is empty"),
            ({"text": "a", "system": ""}, "the system message is empty"),
            ({"text": "", "format": "chat"}, "the user message is empty"),
            ({"messages": [("system", "a"), ("user", "b")], "system": "c"}, "two system"),
            ({"messages": [("user", "a"), ("assistant", "b")]}, "pass it as answer_prefix"),
            (
                {"text": "a", "answer_prefix": "b", "add_generation_prompt": False},
                "answer_prefix needs",
            ),
        ],
    )
    def test_parts_that_contradict_each_other(self, arguments: Any, says: str) -> None:
        with pytest.raises(PromptError, match=says) as caught:
            Prompt(**arguments)
        assert "\n" not in str(caught.value)

    def test_an_empty_prompt_without_a_format(self) -> None:
        for tuning in (INSTRUCT, BASE):
            with pytest.raises(PromptError, match="empty"):
                tokenize(chat_tokenizer(CHATML), Prompt(""), tuning=tuning)

    def test_messages_of_every_kind_are_one_prompt(self) -> None:
        pairs = Prompt(messages=[("user", "a")])
        assert pairs == Prompt(messages=[{"role": "user", "content": "a"}])
        assert pairs == Prompt(messages=(Message("user", "a"),))
        assert pairs.format == "chat" and hash(pairs) == hash(Prompt(messages=[("user", "a")]))

    def test_a_finished_conversation_and_a_begun_answer(self) -> None:
        tokenizer = chat_tokenizer(GEMMA)
        said = [("user", "One"), ("assistant", "Two")]
        finished = render(tokenizer, Prompt(messages=said, add_generation_prompt=False)).text
        begun = render(tokenizer, Prompt("One", answer_prefix="Tw")).text
        assert finished == "<bos><turn>user\nOne</turn>\n<turn>model\nTwo</turn>\n"
        assert begun == "<bos><turn>user\nOne</turn>\n<turn>model\nTw"

    def test_the_hash_covers_text_format_template_and_ids(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        kinds = [
            Prompt("Paris"),
            Prompt("Rome"),
            Prompt("Paris", format="chat"),
            Prompt("Paris", system="x"),
            Prompt("Paris", template="qa/1"),
        ]
        hashes = [
            prompt_sha256(tokenize(tokenizer, kind).row_ids(0), render(tokenizer, kind))
            for kind in kinds
        ]
        assert len(set(hashes)) == len(kinds) and all(len(one) == 64 for one in hashes)
        again = prompt_sha256(
            tokenize(tokenizer, Prompt("Paris", key="k")).row_ids(0), render(tokenizer, kinds[0])
        )
        assert again == hashes[0]
        assert prompt_sha256((5, 6)) != prompt_sha256((5, 7))
        with pytest.raises(PromptError, match="have no text"):
            render(tokenizer, Prompt(ids=(5, 6)))
