from __future__ import annotations

from pathlib import Path

import pytest

from layerscope.errors import PromptError
from layerscope.experiments.layers import Fact, PromptSet

HEADER = "key,prompt,answer,foil,control,ablated\n"


def write(folder: Path, text: str, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_builtin_suite_is_eleven_passes_in_the_published_order() -> None:
    passes = PromptSet.builtin().passes()
    assert [entry.index for entry in passes] == list(range(11))
    order = [(entry.fact_index, entry.prompt_id, entry.variant) for entry in passes]
    facts = [(n, "pos", variant) for n in range(5) for variant in ("orig", "no_filler")]
    assert order == [*facts, (None, "ctl", "orig")]
    first, second, control = passes[0], passes[1], passes[-1]
    assert first.text == (
        "Give the city name only, plain text. The capital of Germany is called simply"
    )
    assert second.text == first.text.removesuffix(" simply")
    assert first.fact_key == "Germany→Berlin"
    assert (control.answer, control.foil, control.fact_key) == ("Paris", "Berlin", None)
    assert control.text == first.text.replace("Germany", "France")


def test_csv_and_yaml_of_the_same_facts_are_the_same_set(tmp_path: Path) -> None:
    table = write(
        tmp_path, HEADER + 'a,"Two, plus two is",four,,,\nb,Red and,blue,green,One and,\n'
    )
    listing = write(
        tmp_path,
        "name: mine\nprompts:\n"
        "- {key: a, prompt: 'Two, plus two is', answer: four}\n"
        "- {key: b, prompt: Red and, answer: blue, foil: green, control: One and}\n",
        "prompts.yaml",
    )
    from_csv, from_yaml = PromptSet.from_file(table), PromptSet.from_file(listing)
    assert from_csv.facts == from_yaml.facts
    assert from_csv.digest() == from_yaml.digest()
    assert from_yaml.name == "mine"


def test_digest_depends_on_content() -> None:
    one = PromptSet("x", (Fact(key="a", prompt="p", answer="q"),))
    other = PromptSet("x", (Fact(key="a", prompt="p", answer="r"),))
    assert one.digest() != other.digest()


def test_each_of_several_controls_keeps_its_fact() -> None:
    facts = tuple(
        Fact(key=key, prompt="p " + key, answer="x", foil="y", control="c " + key)
        for key in ("a", "b")
    )
    controls = [entry for entry in PromptSet("s", facts).passes() if entry.prompt_id == "ctl"]
    assert [(entry.fact_key, entry.fact_index) for entry in controls] == [("a", 0), ("b", 1)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("key,prompt\na,b\n", "answer missing"),
        ("key,prompt,anwser\na,b,c\n", "did you mean 'anwser'"),
        (HEADER, "empty"),
        (HEADER + "a,b,c,,,\na,d,e,,,\n", "'a' occurs twice"),
        (HEADER + "a,,c,,,\n", "line 2: prompt missing"),
        (HEADER + "a,  ,c,,,\n", "empty prompt"),
        (HEADER + "a,b,c\n", "line 2: 6 cells expected"),
        (HEADER + "a,b,c,,,,d\n", "line 2: 6 cells expected"),
        (HEADER + "a,b,c,,control,\n", "control but no foil"),
        ("key,prompt,answer,folly\na,b,c,d\n", "unknown column 'folly'; did you mean 'foil'"),
        ("", "key, prompt, answer missing"),
    ],
)
def test_bad_csv_names_the_place_and_the_fix(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PromptError, match=says.replace("?", r"\?")) as caught:
        PromptSet.from_file(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "prompts.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompts: 3", "give a list"),
        ("- just text", "prompt 1: give a mapping"),
        ("- {key: a, prompt: b}", "prompt 1: answer missing"),
        ("- {key: [", "not valid YAML"),
    ],
)
def test_bad_yaml_names_the_place_and_the_fix(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(PromptError, match=says) as caught:
        PromptSet.from_file(write(tmp_path, text, "prompts.yaml"))
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        PromptSet.from_file(tmp_path / "none.csv")
    with pytest.raises(PromptError, match=r"must be a \.csv"):
        PromptSet.from_file(write(tmp_path, "x", "prompts.txt"))


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(HEADER.encode() + "a,b,fran\xe7ais,,,\n".encode("latin-1"))
    with pytest.raises(PromptError, match="not UTF-8"):
        PromptSet.from_file(path)
