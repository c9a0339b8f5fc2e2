from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from layerscope.errors import ConfigError, PromptError
from layerscope.models import templates
from layerscope.models.chat import Format
from layerscope.models.prompt import Prompt, prompt_sha256, render
from layerscope.models.prompts import tokenize
from layerscope.models.templates import TaskTemplate, get_template, read_templates, register
from support.chat_templates import STYLES, chat_tokenizer
from support.shared import shared_path

# Texts per style and task, and hashes of the prompts that real tokenizers make of them. What a
# released template renders never changes: a difference here calls for a new version.
GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "renders.json").read_text("utf-8")
)
SHOTS = (("hot", "cold"), ("big", "small"))
TASKS = ("completion", "qa", "icl", "chat")
TOKENIZERS = {
    "gpt2": ("tokenizers", "gpt2"),
    "gpt_neox_pythia": ("tokenizers", "gpt_neox_pythia"),
    "stories260K": ("models", "stories260K"),
    "babyllama-tok105": ("models", "babyllama-tok105"),
}


def example(task: str, format: Format) -> Prompt:
    """One prompt of each task, made as a user makes it."""
    text = {"qa": "What is the capital of France?", "icl": "up"}.get(task, "The sky is")
    return get_template(task).prompt(text, format=format, shots=SHOTS if task == "icl" else ())


def given(row: TaskTemplate) -> dict[str, str]:
    """What a template says, without what it leaves out."""
    return {name: value for name, value in asdict(row).items() if value}


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget after the test what it registers."""
    monkeypatch.setattr(templates, "_registered", {})
    yield


class TestGolden:
    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("style", STYLES)
    def test_chat(self, style: str, task: str) -> None:
        prompt = example(task, "chat")
        assert prompt.template == f"{task}/1"
        text = render(chat_tokenizer(STYLES[style]), prompt).text
        assert text == GOLDEN["texts"][style][task]

    @pytest.mark.parametrize("task", [task for task in TASKS if task != "chat"])
    def test_raw(self, task: str) -> None:
        prompt = example(task, "raw")
        assert prompt.text == GOLDEN["texts"]["raw"][task]
        assert prompt.template == f"{task}/1"

    @pytest.mark.real_model
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_hashes_of_real_tokenizers(self, name: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(shared_path(*TOKENIZERS[name]))
        found: dict[str, str] = {}
        for task in TASKS:
            for style in ("raw", *STYLES) if task != "chat" else STYLES:
                tokenizer.chat_template = STYLES.get(style)
                prompt = example(task, "raw" if style == "raw" else "chat")
                ids = tokenize(tokenizer, prompt).row_ids(0)
                expected = int(name in ("stories260K", "babyllama-tok105"))
                if style in ("llama3", "gemma"):  # these write a BOS themselves
                    expected = 1
                assert ids.count(tokenizer.bos_token_id) == expected, (style, task)
                found[f"{style} {task}"] = prompt_sha256(ids, render(tokenizer, prompt))
        assert found == GOLDEN["hashes"][name]

    def test_released_templates_stay_as_they_are(self) -> None:
        assert {row.id: given(row) for row in templates.templates()} == GOLDEN["templates"]


class TestPrompt:
    def test_values_are_put_in_once(self) -> None:
        prompt = get_template("icl").prompt("{text}", format="raw", shots=[("{answer}", "{text}")])
        assert prompt.text == "Q: {answer}\nA: {text}\n\nQ: {text}\nA:"

    def test_other_braces_stay(self) -> None:
        row = TaskTemplate(task="json", version="1", raw='{"q": "{text}", "a": "')
        assert row.prompt("x", format="raw").text == '{"q": "x", "a": "'

    def test_a_chat_has_what_the_template_brings_unless_told(self) -> None:
        row = TaskTemplate(
            task="t", version="1", user="<{text}>", system="Be brief.", answer_prefix="So"
        )
        prompt = row.prompt("x", format="chat", key="k")
        assert [turn.content for turn in prompt.turns()] == ["Be brief.", "<x>"]
        assert (prompt.answer_prefix, prompt.key, prompt.template) == ("So", "k", "t/1")
        told = row.prompt("x", format="chat", system="Be long.")
        assert told.turns()[0].content == "Be long."

    @pytest.mark.parametrize(
        ("task", "arguments", "says"),
        [
            ("chat", {"format": "raw"}, "has no raw form: use format='chat'"),
            ("qa", {"format": "caht"}, "did you mean 'chat'"),
            ("qa", {"format": "raw", "shots": SHOTS}, "takes no shots"),
            ("icl", {"format": "raw"}, "needs shots"),
            ("icl", {"format": "chat"}, "needs shots"),
            ("qa", {"format": "raw", "system": "x"}, "system belongs to a chat"),
        ],
    )
    def test_what_does_not_fit(self, task: str, arguments: dict[str, Any], says: str) -> None:
        with pytest.raises(PromptError, match=says):
            get_template(task).prompt("x", **arguments)


@pytest.mark.usefixtures("scratch")
class TestRegistry:
    def test_ones_own_wins_and_the_released_one_stays(self) -> None:
        released = get_template("qa")
        own = register(TaskTemplate(task="qa", version="mine-1", raw="Q: {text} A:"))
        assert get_template("qa") == own
        assert get_template("qa/1") == released and get_template("qa/mine-1") == own
        templates.unregister(own)
        assert get_template("qa") == released

    def test_a_familys_own_comes_first(self) -> None:
        special = register(TaskTemplate(task="qa", version="1", family="gemma2", raw="{text}?"))
        register(TaskTemplate(task="qa", version="2", raw="{text}!"))
        assert special.id == "gemma2/qa/1"
        assert get_template("qa", family="gemma2") == special
        assert get_template("qa", family="llama").id == "qa/2"
        assert get_template("completion", family="gemma2").id == "completion/1"
        assert get_template("qa/1", family="gemma2").id == "qa/1"

    def test_an_id_belongs_to_one_text_forever(self) -> None:
        own = TaskTemplate(task="qa", version="mine-1", raw="{text}")
        assert register(own) is register(own)
        for taken in ("1", "mine-1"):
            with pytest.raises(ConfigError, match=f"qa/{taken} exists with another text"):
                register(TaskTemplate(task="qa", version=taken, raw="other {text}"))

    @pytest.mark.parametrize("name", ["qaa", "qa/7", ""])
    def test_an_unknown_task_names_the_known(self, name: str) -> None:
        with pytest.raises(ConfigError, match="known: chat, chat/1, completion"):
            get_template(name)

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({}, "needs a raw or a user text"),
            ({"raw": "x"}, r"raw lacks \{text\}"),
            ({"user": "x"}, r"user lacks \{text\}"),
            ({"raw": "{text}", "shot": "{text}"}, r"shot lacks \{answer\}"),
            ({"raw": 3}, "raw must be a text"),
            ({"raw": "{text}", "version": "a/b"}, "version must be"),
            ({"raw": "{text}", "task": ""}, "task must be"),
        ],
    )
    def test_a_malformed_template(self, fields: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match=says):
            TaskTemplate(**{"task": "t", "version": "1", **fields})


class TestFiles:
    def test_reads_what_a_user_writes(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(
            "- {task: qa, version: 2, raw: 'Frage: {text}', family: gemma2}\n"
            "- task: antonym\n  version: a\n  user: |-\n    Opposite of\n    {text}?\n",
            encoding="utf-8",
        )
        first, second = read_templates(path)
        assert first == TaskTemplate(task="qa", version="2", raw="Frage: {text}", family="gemma2")
        assert second.user == "Opposite of\n{text}?"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("- {task: qa, version: 1, rwa: x}", r"template 1: unknown field 'rwa'; did you mean"),
            ("- {task: qa, raw: '{text}'}", "template 1: version missing"),
            ("- {task: qa, version: 1, raw: x}", r"template 1: template qa/1: raw lacks"),
            ("- just text", "template 1: give a mapping"),
            ("qa: 3", "give a list of templates"),
            ("- {task: [", "not valid YAML"),
        ],
    )
    def test_a_wrong_file_names_the_entry(self, tmp_path: Path, text: str, says: str) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=says) as caught:
            read_templates(path)
        assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            read_templates(tmp_path / "none.yaml")
        (tmp_path / "latin.yaml").write_bytes(b"- \xe7")
        with pytest.raises(ConfigError, match="not UTF-8"):
            read_templates(tmp_path / "latin.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_templates(tmp_path)
